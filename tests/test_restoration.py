"""Lookahead tokens that stay in the cache, against a float64 restatement; their loss and files."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lookahead_jax as lk
from lookahead_jax.checkpoints.load import Model, load
from lookahead_jax.decoding.eviction import DecodeEviction, evict, pinned_memory
from lookahead_jax.eval.agreement.forced import forced
from lookahead_jax.generation.settings import EvictionSettings
from lookahead_jax.model.sharding import make_mesh
from lookahead_jax.modules.definition import LookaheadConfig, observer_block, staying_entries
from lookahead_jax.modules.files import CONFIG_FILE, load_modules, save_modules
from lookahead_jax.policies.lookaheadkv import LookaheadKV
from lookahead_jax.prompts.read import read_prompt, read_prompt_in_pieces
from lookahead_jax.train import lookahead
from lookahead_jax.train.checkpoints import digests
from lookahead_jax.train.data import DataConfig, prepare
from lookahead_jax.train.loss import LossConfig, check_loss
from lookahead_jax.train.objective import loss_parts
from lookahead_jax.train.optimizer import OptimizerConfig, make_optimizer
from tests import reference, tiny
from tests.drafted import NO_DEFAULTS
from tests.test_policies import lookahead_modules

MODEL = tiny.config()
PARAMS = tiny.params(MODEL)
PROMPTS = tiny.prompts((33, 16, 5))
M, BUDGET = 4, 12
POLICY = LookaheadKV(window=2, pool="max", kernel=3)


@functools.cache
def modules(model=MODEL):
    made = lookahead_modules(model)
    return made.replace(config=dataclasses.replace(made.config, memory=True))


def restated(prompt, answer, budget, made, kept=None, policy=POLICY):
    """Full pass over prompt, memory and answer, whose rows see the memory and what is kept.

    -> layers, log probabilities after each token of the answer [Y, V], kept [L][K] positions.
    """
    t, scale = len(prompt), made.config.alpha / made.config.rank
    table = np.asarray(PARAMS["embed"], np.float64)
    lora, own = made.lora, np.asarray(made.embeddings, np.float64)
    if kept is None:
        kept, (layers, _) = [], reference.run(PARAMS, MODEL, prompt, own, lora, scale)
        last = np.arange(max(0, t - policy.window), t)
        for layer in layers:
            scores = reference.observed(
                layer, t, np.arange(t, t + M), t, policy.pool, policy.kernel
            )
            scores[:, last] = np.inf
            kept.append([reference.best(row, budget - M, 0) for row in scores])
    gone = [
        [np.where(np.isin(np.arange(t), head), 10**6, t + M) for head in layer] for layer in kept
    ]
    rows = np.concatenate([own, table[np.array(answer, int)]])
    layers, hidden = reference.run(PARAMS, MODEL, prompt, rows, lora, scale, gone=gone, lora_rows=M)
    logits = hidden[[t - 1, *range(t + M, t + M + len(answer))]] @ table.T
    logits -= logits.max(-1, keepdims=True)
    return layers, logits - np.log(np.exp(logits).sum(-1, keepdims=True)), kept


def test_the_answer_reads_the_kept_entries_and_the_memory():
    """float32 against float64: a few 1e-5 of log probabilities."""
    model = Model(
        params=PARAMS,
        config=MODEL,
        tokenizer=None,
        generation=NO_DEFAULTS,
        path=Path(),
    )
    made = lk.generate(
        model, PROMPTS, policy=POLICY, budget=BUDGET, lookahead=modules(), max_new_tokens=6,
        eos_ids=(), logprobs=0,
    )  # fmt: skip
    assert made.logprobs is not None
    for row, prompt in enumerate(PROMPTS):
        answer = made.tokens[row]
        _, chances, kept = restated(prompt, answer[:-1], BUDGET, modules())
        assert answer == chances.argmax(-1).tolist()
        np.testing.assert_allclose(made.logprobs[row].chosen, chances.max(-1), atol=2e-4)
        for heads, wanted in zip(made.kept[:, row], kept, strict=True):
            for head, positions in zip(heads, wanted, strict=True):
                assert head[head >= 0].tolist() == positions.tolist()


@functools.cache
def opened():
    """The cut cache of the prompts, by the program that `generate` uses."""
    tokens = jnp.asarray(lk.pad_batch(PROMPTS, config=MODEL))
    return read_prompt(
        PARAMS, tokens, config=MODEL, policy=POLICY, budget=BUDGET, new_tokens=8,
        modules=modules(), known_tokens=jnp.zeros(3, jnp.int32),
    ).cache  # fmt: skip


def test_the_memory_is_in_the_budget_and_the_text_goes_on_behind_it():
    cache = opened()
    for row, prompt in enumerate(PROMPTS):
        t = len(prompt)
        layers, _, kept = restated(prompt, [], BUDGET, modules())
        assert int(cache.next_pos[row]) == t + M
        assert int(cache.rope_span[row]) == t
        for i, layer in enumerate(layers):
            for head in range(MODEL.num_kv_heads):
                filled = int(cache.length[i, row, head])
                assert filled == min(BUDGET, t + M)
                wanted = [*kept[i][head], *range(t, t + M)]
                assert cache.pos[i, row, head, :filled].tolist() == wanted
                for ours, theirs in ((cache.k, layer.k), (cache.v, layer.v)):
                    np.testing.assert_allclose(
                        ours[i, row, head, :filled], theirs[head, wanted], atol=1e-4
                    )


def test_pieces_leave_the_same_memory():
    tokens = jnp.asarray(lk.pad_batch(PROMPTS, config=MODEL))
    pieces = read_prompt_in_pieces(
        PARAMS, tokens, config=MODEL, policy=POLICY, budget=BUDGET, new_tokens=8,
        modules=modules(), cache_dtype="int8",
    )  # fmt: skip
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            cache = end.value.prefilled.cache
            break
    plain = opened()
    np.testing.assert_array_equal(cache.pos, plain.pos)
    np.testing.assert_array_equal(cache.next_pos, plain.next_pos)
    filled = np.asarray(plain.pos) >= 0
    for name in ("k", "v"):
        rounded = np.asarray(getattr(cache, name), np.float32) * np.asarray(
            getattr(cache, f"{name}_scale")[..., None]
        )
        exact = np.asarray(getattr(plain, name))
        error = np.abs(rounded - exact).max(-1) / np.abs(exact).max(-1).clip(1e-9)
        assert error[filled].max() < 0.01  # half a step of 1 / 127


def test_a_cut_while_decoding_leaves_the_memory():
    eviction = DecodeEviction(policy=POLICY, budget=BUDGET, interval=1, staying=M)
    lengths = jnp.asarray([len(prompt) for prompt in PROMPTS], jnp.int32)
    pinned = pinned_memory(jnp.zeros((3, 64), bool), lengths, M)
    cache = opened()
    text = jnp.asarray([[5, 9, 3, 8, 1, 2]] * 3, jnp.int32)
    longer, _ = lk.extend(PARAMS, text, cache.fork(1), config=MODEL)
    cut, _ = evict(
        PARAMS, longer, None, emitted=text, count=jnp.full(3, 7), new=jnp.ones(3, jnp.int32),
        modules=modules(), config=MODEL, eviction=eviction, pinned=pinned,
    )  # fmt: skip
    for row, prompt in enumerate(PROMPTS):
        t = len(prompt)
        for before, after in zip(longer.pos[:, row], cut.pos[:, row], strict=True):
            for old, new in zip(np.asarray(before), np.asarray(after), strict=True):
                entries = new[new >= 0].tolist()
                assert len(entries) == min(BUDGET, t + M + 6)
                assert set(range(t, t + M)) <= set(entries) <= set(old.tolist())
                assert {t + M + 4, t + M + 5} <= set(entries)  # the policy's window
    # What the first cut may keep, and a later one, with the tokens until then.
    assert eviction.room(64, 50, MODEL) == 1
    assert eviction.room(5, 50, MODEL) == BUDGET - 5 - M + 1


def test_a_forced_answer_is_read_beside_the_memory():
    """`eval agreement --evict-every` cuts as `generate` does; float32, a few 1e-6."""
    model = Model(
        params=PARAMS, config=MODEL, tokenizer=None, generation=NO_DEFAULTS, path=Path()
    )  # fmt: skip
    setting = dict(policy=POLICY, budget=8, evict_every=6)
    made = lk.generate(
        model, PROMPTS[:1], lookahead=modules(), max_new_tokens=16, eos_ids=(), logprobs=0,
        **setting,
    )  # fmt: skip
    (answer,) = made.tokens
    found = forced(model, PROMPTS[0], answer, EvictionSettings(modules=modules(), **setting))
    table = np.asarray(PARAMS["embed"], np.float64)
    logits = np.concatenate([found.first, np.asarray(found.hidden[0, :15]) @ table.T])
    chances = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = chances[np.arange(16), answer]
    np.testing.assert_allclose(chosen, made.logprobs[0].chosen, atol=2e-4)


def test_files_with_and_without_a_memory(tmp_path):
    for memory in (True, False):
        made = modules().replace(config=dataclasses.replace(modules().config, memory=memory))
        save_modules(tmp_path, made, params=PARAMS)
        described = json.loads((tmp_path / CONFIG_FILE).read_text())
        assert described["format"] == (2 if memory else 1)
        assert ("memory" in described) == memory
        loaded = load_modules(tmp_path, params=PARAMS, config=MODEL)
        assert loaded.config == made.config
        assert staying_entries(POLICY, loaded) == loaded.config.staying == (M if memory else 0)
    assert staying_entries(lk.make_policy("snapkv"), modules()) == 0
    described |= {"format": 2, "memory": "yes"}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(described))
    with pytest.raises(ValueError, match="memory must be True or False, not 'yes'"):
        load_modules(tmp_path, params=PARAMS, config=MODEL)


def test_sizes_that_leave_nothing_are_refused():
    tokens = jnp.asarray(lk.pad_batch(PROMPTS, config=MODEL))
    shared = dict(config=MODEL, policy=POLICY, new_tokens=1, modules=modules())
    for read in (read_prompt, lambda *a, **k: next(read_prompt_in_pieces(*a, **k))):
        with pytest.raises(ValueError, match=r"budget 4 leaves no entry .* beside the 4 tokens"):
            read(PARAMS, tokens, budget=M, **shared)
    pinned = jnp.zeros(tokens.shape, bool).at[0, :10].set(True)
    with pytest.raises(ValueError, match=r"is 12 entries .*, 4 of them for the modules' memory"):
        read_prompt(PARAMS, tokens, budget=BUDGET, pinned=pinned, **shared)
    with pytest.raises(ValueError, match="128 cache slots cannot hold the 132"):
        lk.prefill(
            PARAMS, jnp.zeros((1, 256), jnp.int32), config=MODEL, policy=POLICY, budget=128,
            slots=128, observer_stays=True,
            observer=observer_block(modules(), jnp.asarray([256]), jnp.asarray([256])),
        )  # fmt: skip
    with pytest.raises(ValueError, match="only the tokens of lookahead modules can stay"):
        lk.prefill(
            PARAMS, tokens, config=MODEL, policy=lk.make_policy("snapkv"), budget=8, slots=128,
            observer_stays=True,
        )  # fmt: skip
    plain = dataclasses.replace(modules().config, memory=False)
    with pytest.raises(ValueError, match="set memory of the modules to True"):
        check_loss(plain, LossConfig(memory=1.0))
    with pytest.raises(ValueError, match="a memory, which nothing trains"):
        check_loss(modules().config, LossConfig())
    with pytest.raises(ValueError, match="exceed the 4 tokens of the memory and the window of 2"):
        check_loss(modules().config, LossConfig(memory=1.0, budgets=(6, 9), policy=POLICY))
    for fields, error in (
        ({"memory": -1.0}, "loss memory -1.0 must be 0 or"),
        ({"budgets": ()}, "give at least one"),
        ({"budgets": (0,)}, "a budget of the loss"),
    ):
        with pytest.raises(ValueError, match=error):
            LossConfig(**fields)


RESPONSES = [*tiny.prompts((7, 2), seed=3), []]
LOSS = LossConfig(memory=0.5, budgets=(9, 12, 20), policy=POLICY)


def padded(rows):
    width = max(map(len, rows))
    return jnp.asarray([row + [-1] * (width - len(row)) for row in rows], jnp.int32)


@functools.cache
def gradient_of_memory():
    rows = padded(PROMPTS), padded(RESPONSES)

    def loss(made):
        parts = loss_parts([made], PARAMS, *rows, config=MODEL, losses=[LOSS])
        return parts.memory[0].sum(), (parts, parts.total([LOSS]))

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def divergence(row, made, kept=None):
    """KL(full || cut) of the next token after each token of a response but its last; kept."""
    prompt, response = PROMPTS[row], RESPONSES[row]
    budget = LOSS.budgets[(row + sum(map(len, PROMPTS))) % 3]
    _, cut, kept = restated(prompt, response, budget, made, kept)
    full = reference.next_tokens(PARAMS, MODEL, [*prompt, *response])[0][len(prompt) :]
    values = (np.exp(full) * (full - cut[1:])).sum(-1)[:-1]
    return values.mean() if len(values) else 0.0, kept


def slope_along(name, way, kept, step=1e-4):
    """The change of all divergences along `way` of a field, by differences in float64."""
    made = modules()

    def moved(by):
        new = jax.tree.map(
            lambda a, d: np.asarray(a, np.float64) + by * d, getattr(made, name), way
        )
        with_new = made.replace(**{name: new})
        return sum(divergence(row, with_new, kept[row])[0] for row in range(2))

    return (moved(step) - moved(-step)) / (2 * step)


def test_the_loss_is_the_divergence_on_the_cut_cache_and_the_selection_has_no_gradient():
    """Values to float32; directional derivatives against differences in float64, 1e-3 of them."""
    made = modules()
    (_, (parts, total)), gradient = gradient_of_memory()(made)
    wanted = [divergence(row, made) for row in range(2)]
    np.testing.assert_allclose(parts.memory[0], [*(v for v, _ in wanted), 0.0], rtol=1e-4)
    np.testing.assert_allclose(total, parts.importance + 0.5 * parts.memory, rtol=1e-6)
    rng = np.random.default_rng(0)
    for name in ("embeddings", "lora"):
        way = jax.tree.map(lambda a: rng.standard_normal(a.shape), getattr(made, name))

        slope = slope_along(name, way, [kept for _, kept in wanted])
        ours = sum(
            float((np.asarray(g) * d).sum())
            for g, d in zip(*map(jax.tree.leaves, (getattr(gradient, name), way)), strict=True)
        )
        np.testing.assert_allclose(ours, slope, rtol=2e-3)


def test_a_run_lowers_the_divergence_and_starts_from_trained_modules(tmp_path):
    """With stored base forwards, whose files do not depend on the memory."""
    tiny.model_folder(tmp_path / "model", num_hidden_layers=1, vocab_size=96)
    rows = [{"prompt": p, "response": p[3:9]} for p in tiny.prompts((30, 20, 25, 31), vocab=96)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = (str(tmp_path / "rows.jsonl"),)
    prepare(DataConfig(model=tmp_path / "model", source=source, out=tmp_path / "data"))
    sizes = LookaheadConfig(
        tokens=3, rank=2, alpha=4.0, targets=("q", "v"), init="table", memory=True
    )
    config = lookahead.TrainConfig(
        model=tmp_path / "model", data=(tmp_path / "data",), run=tmp_path / "run", modules=sizes,
        optimizer=OptimizerConfig(rate=3e-2, warmup=1, clip=1.0), steps=12, batch=4,
        loss=LossConfig(memory=1.0, budgets=(8,)), forwards=tmp_path / "forwards", log_every=1,
    )  # fmt: skip
    assert lookahead.train(config) is not None
    lines = [json.loads(line) for line in (config.run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["loss"] == pytest.approx(line["importance_loss"] + line["memory_loss"])
    assert lines[-1]["memory_loss"] < 0.8 * lines[0]["memory_loss"]
    names = {path.name for path in config.forwards.glob("*.npz")}
    with np.load(config.forwards / min(names)) as stored:
        assert set(stored) == {"k", "v", "mean", "max"}

    model, mesh = load(config.model), make_mesh(data=None, fsdp=1, tensor=1)
    again = dataclasses.replace(config, start=config.run / "modules")
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = lookahead._start(again, model, optimizer, mesh)
    trained = load_modules(config.run / "modules", params=model.params, config=model.config)
    assert digests(state.modules) == digests(trained)
    wrong = dataclasses.replace(again, modules=dataclasses.replace(sizes, tokens=2))
    with pytest.raises(ValueError, match=r"modules have other sizes than the run: .*'tokens': 3"):
        lookahead._start(wrong, model, optimizer, mesh)
