"""Token files: int32 [B, T] in .npy, rows padded on the right with -1."""

from pathlib import Path

import numpy as np


def read_tokens(path: Path, vocab_size: int) -> np.ndarray:
    """The tokens of a file, int32 [B, T], checked; ValueError names the first fault.

    Pickled arrays are refused. Trailing columns that are padding in every row are cut off.
    """
    try:
        tokens = np.load(path, allow_pickle=False)
    except (EOFError, ValueError) as error:
        raise ValueError(f"{path} is not a .npy file of numbers: {error}") from error
    if not isinstance(tokens, np.ndarray):
        raise ValueError(f"{path} is an archive of arrays; token files are a single .npy array")
    if tokens.dtype != np.int32:
        raise ValueError(f"{path} holds {tokens.dtype}; token files are int32")
    if tokens.ndim != 2 or tokens.size == 0:
        raise ValueError(f"{path} has shape {tokens.shape}; token files are [rows, tokens]")
    if tokens.min() < -1 or tokens.max() >= vocab_size:
        wrong = tokens[(tokens < -1) | (tokens >= vocab_size)][0]
        raise ValueError(f"{path} holds {wrong}; tokens of this model are 0 to {vocab_size - 1}")
    lengths = (tokens >= 0).sum(axis=1)
    padding = np.arange(tokens.shape[1]) >= lengths[:, None]
    for fault, rows in {
        "is empty": lengths == 0,
        "has padding (-1) before its end": ((tokens < 0) != padding).any(axis=1),
    }.items():
        if rows.any():
            raise ValueError(f"{path}: row {rows.argmax()} {fault}")
    return tokens[:, : lengths.max()]
