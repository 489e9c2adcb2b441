"""Strict JAX for every test: four CPU devices, no silent promotion, exact float32 products."""

import gc
import json
import os
import signal
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "16")  # TPU interpret mode deadlocks on a small thread pool
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # parallel ahead-of-time compilers
# Nearly all of the time goes into compiling. Unoptimised code compiles faster, and so does the code
# of XLA's older emitters, which jaxlib has up to 0.10 (a quarter of the time on one prefill).
# Compiled programs are kept outside the checkout, so that workers, later runs and fresh clones
# share them.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.10."),
)
# Collectives of one program must not run side by side: devices may enter them in different orders,
# and then wait for one another until XLA ends the process.
os.environ["XLA_FLAGS"] += (
    " --xla_force_host_platform_device_count=4"
    " --xla_cpu_enable_concurrency_optimized_scheduler=false"
)
os.environ.setdefault(  # JAX's keys hold its version
    "JAX_COMPILATION_CACHE_DIR",
    os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "lookahead_jax", "tests"
    ),
)
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # a quarter of the time to lower
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest
from beartype import beartype
from jaxtyping import install_import_hook

# Ignored in a script's background jobs and under nohup; commands that tests start inherit it.
for number, default in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, default)
gc.set_threshold(100_000, 20, 50)  # tracing makes many objects and few cycles
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


def check_signature(function):
    """Check calls of functions, not fields of dataclasses: trees of specs and shapes are legal."""
    return function if function.__name__ == "__init__" else beartype(function)


install_import_hook("lookahead_jax", f"{__name__}.check_signature")


DURATIONS = Path(__file__).parent / "durations.json"  # seconds per file, from one run
_spent: defaultdict[str, float] = defaultdict(float)


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="all combinations of the product tests")
    parser.addoption(
        "--record-durations", action="store_true", help=f"store seconds per file in {DURATIONS}"
    )


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):  # pytest-xdist would sort files by test count
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full"):
        skip = pytest.mark.skip(reason="all combinations; --full runs them")
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(skip)
    # Longest files first: workers then finish at about the same time.
    seconds = json.loads(DURATIONS.read_text())
    items.sort(key=lambda item: -seconds.get(item.path.name, 0.0))


def pytest_runtest_logreport(report):
    _spent[Path(report.location[0]).name] += report.duration


def pytest_sessionfinish(session):
    if session.config.getoption("--record-durations") and not hasattr(
        session.config, "workerinput"
    ):
        stored = json.loads(DURATIONS.read_text()) if DURATIONS.exists() else {}
        measured = {name: round(spent, 1) for name, spent in _spent.items()}
        DURATIONS.write_text(json.dumps(stored | measured, indent=1, sort_keys=True) + "\n")


@pytest.fixture(scope="session", autouse=True)
def quiet_commands():
    """Commands in this process do not say that loading or compiling is slow under a load."""
    from lookahead_jax.host import activity

    activity.AFTER_S = 3600.0


@pytest.fixture(scope="module", autouse=True)
def drop_compiled_programs():
    """Every program XLA compiles maps memory, and Linux allows a process 65,530 maps."""
    yield
    jax.clear_caches()
