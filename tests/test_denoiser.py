"""The denoiser: its head and its trees against restatements, its files, and its training."""

import dataclasses
import functools
import itertools
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lookahead_jax as lk
from lookahead_jax.cli.options import DraftingOptions
from lookahead_jax.drafters.denoiser import Denoiser, LastHidden, likeliest_paths
from lookahead_jax.drafters.registry import make_drafter
from lookahead_jax.host.config_files import UsageError
from lookahead_jax.model.sharding import make_mesh, param_shardings
from lookahead_jax.modules.denoiser import (
    DenoiserHead,
    DenoiserHeadConfig,
    init_denoiser_head,
    place_in,
)
from lookahead_jax.modules.denoiser_files import load_denoiser_head, save_denoiser_head
from lookahead_jax.train import denoiser
from lookahead_jax.train.data import DataConfig, prepare
from lookahead_jax.train.head_run import HEAD_FILE
from lookahead_jax.train.optimizer import OptimizerConfig
from tests import tiny
from tests.drafted import draft_model

SIZES = DenoiserHeadConfig(tokens=4, width=16, heads=2, layers=2, vocabulary=None)
TARGET = draft_model().model


@functools.cache
def random_params():
    init = partial(init_denoiser_head, config=SIZES, hidden_size=TARGET.config.hidden_size)
    return jax.jit(init)(jax.random.key(0))


