"""The four ways prefill reads and scores one layer; all layers of a prompt take the same one.

Letters: B batch, T prompt tokens, M observer rows, K KV heads, D model.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.context import Context
from lookahead_jax.model.decoder import Block
from lookahead_jax.model.layer_attention import LayerKind
from lookahead_jax.model.params import Params
from lookahead_jax.policies.base import Policy, SparsePattern
from lookahead_jax.policies.view import LayerView, Queries, Stats
from lookahead_jax.prefilling.layer_pass import (
    Buffers,
    PromptLayout,
    ReadChunks,
    Rope,
    observe_layer,
    prompt_layer,
    read_together,
    window_queries,
)
from lookahead_jax.prefilling.sparse import prompt_keys, read_sparsely


class Observer(NamedTuple):
    """Rows after the prompt that a policy scores with."""

    block: Block
    rope: Rope


class Layer(NamedTuple):
    """One layer's parameters."""

    p: Params
    lora: Params | None  # of the observer
    kind: LayerKind


class Carry(NamedTuple):
    """What a layer takes from the layer before, and gives to the next."""

    x: jax.Array  # [B, T, D]
    buffers: Buffers
    rows: Any  # [B, M, D] of the observer; None without one


class ScoredLayer(NamedTuple):
    """A layer that has been read and scored."""

    carry: Carry
    view: LayerView
    scores: jax.Array  # [B, K, T] float32


class Scorer(NamedTuple):
    """What scores a layer: the policy, and what it is told of the prompt."""

    policy: Policy
    prompt: PromptLayout
    config: ModelConfig
    pinned: jax.Array | None  # [B, P] bool

    def score(
        self, layer: Layer, carry: Carry, queries: Queries | None, stats: Stats = None
    ) -> ScoredLayer:
        """`carry` holds the layer's keys and values."""
        view = LayerView.of(
            self.prompt.context(carry.buffers), layer.kind, length=self.prompt.length,
            span=self.prompt.span, config=self.config, queries=queries, stats=stats,
            pinned=self.pinned, sink_logits=layer.p.get("sinks"), o=layer.p["o"],
        )  # fmt: skip
        return ScoredLayer(carry, view, self.policy.score(view))


LayerStep = Callable[[Layer, Carry], ScoredLayer]


def prompt_alone(layer: Layer, carry: Carry, *, scorer: Scorer, window: int) -> ScoredLayer:
    """The prompt's last `window` tokens observe, or none."""
    queries = window_queries(
        layer.p, carry.x, scorer.prompt, layer.kind, rows=window, config=scorer.config
    )
    return score_alone(_read(layer, carry, scorer), queries, layer, scorer=scorer)


def score_alone(
    read: ReadChunks, queries: Queries | None, layer: Layer, *, scorer: Scorer
) -> ScoredLayer:
    """Scores a layer, all chunks of which have been read, by its window's `queries`."""
    return scorer.score(layer, Carry(read.x, read.buffers, None), queries, read.stats)


def observer_beside_prompt(
    layer: Layer, carry: Carry, *, scorer: Scorer, observer: Observer
) -> ScoredLayer:
    """The observer is read together with a prompt that is one chunk."""
    x, rows, buffers, queries = read_together(
        layer.p, carry.x, carry.rows, scorer.prompt, layer.kind, observer=observer.block,
        rope=observer.rope, lora=layer.lora, config=scorer.config,
    )  # fmt: skip
    return scorer.score(layer, Carry(x, buffers, rows), queries)


def observer_behind_prompt(
    layer: Layer, carry: Carry, *, scorer: Scorer, observer: Observer
) -> ScoredLayer:
    """The prompt is read in chunks, which may gather statistics, and then the observer."""
    read = _read(layer, carry, scorer)
    return score_behind(read, carry.rows, layer, scorer=scorer, observer=observer)


def score_behind(
    read: ReadChunks, rows: Any, layer: Layer, *, scorer: Scorer, observer: Observer
) -> ScoredLayer:
    """Reads the observer's `rows` [B, M, D] after all chunks of a layer, and scores the layer."""
    context = scorer.prompt.context(read.buffers)
    rows, queries = _observe(layer, rows, observer, context, scorer.config)
    return scorer.score(layer, Carry(read.x, read.buffers, rows), queries, read.stats)


def sparse_prompt(
    layer: Layer, carry: Carry, *, scorer: Scorer, observer: Observer, pattern: SparsePattern
) -> ScoredLayer:
    """The observer scores all keys first; the prompt is then read sparsely, by these scores."""
    _, prompt, config, _ = scorer
    buffers = prompt_keys(layer.p, carry.x, carry.buffers, prompt, layer.kind, config=config)
    _, queries = _observe(layer, carry.rows, observer, prompt.context(buffers), config)
    scored = scorer.score(layer, carry._replace(buffers=buffers), queries)
    x, context = read_sparsely(
        layer.p, carry.x, buffers, prompt, layer.kind, scores=scored.scores, pattern=pattern,
        observers=observer.block.positions, config=config,
    )  # fmt: skip
    rows, _ = _observe(layer, carry.rows, observer, context, config)
    return scored._replace(carry=Carry(x, buffers, rows))


def _read(layer: Layer, carry: Carry, scorer: Scorer) -> ReadChunks:
    return prompt_layer(
        layer.p, carry.x, carry.buffers, scorer.prompt, layer.kind, policy=scorer.policy,
        config=scorer.config,
    )  # fmt: skip


def _observe(
    layer: Layer, rows: jax.Array, observer: Observer, context: Context, config: ModelConfig
) -> tuple[jax.Array, Queries]:
    return observe_layer(
        layer.p, rows, observer.block, observer.rope, layer.kind, context=context,
        lora=layer.lora, config=config,
    )  # fmt: skip


def choose_layer_step(
    scorer: Scorer, observer: Observer | None, pattern: SparsePattern | None, *, budget: int
) -> LayerStep:
    """The step for this prompt, policy and observer; `pattern` is None for dense reading."""
    policy, prompt, config, _ = scorer
    if observer is None:
        return partial(prompt_alone, scorer=scorer, window=policy.window_rows(budget))
    if pattern is not None:
        return partial(sparse_prompt, scorer=scorer, observer=observer, pattern=pattern)
    batch, tokens = prompt.positions.shape
    # `read_together` has no chunks over which statistics could be gathered.
    gathers = policy.init_stats(batch, tokens, config) is not None
    if prompt.chunk < tokens or gathers:
        return partial(observer_behind_prompt, scorer=scorer, observer=observer)
    return partial(observer_beside_prompt, scorer=scorer, observer=observer)
