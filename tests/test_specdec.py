"""The acceptance head of specdec: what it learns, against NumPy, and its files."""

import contextlib
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lookahead_jax.checkpoints.load import load
from lookahead_jax.cli.options import DraftingOptions
from lookahead_jax.modules.acceptance_head import (
    init_acceptance_head,
    load_acceptance_head,
    save_acceptance_head,
)
from lookahead_jax.train import head_run, specdec
from lookahead_jax.train.data import DataConfig, prepare
from tests import reference, tiny
from tests.drafted import draft_model, trusting_head
from tests.small_model_drafts import judged


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A target, a draft model, and rows for them."""
    folder = tmp_path_factory.mktemp("specdec")
    tiny.model_folder(folder / "target", num_hidden_layers=1, vocab_size=96)
    tiny.model_folder(folder / "draft", num_hidden_layers=1, vocab_size=96, intermediate_size=32)
    rows = [
        {"prompt": p, "response": p[3:8]}
        for p in tiny.prompts((12, 10, 14, 11, 13, 9, 12, 15), vocab=96)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(
        DataConfig(
            model=folder / "target", source=(folder / "rows.jsonl",), out=folder / "data",
            max_prompt=64,
        )
    )  # fmt: skip
    return folder


def restated_loss(head, batch, key, models, mixed, weight):
    """The loss of one micro-batch: drafts along the responses, which the draft model then reads."""
    (target, draft), (prompts, responses) = models, (np.asarray(a[0]) for a in batch)
    draw, mix = jax.random.split(jax.random.split(key, 1)[0])
    own = np.asarray(jax.random.bernoulli(mix, mixed, responses.shape))
    q = np.full((*responses.shape, target.config.vocab_size), -1.0, np.float32)
    p, texts = q.copy(), []
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        texts.append([*prompt[prompt >= 0], *response[response >= 0]])
        first, n = int((prompt >= 0).sum()), int((response >= 0).sum())
        for found, model in ((q, draft), (p, target)):
            chances = reference.next_tokens(model.params, model.config, texts[row])[0]
            found[row, :n] = chances[first - 1 : -1]
    drafted = np.asarray(jax.random.categorical(draw, jnp.asarray(q)))
    loss = total = 0.0
    for row, text in enumerate(texts):
        n = int((responses[row] >= 0).sum())
        mine, tokens = own[row, :n], drafted[row, :n]
        text = [*text[:-n], *np.where(mine, responses[row, :n], tokens)]
        hidden = reference.next_tokens(draft.params, draft.config, text)[1][-n:]
        at = np.arange(n), tokens
        chance = np.minimum(1, np.exp(p[row][:n][at] - q[row][:n][at]))
        accepted, rejected = (chance * ~mine, weight * (1 - chance) * ~mine)
        judgement = np.log(judged(head, hidden))
        loss -= (accepted * judgement[:, 1] + rejected * judgement[:, 0]).sum()
        total += accepted.sum() + rejected.sum()
    assert own.any()
    return loss / total


def test_a_run_that_is_stopped_leaves_a_head(folder, monkeypatch):
    """After one step, whose loss is as restated."""
    config = specdec.AcceptanceConfig(
        model=folder / "target", draft_model=folder / "draft", data=(folder / "data",),
        run=folder / "run", layers=2, epochs=2, batch=4, micro_batches=1, rate=3e-3, mixed=0.4,
    )  # fmt: skip
    losses, first, step = [], [], specdec.acceptance_step

    def watched(target, draft, state, batch, key, **settings):
        if not first:
            first.extend((jax.tree.map(np.asarray, state.modules), batch, key))
        return step(target, draft, state, batch, key, **settings)

    @contextlib.contextmanager
    def stop_requests():
        yield lambda step: True

    monkeypatch.setattr(specdec, "acceptance_step", watched)
    monkeypatch.setattr(head_run, "stop_requests", stop_requests)
    assert specdec.train(config, on_metrics=losses.append) is None
    models = load(folder / "target"), load(folder / "draft")
    head, batch, key = first
    expected = restated_loss(
        head, (batch.prompts, batch.responses), key, models, config.mixed, config.weight
    )
    assert [line["step"] for line in losses] == [0]
    assert losses[0]["loss"] == pytest.approx(expected, rel=1e-4)
    early = load_acceptance_head(config.run / head_run.HEAD_FILE, params=models[1].params)
    assert np.abs(early.blocks - head.blocks).max() > 1e-3


def test_settings_that_cannot_train_are_refused():
    paths = {"data": (Path("d"),), "run": Path("r"), "draft_model": Path("s")}
    for wrong, message in (
        ({"weight": -1.0}, "weight=-1.0 must be a positive number"),
        ({"mixed": 1.0}, "mixed=1.0 must be from 0 to below 1"),
        ({"layers": 0}, "layers must be at least 1, not 0"),
        ({"save_every": 0}, "save_every must be at least 1, not 0"),
    ):
        with pytest.raises(ValueError, match=message):
            specdec.AcceptanceConfig(**paths, **wrong)


def test_a_head_is_read_as_it_was_written_and_by_its_model_only(tmp_path):
    params, path = tiny.params(tiny.config()), tmp_path / "head.safetensors"
    head = trusting_head()
    save_acceptance_head(path, head, params=params)
    jax.tree.map(np.testing.assert_array_equal, load_acceptance_head(path, params=params), head)
    content = path.read_bytes()
    save_acceptance_head(path, head, params=params)
    assert path.read_bytes() == content
    names = safetensors.numpy.load_file(path)
    np.testing.assert_array_equal(names["model.1.linear.weight"], head.blocks[1].T)
    assert names["model.3.weight"].shape == (2, 32)
    options = DraftingOptions(
        drafter="specdec", draft_model=tmp_path, drafter_arg=(f"head={path}", "depth=4")
    )
    made = options.make(draft_model().model, draft_model().model)
    assert made.depth == 4
    jax.tree.map(np.testing.assert_array_equal, made.head, head)
    with pytest.raises(
        ValueError, match=r"head\.safetensors: this acceptance head was trained for a"
    ):
        load_acceptance_head(path, params=tiny.params(tiny.config(), 1))
    broken = dataclasses.replace(head, out=head.out.at[0, 0].set(jnp.nan))
    save_acceptance_head(path, broken, params=params)
    with pytest.raises(ValueError, match="NaN, infinite or"):
        draft_model("specdec", head=path)
    for content, complaint in (
        (b"{}", "is not a readable safetensors file"),
        (safetensors.numpy.save({"a": np.zeros(3)}), "describes no acceptance head"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=complaint):
            draft_model("specdec", head=path)


def test_what_specdec_lacks_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"needs a trained head.*drafter-arg head=FILE.*train specdec"
    ):
        draft_model("specdec")
    with pytest.raises(
        FileNotFoundError, match="does not exist: write one with lookahead train sp"
    ):
        draft_model("specdec", head=tmp_path / "none")
    with pytest.raises(ValueError, match="reads 16 values and the draft model has 32"):
        draft_model("specdec", head=init_acceptance_head(jax.random.key(0), 16, 1))
    with pytest.raises(ValueError, match="least=3 must be from 1 to depth=2"):
        draft_model("specdec", head=trusting_head(), least=3, depth=2)
    with pytest.raises(ValueError, match=r"threshold=1\.5 must be"):
        draft_model("specdec", head=trusting_head(), threshold=1.5)
