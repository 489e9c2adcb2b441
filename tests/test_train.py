"""Training: one step on many devices, interruption and damage without a trace, configuration."""

import dataclasses
import json
import logging
import os
import shutil
import signal
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lookahead_jax.checkpoints.load import load
from lookahead_jax.host.config_files import UsageError
from lookahead_jax.host.files import make_folder
from lookahead_jax.host.lock import folder_lock
from lookahead_jax.model.sharding import make_mesh, param_shardings
from lookahead_jax.modules.definition import LookaheadConfig, init_modules
from lookahead_jax.modules.files import load_modules
from lookahead_jax.train import forwards, lookahead, training_data
from lookahead_jax.train.batches import Batch
from lookahead_jax.train.checkpoints import Checkpoints, digests
from lookahead_jax.train.data import DataConfig, prepare
from lookahead_jax.train.embedded import base
from lookahead_jax.train.loss import LossConfig
from lookahead_jax.train.metrics import MetricsLog
from lookahead_jax.train.optimizer import OptimizerConfig, learning_rate
from lookahead_jax.train.step import compile_step, init_state, train_step
from tests import tiny

MODULES = LookaheadConfig(tokens=3, rank=2, alpha=4.0, targets=("q", "v", "down"), init="table")


def small_batch(model, micro_batches):
    prompts = tiny.batch((30, 20, 16, 25, 31, 9, 12, 18), model)
    responses = np.array(tiny.batch((4,) * 8, model, seed=1))[:, :4]
    responses[2] = -1  # a row that does not count
    split = partial(jnp.reshape, shape=(micro_batches, 8 // micro_batches, -1))
    return Batch(split(prompts), split(jnp.asarray(responses)))


def test_a_step_is_the_same_on_four_devices_in_two_passes():
    """Float32 sums in another order; what follows from a gradient differs by its rounding."""
    model = tiny.config(num_hidden_layers=2, vocab_size=96)
    params = tiny.params(model)
    optimizer = optax.sgd(0.5)

    def fresh():
        return init_state(init_modules(jax.random.key(0), MODULES, model, params=params), optimizer)

    plain = jax.jit(partial(train_step, config=model, optimizer=optimizer))
    expected, values = plain(params, fresh(), small_batch(model, 1))
    assert values["rows"] == 7

    mesh = make_mesh(fsdp=2, tensor=2)
    sharded = jax.device_put(params, param_shardings(model, mesh))
    step = compile_step(mesh, config=model, optimizer=optimizer)
    state = jax.device_put(fresh(), NamedSharding(mesh, PartitionSpec()))
    given = state.modules.embeddings
    state, many = step(sharded, state, small_batch(model, 2))
    assert given.is_deleted()
    assert state.modules.embeddings.sharding.is_fully_replicated
    for name, value in values.items():
        np.testing.assert_allclose(many[name], value, rtol=1e-5, err_msg=name)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), expected.modules, fresh().modules)
    for got, want, size in zip(
        *map(jax.tree.leaves, (state.modules, expected.modules, moved)), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * size + 1e-6)

    losses = [values["loss"]]
    for _ in range(3):
        expected, values = plain(params, expected, small_batch(model, 1))
        losses.append(values["loss"])
    assert losses == sorted(losses, reverse=True)

    broken = expected.replace(
        modules=expected.modules.replace(embeddings=expected.modules.embeddings * np.nan)
    )
    after, values = plain(params, broken, small_batch(model, 1))
    assert (values["skipped"], values["skipped_in_a_row"]) == (1, 1)
    assert digests((after.modules, after.optimizer)) == digests((broken.modules, broken.optimizer))


