"""What drafting has brought, over all rows of a batch."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftReport:
    """The outcome of drafting, over all rows."""

    steps: int  # forwards of the target, counted once for every row that took part
    mean_accepted: float | None  # tokens emitted per forward and row; None without forwards
    drafter_us: float | None  # microseconds per draft of a host drafter; None without drafts
    histogram: list[int]  # entry i: forwards that emitted i + 1 tokens


def draft_report(lengths: np.ndarray, drafting_s: float, drafts: int) -> DraftReport:
    """The report on rows with these `DecodeState.lengths` [B, 128].

    A host drafter has spent `drafting_s` seconds on `drafts` drafts.
    """
    counts = lengths.sum(0)
    steps = int(counts.sum())
    emitted = int(counts @ np.arange(1, counts.size + 1))
    return DraftReport(
        steps=steps,
        mean_accepted=emitted / steps if steps else None,
        drafter_us=drafting_s / drafts * 1e6 if drafts else None,
        histogram=np.trim_zeros(counts, "b").tolist(),
    )
