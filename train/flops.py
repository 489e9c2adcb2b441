"""FLOPs of a training step, counted by hand: compilers count the body of a loop once."""

from lookahead_jax.model.config import ModelConfig


def training_flops(config: ModelConfig, prompt: int, response: int, tokens: int) -> float:
    """FLOPs of one row of a step; the LM head is not run.

    The forward pass of prompt and response, the response's logits once more for its scores, and
    the lookahead rows: their weights forward and backward, their attention and scores (three
    products a key) forward, recomputed and backward.
    """
    active = 1 if config.experts is None else config.experts.per_token
    d, f = config.hidden_size, config.mlp_dim * active
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    weights = 2 * (2 * d * heads + 2 * d * kv + 3 * d * f)  # per row and layer
    product = 2 * heads  # per query and key: logits, or weighted values
    per_layer = prompt * (weights + 2 * product * prompt / 2)
    per_layer += response * (weights + 2 * product * (prompt + response / 2) + product * prompt)
    per_layer += tokens * (2 * weights + 9 * product * (prompt + tokens / 2))
    return config.num_layers * per_layer
