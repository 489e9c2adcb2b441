"""What examples pin, in a grid: which methods and budgets can keep it."""

from collections.abc import Sequence

from lookahead_jax.eval.grid.config import method_of
from lookahead_jax.eval.grid.prompts import AssembledPrompt
from lookahead_jax.eval.grid.rows import GridCell
from lookahead_jax.modules.definition import LookaheadModules, staying_entries


def check_pins(
    cells: Sequence[GridCell],
    prompts: Sequence[AssembledPrompt],
    modules: LookaheadModules | None,
) -> None:
    """Raises ValueError if a cell of one task cannot keep what a prompt of the task pins."""
    pinned = max((sum(end - start for start, end in p.pin) for p in prompts), default=0)
    if not pinned:
        return
    for cell in cells:
        method = method_of(cell.policy)
        if method.prune is not None:
            raise ValueError(
                f"{cell.policy} drops tokens of a prompt and can pin none of them, as {cell.task} "
                "asks: leave out one of the two"
            )
        least = pinned + staying_entries(method.policy, modules)
        if method.budgeted and cell.budget < least:
            raise ValueError(
                f"{cell.task} pins {pinned} tokens: give --budgets of at least {least}"
                f"{' for a memory of the modules, too' if least > pinned else ''}"
            )
