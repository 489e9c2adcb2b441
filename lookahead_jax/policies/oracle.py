"""oracle: the model's own answer, decoded in advance, decides what is kept."""

import dataclasses

from lookahead_jax.policies.base import WithResponse
from lookahead_jax.policies.lookaheadkv import LookaheadKV


@dataclasses.dataclass(frozen=True, kw_only=True)
class Oracle(LookaheadKV):
    """Keeps what the model's own answer attends to, decoded in advance: an upper bound.

    Scores are the mean attention of the answer under the full cache, group mean. LookaheadKV is
    trained to predict these scores. The response is the model's own greedy one: prefill with
    `Whole`, decode, then `prefill.compress` with the response as the observer (rows shorter than
    the longest are padded with position -1).
    """

    response_tokens: int = 128
    """Length of the response that is read, at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.response_tokens < 1:
            raise ValueError(f"response_tokens={self.response_tokens} must be at least 1")

    @property
    def reading(self) -> WithResponse:
        return WithResponse(tokens=self.response_tokens)

    @property
    def decode_cut(self) -> None:
        return None
