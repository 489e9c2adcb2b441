"""Settings of a training run of the embedded base model."""

import dataclasses
import pathlib
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """One training run of the base model."""

    corpus: pathlib.Path
    """Folder written by lookahead_jax.train.embedded.corpus."""
    out: pathlib.Path
    """Folder of the run, made if it does not exist. An existing run is resumed."""
    start: pathlib.Path | None = None
    """Folder of a run whose weights are the initial ones; same sizes. None: random weights."""
    hidden: int = 192
    """Width D of the residual stream."""
    layers: int = 4
    """Decoder layers."""
    heads: int = 4
    """Query heads."""
    kv_heads: int = 2
    """KV heads."""
    head_dim: int = 64
    """Dimension of a head."""
    mlp: int = 512
    """Width F of the gated MLP."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    lengths: tuple[int, ...] = (128, 256, 128, 256, 128, 256, 576)
    """Row length of each stage."""
    steps: tuple[int, ...] = (300, 200, 300, 50, 200, 250, 650)
    """Optimizer steps of each stage."""
    step_tokens: int = 4608
    """Tokens per optimizer step, text and tasks together."""
    repeats: tuple[float, ...] = (0.0, 0.0, 0.3, 0.15, 0.25, 0.1, 0.05)
    """Fraction of the task rows of each stage that are plain copies."""
    fill: tuple[float, ...] = (0.8, 0.8, 0.5, 0.7, 0.5, 0.7, 0.85)
    """Largest fraction of a task row that is document; the rest is questions."""
    stretch: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5)
    """Fraction of the rows of each stage whose positions are spread up to `max_position`."""
    max_position: int = 2048
    """Positions of the model: the longest prompt and answer together."""
    task_share: float = 0.5
    """Fraction of the rows that are task documents."""
    task_weight: float = 0.5
    """Weight of the task loss; that of the text loss is 1 minus this."""
    micro_rows: tuple[int, ...] = (8, 4, 8, 4, 8, 4, 2)
    """Rows per micro-batch in each stage."""
    muon_rate: float = 6e-3
    """Peak learning rate of the matrices (Muon, updates scaled to RMS 0.2)."""
    adam_rate: float = 4e-3
    """Peak learning rate of the embeddings and norms (Adam)."""
    warmup: int = 40
    """Steps of linear warm-up."""
    decay: float = 0.4
    """Final fraction of the run, in which the rates fall linearly to zero."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""
    save_every: int = 50
    """Steps between checkpoints."""
    eval_every: int = 100
    """Steps between evaluations on held-out prompts and text."""

    def hf(self, vocab_size: int, eos: int) -> dict[str, Any]:
        """The config.json of the trained model."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": vocab_size,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.mlp,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
            "max_position_embeddings": self.max_position,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": eos,
            "torch_dtype": "float32",
        }
