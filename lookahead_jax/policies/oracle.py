"""oracle: the model's own answer, seen in advance, decides what it needs."""

import dataclasses
from typing import ClassVar

from lookahead_jax.policies.lookaheadkv import LookaheadKV


@dataclasses.dataclass(frozen=True, kw_only=True)
class Oracle(LookaheadKV):
    """Mean attention of the response's queries under the full cache, group mean.

    What LookaheadKV is trained to predict, and an upper bound for it: the response is the
    model's own greedy one. Two-pass: prefill with `Whole`, decode, then `prefill.compress` with
    the response as the observer (rows shorter than the longest are padded with position -1).
    """

    two_pass: ClassVar[bool] = True
    uses_modules: ClassVar[bool] = False
    decode_observers: ClassVar[None] = None  # pyright: ignore[reportIncompatibleVariableOverride]

    response_tokens: int = 128  # pyright: ignore[reportIncompatibleVariableOverride]
    """Length of the response that is read, at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.response_tokens < 1:
            raise ValueError(f"response_tokens={self.response_tokens} must be at least 1")
