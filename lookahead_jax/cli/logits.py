"""`lookahead logits`: the model's logits at every position, without eviction."""

from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from lookahead_jax.cli.options import ModelOptions, OutFile, TokenFile
from lookahead_jax.cli.tokens import read_tokens
from lookahead_jax.host.files import check_output, save_arrays


@dataclass(frozen=True, kw_only=True)
class Logits:
    """Write the model's logits at every position of token rows."""

    source: ModelOptions = field(default_factory=ModelOptions)
    tokens: TokenFile
    """Token ids as int32 [rows, tokens] in .npy, rows padded on the right with -1."""
    out: OutFile
    """The .npz file to write: logits [B, T, V], float32; zero where a row is padding."""


def main(config: Logits) -> None:
    import jax.numpy as jnp

    import lookahead_jax as lk
    from lookahead_jax.prefilling.diagnosis import non_finite_error

    check_output(config.out)
    model = config.source.load()
    tokens = read_tokens(config.tokens, model.config)
    logits = np.zeros((*tokens.shape, model.config.vocab_size), np.float32)
    for i, row in enumerate(tqdm(tokens, "logits", disable=None)):
        length = (row >= 0).sum()
        row_logits = lk.token_logits(model.params, jnp.asarray(row[None]), config=model.config)
        logits[i, :length] = row_logits[0, :length]
        if not np.isfinite(logits[i]).all():
            tokens_of_row = row[:length].tolist()
            raise non_finite_error(model.params, tokens_of_row, f"row {i}", config=model.config)
    save_arrays(config.out, logits=logits)
