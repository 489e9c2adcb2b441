"""Held-out code: files that no shipped model or module was trained on, and windows cut from them.

The files are those that train.corpus held out (clusters of similar files were kept together);
every line of heldout_code.jsonl names the source and its licence.
"""

import json
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers

HELDOUT = Path(__file__).parent / "heldout_code.jsonl"
CODE = "code"  # the name of this task; its answers are the model's own continuations
Split = Literal["validation", "test"]


def code_stream(tokenizer: tokenizers.Tokenizer, split: Split, bos: int) -> np.ndarray:
    """Token ids int32 of the split's files, each after <s>. Every other file is for validation."""
    lines = HELDOUT.read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines][split == "test" :: 2]
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    return np.concatenate([np.array([bos, *e.ids], np.int32) for e in encoded])


def code_prompts(stream: np.ndarray, bos: int, *, count: int, length: int) -> np.ndarray:
    """<s> and `length - 1` tokens of text, from evenly spaced places: int32 [count, length].

    Raises:
      ValueError: the text is shorter than one prompt.
    """
    if len(stream) < length:
        raise ValueError(f"{len(stream)} tokens of text are too few for a prompt of {length}")
    starts = np.linspace(0, len(stream) - length, count).astype(np.int64)
    prompts = stream[starts[:, None] + np.arange(length)]
    prompts[:, 0] = bos
    return prompts
