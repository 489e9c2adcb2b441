"""What a training command shows on stderr while it works."""

import sys
from collections.abc import Iterator

import jax
from tqdm import tqdm

_REFRESH_S = 30.0  # between lines of a log; a terminal shows every step


def say(message: str) -> None:
    """Writes one line, on the first process only."""
    if jax.process_index() == 0:
        print(message, file=sys.stderr, flush=True)


def steps(first: int, total: int, *, until_first: str = "compiling the step") -> Iterator[int]:
    """Yields the steps `first` to `total` - 1 and shows how many are done and the time left.

    `until_first` says what happens before the first step has run.
    """
    if first:
        say(f"resuming after step {first} of {total}")
    terminal = sys.stderr.isatty()
    with tqdm(
        range(first, total),
        desc=until_first,
        initial=first,
        total=total,
        unit="step",
        mininterval=0.1 if terminal else _REFRESH_S,
        disable=jax.process_index() != 0,
    ) as shown:
        for step in shown:
            yield step
            if step == first:
                shown.set_description("training")
