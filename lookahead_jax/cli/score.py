"""`lookahead score`: the scores a policy gives to the prompt tokens."""

from dataclasses import dataclass, field

import numpy as np

from lookahead_jax.cli.options import EvictionOptions, ModelOptions, OutFile, TokenFile
from lookahead_jax.cli.tokens import read_tokens
from lookahead_jax.host.files import check_output, save_arrays


@dataclass(frozen=True, kw_only=True)
class Score:
    """Write a policy's score of every prompt token, and the positions it keeps."""

    source: ModelOptions = field(default_factory=ModelOptions)
    eviction: EvictionOptions = field(default_factory=EvictionOptions)
    tokens: TokenFile
    """Token ids as int32 [rows, tokens] in .npy, rows padded on the right with -1."""
    out: OutFile
    """The .npz file to write: scores [L, B, K, T], kept [L, B, K, C] (-1 padded), logits [B, V]."""


def main(config: Score) -> None:
    import lookahead_jax as lk

    check_output(config.out)
    eviction = config.eviction.resolve(config.source)
    model = config.source.load()
    scored = lk.score(
        model,
        read_tokens(config.tokens, model.config),
        policy=eviction.policy,
        budget=config.eviction.budget,
        lookahead=eviction.modules(model),
    )
    save_arrays(
        config.out,
        scores=np.asarray(scored.scores),
        kept=np.asarray(scored.kept),
        logits=np.asarray(scored.logits),
    )
