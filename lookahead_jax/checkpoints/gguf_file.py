"""Opens a GGUF file: configuration, tokenizer and tensors, all from one file."""

from pathlib import Path

from lookahead_jax.checkpoints.gguf_config import hf_config
from lookahead_jax.checkpoints.gguf_header import read_header
from lookahead_jax.checkpoints.gguf_tensors import tensors_of
from lookahead_jax.checkpoints.gguf_tokenizer import eos_ids, tokenizer_of
from lookahead_jax.checkpoints.hf_config import config_from_hf
from lookahead_jax.checkpoints.source import CheckpointSource, GenerationDefaults


def open_gguf(path: Path) -> CheckpointSource:
    """The checkpoint in a GGUF file; its header is checked.

    Raises:
      FileNotFoundError: when there is no such file.
      ValueError: for anything malformed or unsupported, naming the file and the key.
    """
    header = read_header(path)
    try:
        hf = hf_config(header)
        config = config_from_hf(hf)
        tensors = tensors_of(header, config)
        tokenizer = tokenizer_of(header.metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    generation = GenerationDefaults(
        eos_ids=eos_ids(header.metadata),
        bos_id=header.metadata.get("tokenizer.ggml.bos_token_id"),
        pad_id=header.metadata.get("tokenizer.ggml.padding_token_id"),
        temperature=None,
        top_k=None,
        top_p=None,
    )
    return CheckpointSource(
        hf=hf, config=config, tokenizer=tokenizer, generation=generation, tensors=tensors
    )
