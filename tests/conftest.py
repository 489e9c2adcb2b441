"""Strict JAX for every test: four CPU devices, no silent promotion, exact float32 products."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "16")  # TPU interpret mode deadlocks on a small thread pool
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # parallel ahead-of-time compilers
# Nearly all of the time goes into compiling. Code that is not optimised is quicker to come by, and
# what was compiled once serves the other worker and later runs (`--cache-clear` forgets it).
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "--xla_backend_optimization_level=0")
    + " --xla_force_host_platform_device_count=4"
)
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "d" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest
from beartype import beartype
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


def check_signature(function):
    """Check calls of functions, not fields of dataclasses: trees of specs and shapes are legal."""
    return function if function.__name__ == "__init__" else beartype(function)


install_import_hook("lookahead_jax", f"{__name__}.check_signature")


def pytest_configure(config):
    from tests import tokenizer_adapter

    tokenizer_adapter.install()


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="all combinations of the product tests")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full"):
        skip = pytest.mark.skip(reason="all combinations; --full runs them")
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(skip)


@pytest.fixture(scope="module", autouse=True)
def drop_compiled_programs():
    """Every program XLA compiles maps memory, and Linux allows a process 65,530 maps."""
    yield
    jax.clear_caches()
