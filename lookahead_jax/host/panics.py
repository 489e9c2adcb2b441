"""Panics of compiled extensions (Rust, by pyo3) as ordinary errors."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def panics_as_errors(what: str, *, errors: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Raises ValueError where the block raises a BaseException that is no Exception.

    pyo3 derives PanicException from BaseException, so `except Exception` misses it. Interrupts and
    exits pass unchanged. Exceptions pass too, but for those in `errors`, which become ValueError.
    """
    try:
        yield
    except errors as error:
        raise ValueError(f"{what} ({error})") from error
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise ValueError(f"{what} ({type(error).__name__}: {error})") from None