def head_of(vocabulary=None):
    """A random head whose norms are not the identity."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: jnp.asarray(a + 0.1 * rng.standard_normal(a.shape).astype(np.float32)),
        jax.tree.map(np.asarray, random_params()),
    )
    if vocabulary is None:
        return DenoiserHead(params, None, SIZES)
    sizes = dataclasses.replace(SIZES, vocabulary=len(vocabulary))
    return DenoiserHead(params, jnp.asarray(vocabulary, jnp.int32), sizes)


def norm(x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight


def turned(x):
    """Rotary positions of [places, heads, H], halves paired."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None] * 1e4 ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def restated(head, table, hidden, root, given):
    """`block_logits` of one row over all tokens, in NumPy."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), head.params)
    x = (
        norm(hidden, p["hidden_norm"]) @ p["hidden"]
        + norm(table[root], p["token_norm"]) @ p["root"]
    )
    x = np.stack([
        x + (norm(table[t], p["token_norm"]) @ p["given"] if t >= 0 else p["mask"][i])
        for i, t in enumerate(given)
    ])  # fmt: skip
    for i in range(head.config.layers):
        layer = {name: a[i] for name, a in p["layers"].items()}
        h = norm(x, layer["attn_norm"])
        q, k, v = (np.einsum("td,dnh->tnh", h, layer[name]) for name in "qkv")
        scores = np.einsum("tnh,snh->nts", turned(q), turned(k)) / np.sqrt(q.shape[-1])
        share = np.exp(scores - scores.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)  # over all places, later ones too
        x = x + np.einsum("nts,snh,nhd->td", share, v, layer["o"])
        h = norm(x, layer["mlp_norm"])
        gate = h @ layer["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ layer["up"])) @ layer["down"]
    return norm(x, p["final_norm"]) @ p["out"] @ table.T


def likeliest(chances, token, count):
    """The most probable paths over candidates [T, C] of each place, best first."""
    paths = {}
    for depth in range(1, len(token) + 1):
        for ranks in itertools.product(range(token.shape[1]), repeat=depth):
            path = tuple(int(token[i, r]) for i, r in enumerate(ranks))
            paths[path] = sum(float(chances[i, r]) for i, r in enumerate(ranks))
    return sorted(paths, key=lambda path: -paths[path])[:count]


def paths_of(tree, row):
    """The paths of a tree in the order of its nodes, without the root."""
    found = [()]
    tokens, parents = np.asarray(tree.tokens[row, 1:]), np.asarray(tree.parents[row, 1:])
    for token, parent in zip(tokens.tolist(), parents.tolist(), strict=True):
        found.append((*found[parent], token))
    return found[1:]


def test_the_tree_holds_the_likeliest_paths():
    rng = np.random.default_rng(0)
    chances = -np.sort(rng.exponential(1.0, (2, 3, 4)).astype(np.float32), axis=-1)
    token = np.stack([[rng.permutation(97)[:4] for _ in range(3)] for _ in range(2)])
    tree = jax.jit(likeliest_paths, static_argnums=3)(
        np.asarray([7, 8], np.int32), chances, token.astype(np.int32), 32
    )
    assert tree.tokens[:, 0].tolist() == [7, 8]
    for row in range(2):
        assert paths_of(tree, row) == likeliest(chances[row], token[row], 31)


def test_a_block_is_filled_surest_places_first():
    """Trees of three passes against the restatement; a row without a state drafts nothing."""
    vocabulary, passes = np.arange(0, 97, 3), 3
    drafter = Denoiser(target=TARGET, head=head_of(vocabulary), passes=passes)
    rng = np.random.default_rng(2)
    hidden = rng.standard_normal((3, 32)).astype(np.float32)
    root = jnp.asarray([9, 0, 20], jnp.int32)

    state = LastHidden(jnp.asarray(hidden), jnp.asarray([True, True, False]))
    _, tree = jax.jit(drafter.propose, static_argnums=3)(drafter.weights, state, root, 8)
    assert tree.tokens[2].tolist() == [20] + [-1] * 7
    table = np.asarray(TARGET.params["embed"], np.float64)
    for row in range(2):
        given, kept = [-1] * 4, {}
        for done in range(1, passes + 1):
            raw = restated(head_of(), table, hidden[row], int(root[row]), given)[:, vocabulary]
            logs = raw - np.log(np.exp(raw).sum(-1, keepdims=True))
            kept |= {i: logs[i] for i in range(4) if given[i] < 0}
            order = sorted(range(4), key=lambda i: (given[i] < 0, -kept[i].max()))
            chosen = order[: done * 4 // passes]
            given = [int(vocabulary[kept[i].argmax()]) if i in chosen else -1 for i in range(4)]
        best = [np.argsort(-kept[i])[:8] for i in range(4)]
        chances = np.stack([kept[i][best[i]] for i in range(4)])
        assert paths_of(tree, row) == likeliest(chances, vocabulary[np.stack(best)], 7)


def test_a_file_holds_the_head_of_one_model(tmp_path):
    head, path = head_of([1, 5, 90]), tmp_path / "head.safetensors"
    save_denoiser_head(path, head, params=TARGET.params)
    found = load_denoiser_head(path, params=TARGET.params)
    assert found.config == head.config
    jax.tree.map(np.testing.assert_array_equal, found, head)
    options = DraftingOptions(drafter="denoiser", drafter_arg=(f"head={path}", "passes=2"))
    assert options.make(None, TARGET).passes == 2
    other = tiny.params(TARGET.config, 1)
    with pytest.raises(ValueError, match="trained for another base model"):
        load_denoiser_head(path, params=other)
    with pytest.raises(FileNotFoundError, match="lookahead train denoiser"):
        load_denoiser_head(tmp_path / "none", params=other)
    for content, message in (
        (b"text", "not a readable safetensors file"),
        (safetensors.numpy.save({"a": np.zeros(1)}), "describes no head of the denoiser"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_denoiser_head(path, params=TARGET.params)
    half = jax.tree.map(lambda a: a.astype(jnp.float16), TARGET.params)
    for factor, params in ((np.nan, TARGET.params), (1e6, half)):
        broken = jax.tree.map(lambda a: a * factor, head.params)  # noqa: B023
        save_denoiser_head(path, head.replace(params=broken), params=TARGET.params)
        with pytest.raises(ValueError, match="NaN, infinite or too large for float"):
            load_denoiser_head(path, params=params)
    for ids in ([1, 5, 97], [5, 1, 90], [-1, 5, 90], [5, 5, 90]):
        wrong = head.replace(vocabulary=jnp.asarray(ids, jnp.int32))
        save_denoiser_head(path, wrong, params=TARGET.params)
        with pytest.raises(ValueError, match="is not 3 ascending token ids below 97"):
            load_denoiser_head(path, params=TARGET.params)


def test_a_head_in_memory_goes_where_its_target_is():
    placed = param_shardings(TARGET.config, make_mesh())
    target = dataclasses.replace(TARGET, params=jax.device_put(TARGET.params, placed))
    head, _ = Denoiser(target=target, head=head_of()).weights
    assert all(len(a.devices()) == 4 for a in jax.tree.leaves(head))


def test_tokens_have_places_in_a_vocabulary():
    tokens = jnp.asarray([-1, 0, 2, 5, 6, 9, 10], jnp.int32)
    assert place_in(jnp.asarray([2, 5, 9], jnp.int32), tokens).tolist() == [-1, -1, 0, 1, -1, 2, -1]
    assert place_in(None, tokens) is tokens


def test_what_a_denoiser_lacks_is_named():
    lacks_head = r"needs a trained head.*head=FILE.*--drafter-arg head=FILE.*train denoiser"
    for given in ({}, {"target": TARGET}):
        with pytest.raises(ValueError, match=lacks_head):
            make_drafter("denoiser", **given)
    with pytest.raises(ValueError, match=r"needs the model that it drafts for.*target=MODEL"):
        make_drafter("denoiser", head=head_of())
    given = {"target": TARGET, "head": head_of()}
    with pytest.raises(ValueError, match="denoiser: passes=5 must be 1 to 4"):
        make_drafter("denoiser", passes="5", **given)
    with pytest.raises(ValueError, match="denoiser: passes=few is not an integer"):
        make_drafter("denoiser", passes="few", **given)
    with pytest.raises(UsageError, match="--drafter-arg target: that is no setting"):
        DraftingOptions(drafter="denoiser", drafter_arg=("target=DIR",)).make(None, TARGET)
    with pytest.raises(ValueError, match="unknown drafter 'nothing'; known: none, trie"):
        DraftingOptions(drafter="nothing").load(None)
    with pytest.raises(ValueError, match="made for another model"):
        make_drafter("denoiser", **given).init(1, 8, tiny.config(vocab_size=98))


def test_a_run_learns_a_text(tmp_path):
    """Loss falls, and drafts are longer than a random head's."""
    folder = tmp_path / "model"
    tiny.model_folder(folder, num_hidden_layers=1)
    model = lk.load(folder)
    prompts = tiny.prompts((12, 12, 12, 12))
    sizes = dataclasses.replace(SIZES, vocabulary=80)

    def decoded(head):
        return lk.generate(
            model, prompts, policy=lk.make_policy("full"), max_new_tokens=24, eos_ids=(),
            drafter=make_drafter("denoiser", target=model, head=head), draft_nodes=8,
        )  # fmt: skip

    fresh = DenoiserHead(random_params(), jnp.arange(80, dtype=jnp.int32), sizes)
    before = decoded(fresh)
    rows = [{"prompt": p, "response": r} for p, r in zip(prompts, before.tokens, strict=True)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = tmp_path / "data"
    prepare(DataConfig(model=folder, source=(str(tmp_path / "rows.jsonl"),), out=data))

    config = denoiser.DenoiserConfig(
        model=folder, data=(data,), run=tmp_path / "run", head=sizes, batch=4, places=16,
        steps=20, optimizer=OptimizerConfig(rate=2e-2, warmup=2, clip=1.0), log_every=20,
    )  # fmt: skip
    lines = []
    denoiser.train(config, on_metrics=lines.append)
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert lines[-1]["accepted"] > lines[0]["accepted"]
    after = decoded(config.run / HEAD_FILE)
    assert after.tokens == before.tokens
    assert after.drafting.mean_accepted > 1.5 * before.drafting.mean_accepted
