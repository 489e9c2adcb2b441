"""Token files: int32 [B, T] in .npy, rows padded on the right with -1."""

from pathlib import Path

import numpy as np

from lookahead_jax.model.config import ModelConfig


def read_tokens(path: Path, config: ModelConfig) -> np.ndarray:
    """Reads the tokens of a file: int32 [B, T]. Raises ValueError, naming the first fault.

    Pickled arrays are refused.
    """
    from lookahead_jax.prefilling.batching import check_tokens

    try:
        tokens = np.load(path, allow_pickle=False)
    except (EOFError, ValueError) as error:
        raise ValueError(f"{path} is not a .npy array of numbers") from error
    if not isinstance(tokens, np.ndarray):
        raise ValueError(f"{path} is an archive; a token file is one .npy array")
    if tokens.dtype != np.int32:
        raise ValueError(f"{path} holds {tokens.dtype}; a token file holds int32")
    try:
        check_tokens(tokens, config=config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return tokens
