"""Models by their name on a Hugging Face hub, kept in the cache of the package `huggingface_hub`.

That package reads HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and HF_TOKEN. Pickled weights (.bin, .pt)
are never fetched.
"""

import contextlib
import dataclasses
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lookahead_jax.checkpoints.hf_directory import FOLDER_FILES, read_config
from lookahead_jax.checkpoints.hf_files import find, listing
from lookahead_jax.checkpoints.safetensors_files import INDEX, weight_files

_NAME = re.compile(
    r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(/(?P<file>[\w./-]+\.gguf))?(@(?P<revision>\w[\w./-]*))?",
    re.ASCII,
)
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclasses.dataclass(frozen=True)
class HubName:
    """A repository of a hub, or one GGUF file of it."""

    repository: str
    """owner/name"""
    file: str | None
    """Path of the .gguf file in the repository; None is the repository as a model folder."""
    revision: str | None
    """A branch, tag or commit; None is the main branch."""

    def __str__(self) -> str:
        name = self.repository if self.file is None else f"{self.repository}/{self.file}"
        return name if self.revision is None else f"{name}@{self.revision}"


def hub_name(text: str) -> HubName | None:
    """Parses `owner/name[/file.gguf][@revision]`; None if the text is no such name."""
    match = _NAME.fullmatch(text)
    if match is None or match["repository"].endswith(".gguf"):  # the path of a local file
        return None
    return HubName(match["repository"], match["file"], match["revision"])


def fetch(name: HubName) -> Path:
    """The model's folder, or its GGUF file, in the hub's cache; what is missing is downloaded.

    A folder gets the files that are read: configuration, tokenizer, chat templates and safetensors.
    The configuration is checked before weights are downloaded. A complete copy in the cache
    needs one request, which resolves the revision, and none with HF_HUB_OFFLINE=1 or
    when the hub cannot be reached.

    Raises:
      FileNotFoundError: when repository, revision or weights do not exist, or the hub cannot be
        asked and the cache lacks something.
      PermissionError: when access to the repository is restricted.
      OSError: for any other failure of network or disk.
      ValueError: when the configuration is not supported.
    """
    import huggingface_hub as hub  # slow to import

    with _plain_errors(name):
        if name.file is not None:
            file = hub.hf_hub_download(name.repository, name.file, revision=name.revision)
            return Path(file)
        small = hub.snapshot_download(
            name.repository,
            revision=name.revision,
            allow_patterns=[*FOLDER_FILES, INDEX],
            tqdm_class=_bars(shown=False),
        )
        folder = Path(small)
        if missing := _missing(folder):
            stored = hub.HfApi().list_repo_files(name.repository, revision=folder.name)
            if absent := sorted(set(missing) - set(stored)):
                raise _nothing_to_load(name, absent, stored)
            hub.snapshot_download(
                name.repository,
                revision=folder.name,
                allow_patterns=missing,
                tqdm_class=_bars(shown=True),
            )
        return folder


def _bars(*, shown: bool) -> type:
    """The package's progress bars, on terminals only or not at all."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **{**options, "disable": None if shown else True})

    return Bar


def _missing(folder: Path) -> list[str]:
    """Files that a model needs and its folder lacks; weights come after the configuration."""
    if not (folder / "config.json").exists():
        return ["config.json"]
    read_config(folder)
    files = weight_files(folder)
    if other := [file for file in files if not file.endswith(".safetensors")]:
        raise ValueError(f"{folder / INDEX}: refused, it names {listing(other)} as safetensors")
    return [file for file in files if find(folder, file) is None]


def _nothing_to_load(name: HubName, absent: list[str], stored: list[str]) -> FileNotFoundError:
    """The error for a repository that lacks files which a model folder has."""
    files = sorted(file for file in stored if file.endswith(".gguf"))
    if files:
        at = "" if name.revision is None else f"@{name.revision}"
        return FileNotFoundError(
            f"{name} is no model folder, it has GGUF files ({listing(files)}): name one of them, "
            f"as in {name.repository}/{files[0]}{at}"
        )
    if any(file.endswith(_PICKLED) for file in stored):
        return FileNotFoundError(
            f"{name} has no safetensors, only pickled weights, which can run code when they are "
            "read: choose a repository or a revision with .safetensors"
        )
    return FileNotFoundError(f"{name} lacks {listing(absent)}: it is no model that can be loaded")


@contextlib.contextmanager
def _plain_errors(name: HubName) -> Iterator[None]:
    """Says in one line what went wrong, and what helps."""
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    nowhere = f"there is no local folder or file {name}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{name.repository} is gated: accept its conditions at {hub}/{name.repository} and set "
            "HF_TOKEN to a token of that account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{nowhere}, and {hub} has no repository {name.repository}: check the name; a "
            "private one needs HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{name.repository} has no revision {name.revision}: name a branch, tag or commit"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise _not_cached(error, nowhere) from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(
            f"{name.repository} has no file {name.file}: look at {hub}/{name.repository}"
        ) from error
    except errors.OfflineModeIsEnabled as error:  # a download that was not finished before
        raise _not_cached(error, f"{name} was downloaded in part") from error
    except ValueError:
        raise  # of our own checks, and of the package for names that no hub has
    except Exception as error:
        # The package raises its own errors and those of its HTTP client, which differs by version.
        raise _failure(name, error) from error


def _not_cached(error: Exception, start: str) -> FileNotFoundError:
    from huggingface_hub import constants

    start = f"{start}, and the hub's cache {constants.HF_HUB_CACHE} lacks it"
    if constants.HF_HUB_OFFLINE:
        return FileNotFoundError(
            f"{start}; HF_HUB_OFFLINE is set: unset it to download, or name a folder"
        )
    cause = _first_line(error.__cause__ or error)
    return FileNotFoundError(
        f"{start}; {constants.ENDPOINT} cannot be reached ({cause}): check the network, or name a "
        "folder"
    )


def _failure(name: HubName, error: Exception) -> OSError:
    from huggingface_hub import constants

    if isinstance(error, FileNotFoundError | PermissionError) and error.errno is None:
        return error  # our own
    cache = constants.HF_HUB_CACHE
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return OSError(
            f"{name} cannot be stored: {os.strerror(error.errno).lower()}, {error.filename}; set "
            f"HF_HOME to a folder that can be written"
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return OSError(f"{name} cannot be stored: no space left in {cache}; set HF_HOME")
    return OSError(
        f"{name} cannot be fetched from {constants.ENDPOINT} ({_first_line(error)}): run the "
        "command again; files that are complete are kept"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__