@pytest.fixture(scope="module")
def run_config(tmp_path_factory):
    """A model, rows for it, and a run of four steps."""
    folder = tmp_path_factory.mktemp("train")
    tiny.model_folder(folder / "model", num_hidden_layers=1, vocab_size=96)
    rows = [
        {"prompt": p, "response": p[3:8]}
        for p in tiny.prompts((30, 20, 25, 31, 17, 22, 28), vocab=96)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = (folder / "rows.jsonl",)
    prepare(DataConfig(model=folder / "model", source=source, out=folder / "data", max_prompt=64))
    return lookahead.TrainConfig(
        model=folder / "model", data=(folder / "data",), run=folder / "straight",
        modules=MODULES, optimizer=OptimizerConfig(rate=1e-2, warmup=1, clip=1.0),
        steps=4, batch=4, micro_batches=2, save_every=1, log_every=1,
        mesh=lookahead.MeshConfig(tensor=2),
    )  # fmt: skip


def read_metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def test_a_run_survives_sigterm_bit_for_bit(run_config, capsys):
    straight = lookahead.train(run_config)
    assert [line["step"] for line in read_metrics(run_config.run)] == [0, 1, 2, 3]

    config = dataclasses.replace(run_config, run=run_config.run.with_name("interrupted"))

    def terminate(line):
        if line["step"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    assert lookahead.train(config, on_metrics=terminate) is None
    assert "stopped after step 2 of 4; " in capsys.readouterr().err
    model = load(config.model)
    early = load_modules(config.run / "modules", params=model.params, config=model.config)
    assert digests(early) != digests(straight)
    resumed = lookahead.train(config)
    assert digests(resumed) == digests(straight)
    assert read_metrics(config.run) == read_metrics(run_config.run)

    exported = load_modules(config.run / "modules", params=model.params, config=model.config)
    assert digests(exported) == digests(straight)
    with pytest.raises(ValueError, match=r"belongs to another run \(batch differ\)"):
        lookahead.train(dataclasses.replace(config, batch=2, micro_batches=1))


def test_a_run_on_shards_in_the_making_waits_for_them(run_config, tmp_path, monkeypatch):
    """And is the run on all of them: its first epoch follows the shards, which are recorded."""
    monkeypatch.setattr(training_data, "GROUP", 1)
    rows = [{"prompt": p, "response": p[3:8]} for p in tiny.prompts((30, 20, 25, 31) * 3, vocab=96)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    making = DataConfig(
        model=run_config.model, source=(str(tmp_path / "rows.jsonl"),), out=tmp_path / "data",
        shard_rows=4,
    )  # fmt: skip
    prepare(making)
    config = dataclasses.replace(
        run_config, data=(making.out,), run=tmp_path / "straight", shards=3, steps=5
    )
    straight = lookahead.train(config)

    (making.out / "complete.json").unlink()
    for shard in (1, 2):
        (making.out / f"shard-{shard:05d}").rename(tmp_path / str(shard))
    early = dataclasses.replace(config, run=tmp_path / "early")
    with pytest.raises(lookahead.RowsMissing, match="has rows for 1 of 5 steps so far: make more"):
        lookahead.train(early)
    assert (early.run / "modules").is_dir()
    for shard in (2, 1):  # without the second, the third does not count
        with pytest.raises(lookahead.RowsMissing, match="rows for 1 of 5"):
            lookahead.train(early)
        (tmp_path / str(shard)).rename(making.out / f"shard-{shard:05d}")
    assert digests(lookahead.train(early)) == digests(straight)
    assert read_metrics(early.run) == read_metrics(config.run)
    with pytest.raises(ValueError, match=r"belongs to another run \(shards differ\)"):
        lookahead.train(dataclasses.replace(early, shards=2))
    for wrong in ({"shards": 0}, {"shards": 2, "data": (making.out, making.out)}):
        with pytest.raises(ValueError, match="give one folder, and at least 1"):
            lookahead.train(dataclasses.replace(early, run=tmp_path / "wrong", **wrong))
    with pytest.raises(ValueError, match="no finished shard"):
        lookahead.train(dataclasses.replace(early, data=(tmp_path,), run=tmp_path / "wrong"))


def test_known_base_forwards_train_the_same_modules(run_config, tmp_path, monkeypatch):
    """Keys and values are rounded to float16, 5e-4 of their size; each row is run once."""
    lookahead.train(run_config)
    plain = [line["loss"] for line in read_metrics(run_config.run)]
    config = dataclasses.replace(run_config, run=tmp_path / "first", forwards=tmp_path / "forwards")
    modules = lookahead.train(config)
    kept = {path: path.stat().st_mtime_ns for path in config.forwards.glob("*.npz")}
    assert len(kept) == 7
    np.testing.assert_allclose(
        [line["loss"] for line in read_metrics(config.run)], plain, rtol=2e-3
    )

    again = dataclasses.replace(config, run=tmp_path / "again")
    monkeypatch.setattr(forwards.ForwardStore, "_make", None)
    assert digests(lookahead.train(again)) == digests(modules)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    with pytest.raises(ValueError, match="belongs to another run"):
        lookahead.train(dataclasses.replace(again, loss=LossConfig(skip=2)))
    assert lookahead.train(
        dataclasses.replace(again, run=tmp_path / "skip", loss=LossConfig(skip=2))
    )
    with pytest.raises(ValueError, match=r"other settings \(weights: None, now 'int8'\)"):
        lookahead.train(dataclasses.replace(again, run=tmp_path / "int8", weights="int8"))
    path = next(iter(kept))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=path.name):
        lookahead.train(dataclasses.replace(again, run=tmp_path / "damaged"))


def test_a_run_belongs_to_one_process(run_config, tmp_path):
    config = dataclasses.replace(run_config, run=tmp_path / "run")
    with (
        folder_lock(make_folder(config.run)),
        pytest.raises(BlockingIOError, match=r"run is being written by process \d+"),
    ):
        lookahead.train(config)
    source = DataConfig(model=config.model, source=("rows.jsonl",), out=tmp_path / "data")
    with (
        folder_lock(make_folder(source.out), "lock.0"),
        pytest.raises(BlockingIOError, match="data is being written by"),
    ):
        prepare(source)


def test_a_resumed_log_has_one_line_a_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": step, "loss": loss} for step, loss in ((0, 9), (1, 8), (0, 7), (1, 6), (2, 5))
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_text(text + 'garbage}\n{"step": 1, "lo')
    log = MetricsLog(path, 2, every=1, patience=9)
    log.add(2, {"loss": jnp.float32(4), "skipped_in_a_row": jnp.int32(0)})
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in kept] == [(0, 7), (1, 6), (2, 4)]


def test_a_command_says_what_it_does_and_fails_in_one_line(run_config, tmp_path, capsys):
    own = tmp_path / "config.json"
    own.write_text(json.dumps(dataclasses.asdict(run_config), default=str))
    assert lookahead.main([str(own), "--run", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().err
    assert f"loading {run_config.model}\n" in shown
    assert "compiling the step:   0%" in shown
    assert "4/4" in shown
    for args, status, message in (
        (["nothing"], 1, "nothing: neither"),
        ([str(own), "--epochs", "3"], 2, "--epochs"),
        ([str(own), "--model", "nowhere"], 1, "nowhere"),
        ([str(own), "--run", str(own)], 1, "is a file"),
    ):
        assert lookahead.main(args) == status
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("lookahead train lookahead: error: ")
        assert message in line


def test_damaged_checkpoints_are_passed_over_and_said_to_be(tmp_path, caplog):
    def state(step):
        return {"a": jax.random.normal(jax.random.key(step), (8, 64)), "n": jnp.int32(step)}

    def checkpoints(identity):
        return Checkpoints(tmp_path / "checkpoints", keep=3, identity={"of": identity})

    with checkpoints("us") as opened:
        assert opened.restore(state(0)) is None
        for step in (1, 2, 3, 4):
            opened.save(step, state(step))
    # A byte of the last step's values flips, the step before is emptied.
    folder = tmp_path / "checkpoints"
    values = (folder / "4" / "state" / "ocdbt.process_0" / "d").iterdir()
    file = max(values, key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    shutil.rmtree(folder / "3")
    (folder / "3").mkdir()
    with checkpoints("us") as opened, caplog.at_level(logging.WARNING):
        step, restored = opened.restore(state(0))
        assert (step, digests(restored)) == (2, digests(state(2)))
        opened.save(3, state(3))
    with checkpoints("us") as opened:
        assert opened.restore(state(0))[0] == 3
    with (
        checkpoints("others") as opened,
        pytest.raises(ValueError, match=r"another run \(of differ"),
    ):
        opened.restore(state(0))
    said = [r.getMessage() for r in caplog.records if "is damaged" in r.getMessage()]
    assert [message.split()[1] for message in said] == ["4", "3"]
    assert "the checksum of ['a'] does not match" in said[0]
    assert {path.name for path in (tmp_path / "damaged").iterdir()} == {"4.0", "3.0"}


def test_rate_warms_up_and_follows_a_cosine():
    rate = learning_rate(OptimizerConfig(rate=1e-3, warmup=4, floor=0.1), 104)
    got = [float(rate(step)) for step in (0, 2, 4, 54, 104)]
    np.testing.assert_allclose(got, [2.5e-4, 6.25e-4, 1e-3, 5.5e-4, 1e-4], rtol=1e-5)


def test_config_file_and_overrides(tmp_path):
    paths = ["--model", "m", "--data", "d", "--run", "r"]
    config = lookahead.parse_config(
        ["published", *paths, "--modules.targets", "q", "k", "--batch", "8"]
    )
    assert (config.steps, config.batch, config.optimizer.rate) == (7600, 8, 1e-3)
    assert config.modules == LookaheadConfig(
        tokens=32, rank=8, alpha=32.0, targets=("q", "k"), init="table"
    )
    # What a run writes down is a config file of its own.
    own = tmp_path / "config.json"
    own.write_text(json.dumps(dataclasses.asdict(config), default=str))
    assert lookahead.parse_config([str(own)]) == config
    own.write_text(json.dumps(dataclasses.asdict(config) | {"epochs": 3}, default=str))
    with pytest.raises(ValueError, match=r"config\.json: unknown field 'epochs'"):
        lookahead.parse_config([str(own)])
    with pytest.raises(UsageError, match="momentum"):
        lookahead.parse_config(["published", *paths, "--optimizer.momentum", "0.9"])
    with pytest.raises(ValueError, match=r"one of the presets \(embedded, published\)"):
        lookahead.parse_config(["nothing"])
    for content, complaint in (("{", "not valid JSON"), ("[]", "expected a JSON object, got list")):
        own.write_text(content)
        with pytest.raises(ValueError, match=rf"config.json: {complaint}"):
            lookahead.parse_config([str(own)])


def test_batches_must_fit_the_devices(run_config):
    with pytest.raises(ValueError, match="a batch of 6 cannot be split into 2 micro-batches on 2"):
        lookahead.train(dataclasses.replace(run_config, batch=6))


@pytest.mark.parametrize("name", ["save_every", "chunk"])
def test_sizes_of_zero_are_refused(run_config, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
        lookahead.train(dataclasses.replace(run_config, **{name: 0}))


def test_the_state_of_a_base_run_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "state.npz"
    state = {"a": np.arange(12, dtype=np.float32), "b": [np.ones(2), np.int32(7)]}
    base.save(path, state)
    with pytest.raises(ValueError, match="Object arrays"):
        base.save(path, state | {"b": [np.ones(2), np.array([{}])]})
    assert digests(base.restore(path, state)) == digests(jax.tree.map(jnp.asarray, state))
    assert list(tmp_path.iterdir()) == [path]
