"""A verifier of thoughts that asks a model: the chance of Yes against No, in one forward."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lookahead_jax.checkpoints.load import Model
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.decoder import logits
from lookahead_jax.model.jit import program
from lookahead_jax.model.params import Params
from lookahead_jax.model.sharding import on_its_mesh
from lookahead_jax.prefilling.batching import pad_batch
from lookahead_jax.prefilling.layer_pass import hidden_states
from lookahead_jax.strategies.rows import Verifier

_ANSWERS = (
    "Problem:\n{prompt}\n\nReasoning:\n{answer}\n\n"
    "Does the reasoning state an answer to the problem? Reply with Yes or No."
)
_AGREES = (
    "Problem:\n{prompt}\n\nFirst reasoning:\n{earlier}\n\nSecond reasoning:\n{answer}\n\n"
    "Do both come to the same answer? Reply with Yes or No."
)


def model_verifier(model: Model) -> Verifier:
    """A verifier for the strategy TrimR: `verifier(prompt, answer, earlier)` in [0, 1].

    The model reads one question, as a chat if it has a chat template, and generates nothing: the
    result is the probability of Yes among Yes and No as the next token. The questions are worded
    for this library; the paper's (arXiv:2505.17155) have examples too. A model that thinks before
    it replies makes a poor verifier. A question contains the whole prompt, which is read without
    eviction at each call, and not counted as work.

    Raises ValueError for a model without tokenizer.json, and for one in which Yes and No begin with
    the same token.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(f"a verifier reads texts, and {model.path} has no tokenizer.json")
    chat = bool(tokenizer.chat_templates)
    yes, no = (
        _first_ids([tokenizer.encode_behind(form) for form in (word, " " + word)])
        for word in ("Yes", "No")
    )
    yes, no = yes - no, no - yes
    if not yes or not no:
        raise ValueError(f"Yes and No begin with the same token of {model.path}")
    ids = [np.array(sorted(tokens)) for tokens in (yes, no)]

    def verifier(prompt: str, answer: str, earlier: str | None = None) -> float:
        form = _ANSWERS if earlier is None else _AGREES
        question = form.format(prompt=prompt, answer=answer, earlier=earlier)
        if chat:
            tokens = tokenizer.encode_chat([{"role": "user", "content": question}])
        else:
            tokens = tokenizer.encode(question + "\nReply:", plain=True)
        chances = _next_chances(model, tokens)
        agree, differ = (float(chances[some].sum()) for some in ids)
        return agree / (agree + differ) if agree + differ else 0.5

    return verifier


def _first_ids(forms: Sequence[list[int]]) -> set[int]:
    return {form[0] for form in forms}


@on_its_mesh
def _next_chances(model: Model, tokens: list[int]) -> np.ndarray:
    padded = jnp.asarray(pad_batch([tokens], config=model.config))
    last = jnp.asarray([len(tokens) - 1], jnp.int32)
    out = _next_logits(model.params, padded, last, config=model.config)
    scores = np.asarray(out[0], np.float64)
    return np.exp(scores - scores.max())


@program(static_argnames=("config",))
def _next_logits(
    params: Params, tokens: jax.Array, last: jax.Array, *, config: ModelConfig
) -> jax.Array:
    """Logits [1, V] after the token at position `last`."""
    hidden = hidden_states(params, tokens, config=config)
    here = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    return logits(params, here, config=config)[:, 0]
