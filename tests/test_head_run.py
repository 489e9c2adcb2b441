"""The run of a drafter's head, with a head of three numbers: broken off, stopped, and repeated."""

import contextlib
import dataclasses
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lookahead_jax as lk
from lookahead_jax.model.sharding import make_mesh
from lookahead_jax.train import head_run
from lookahead_jax.train.data import DataConfig, prepare
from lookahead_jax.train.head_run import HEAD_FILE, HeadRunConfig, HeadTraining, train_head
from lookahead_jax.train.optimizer import OptimizerConfig, make_optimizer
from lookahead_jax.train.step import next_state
from tests import tiny

TOTAL = 6
OPTIMIZER = OptimizerConfig(rate=0.1, warmup=0)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run on six steps of four rows."""
    folder = tmp_path_factory.mktemp("head_run")
    tiny.model_folder(folder / "model", num_hidden_layers=1, vocab_size=96)
    for name, seed in (("data", 0), ("other", 1)):
        lengths = (12, 10, 14, 11, 13, 9, 12, 15)[: 8 - seed]
        rows = [{"prompt": p, "response": p[3:8]} for p in tiny.prompts(lengths, vocab=96)]
        source = folder / f"{name}.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        prepare(DataConfig(model=folder / "model", source=(source,), out=folder / name))
    return HeadRunConfig(
        model=folder / "model", data=(folder / "data",), run=folder / "straight", batch=4,
        save_every=3, log_every=1,
    )  # fmt: skip


@jax.jit
def toy_step(state, batch, key, scale=1.0):
    """A head that learns random numbers, which depend on the step's rows."""

    def loss_of(weights):
        wanted = batch.responses.sum().astype(jnp.float32) * jax.random.uniform(key, (3,))
        return scale * jnp.square(weights - wanted).sum()

    loss, gradient = jax.value_and_grad(loss_of)(state.modules)
    return next_state(state, make_optimizer(OPTIMIZER, TOTAL), loss, gradient)


def run(config, *, step=toy_step, on_metrics=None):
    def training(model, data):
        return HeadTraining(
            total=TOTAL, optimizer=OPTIMIZER, identity={},
            start=lambda key: jax.random.normal(key, (3,)), step=step, head=np.asarray,
            save=lambda path, head: path.write_bytes(head.tobytes()),
        )  # fmt: skip

    mesh = make_mesh(devices=jax.devices()[:1])
    return train_head(config, training, mesh=mesh, micro_batches=1, on_metrics=on_metrics)


def losses(config):
    lines = (config.run / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]


def test_a_run_ends_the_same_however_it_is_interrupted(config, monkeypatch, capsys):
    head = run(config)
    assert (config.run / HEAD_FILE).read_bytes() == head.tobytes()
    assert len(losses(config)) == TOTAL

    killed = dataclasses.replace(config, run=config.run.with_name("killed"))

    def crash(line):
        if line["step"] == 4:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(killed, on_metrics=crash)

    @contextlib.contextmanager
    def stop_requests():
        yield lambda step: step == 1

    stopped = dataclasses.replace(config, run=config.run.with_name("stopped"))
    monkeypatch.setattr(head_run, "stop_requests", stop_requests)
    assert run(stopped) is None
    assert "stopped after step 2 of 6; " in capsys.readouterr().err
    early = np.frombuffer((stopped.run / HEAD_FILE).read_bytes(), np.float32)
    assert not np.array_equal(early, head)

    for again in (killed, stopped):
        np.testing.assert_array_equal(run(again), head)
        assert losses(again) == losses(config)
        assert (again.run / HEAD_FILE).read_bytes() == head.tobytes()
    (config.run / HEAD_FILE).unlink()  # as in a run that was killed before it was written
    np.testing.assert_array_equal(run(config), head)
    assert (config.run / HEAD_FILE).read_bytes() == head.tobytes()


def test_a_run_belongs_to_its_data(config):
    config = dataclasses.replace(config, run=config.run.with_name("own"))
    run(config)
    other = dataclasses.replace(config, data=(config.run.with_name("other"),))
    with pytest.raises(ValueError, match=r"belongs to another run \(data differ\)"):
        run(other)


def test_steps_that_are_not_finite_are_skipped(config, monkeypatch):
    monkeypatch.setattr(head_run, "_PATIENCE", 2)
    config = dataclasses.replace(config, run=config.run.with_name("skipped"))
    heads, lines = [], []

    def spoilt(state, batch, key):
        heads.append(np.asarray(state.modules))
        scale = float("nan") if len(heads) in (2, 4, 5) else 1.0
        return toy_step(state, batch, key, scale)

    with pytest.raises(FloatingPointError, match="2 steps in a row"):
        run(config, step=spoilt, on_metrics=lines.append)
    assert [line["skipped"] for line in lines] == [0, 1, 1, 2, 3]
    changed = [not np.array_equal(a, b) for a, b in itertools.pairwise(heads)]
    assert changed == [True, False, True, False]


def test_the_embedded_model_has_a_name(config, monkeypatch):
    model, asked = lk.load(config.model), []
    monkeypatch.setattr(head_run, "load", lambda folder, **_: asked.append(folder) or model)
    for folder in (None, Path("embedded")):
        head_run.load_model(folder, dtype=None, mesh=make_mesh())
    assert asked == [lk.EMBEDDED_MODEL] * 2
