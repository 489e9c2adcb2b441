"""Studies: many sets of modules trained on one pass over the prompts are runs of their own."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lookahead_jax.checkpoints.load import load
from lookahead_jax.model.fingerprint import fingerprint
from lookahead_jax.model.sharding import make_mesh
from lookahead_jax.modules.definition import LookaheadConfig, init_modules
from lookahead_jax.modules.files import load_modules
from lookahead_jax.train import lookahead, study
from lookahead_jax.train.batches import microbatch_sharding
from lookahead_jax.train.data import DataConfig, prepare
from lookahead_jax.train.optimizer import OptimizerConfig
from lookahead_jax.train.step import init_state, train_step, variants_step
from lookahead_jax.train.training_data import open_data
from tests import tiny

SIZES = {"tokens": 3, "rank": 2, "alpha": 4.0, "targets": ["q", "down"], "init": "table"}
MODULES = LookaheadConfig(**SIZES | {"targets": tuple(SIZES["targets"])})
CONTENT = {
    "modules": SIZES,
    "optimizer": {"rate": 1e-2, "warmup": 1},
    "steps": 3,
    "batch": 4,
    "micro_batches": 1,
    "data_seed": 5,
    "variants": {
        "all": {"seed": 5},
        "few": {"modules": {"tokens": 1}},
        "blind": {"seed": 5, "without": ["b"]},
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, two data folders and a study."""
    folder = tmp_path_factory.mktemp("study")
    tiny.model_folder(folder / "model", num_hidden_layers=1, vocab_size=96)
    for seed, name in enumerate("ab"):
        rows = [
            {"prompt": p, "response": p[3:8]}
            for p in tiny.prompts((30, 20, 25, 31, 17, 22), vocab=96, seed=seed)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        prepare(
            DataConfig(
                model=folder / "model", source=(str(folder / f"{name}.jsonl"),), out=folder / name
            )
        )
    (folder / "study.json").write_text(json.dumps(CONTENT))
    return folder


def run(folder, name, **fields):
    config = study.StudyConfig(
        study=str(folder / "study.json"), model=folder / "model",
        data=(f"a={folder / 'a'}", f"b={folder / 'b'}"), run=folder / name, **fields,
    )  # fmt: skip
    study.train_study(config)
    model = load(folder / "model")
    return {
        label: load_modules(folder / name / label, params=model.params, config=model.config)
        for label in CONTENT["variants"]
    }


def leaves(modules):
    return [
        np.asarray(modules.embeddings),
        *(np.asarray(modules.lora[name]["b"]) for name in ("q", "down")),
    ]


def test_a_variant_is_a_run_of_its_own_also_after_a_crash(folder, monkeypatch):
    alone = lookahead.train(
        lookahead.TrainConfig(
            model=folder / "model", data=(folder / "a", folder / "b"), run=folder / "alone",
            modules=MODULES, optimizer=OptimizerConfig(rate=1e-2, warmup=1),
            steps=3, batch=4, seed=5, mesh=lookahead.MeshConfig(data=4),
        )
    )  # fmt: skip

    add = study.MetricsLog.add

    def crash(self, step, values):
        if step == 2:
            raise KeyboardInterrupt
        add(self, step, values)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(study.MetricsLog, "add", crash)
        run(folder, "study", save_every=1, log_every=1)
    variants = run(folder, "study", save_every=1, log_every=1)
    lines = (folder / "study" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
    for got, want in zip(leaves(variants["all"]), leaves(alone), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)  # Adam moves by 1e-2 a step
    assert variants["few"].embeddings.shape[0] == 1


def test_rows_that_a_variant_does_not_learn_from_leave_no_trace(folder):
    described = study.read_study(str(folder / "study.json"))
    model = load(folder / "model")
    data = open_data(
        (folder / "a", folder / "b"), batch=4, seed=5, base_fingerprint=fingerprint(model.params)
    )
    used = study.rows_used(described, data, ("a", "b"), 0)
    from_b = data.rows_of(0)[None] >= 6  # each folder has six rows
    assert from_b.any()
    assert not from_b.all()
    np.testing.assert_array_equal(used, [np.ones((1, 4)), np.ones((1, 4)), ~from_b])

    optimizer = optax.sgd(0.5)
    batch = data.batch_of(0, 1, microbatch_sharding(make_mesh(devices=jax.devices()[:1])))
    state = init_state(
        init_modules(jax.random.key(0), MODULES, model.config, params=model.params), optimizer
    )
    shape = dict(config=model.config)
    (_, blind), (_, metrics) = variants_step(
        model.params,
        (state, state),
        batch,
        jnp.asarray(used[[0, 2]]),
        optimizers=(optimizer,) * 2,
        **shape,
    )
    kept = batch.replace(responses=jnp.where(from_b[..., None], -1, batch.responses))
    want, values = train_step(model.params, state, kept, optimizer=optimizer, **shape)
    assert metrics["rows"] == values["rows"] == 4 - from_b.sum()
    for got, expected in zip(leaves(blind.modules), leaves(want.modules), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)


def test_a_wrong_study_is_one_clear_error(folder, tmp_path):
    def study_of(**changed):
        path = tmp_path / "study.json"
        path.write_text(json.dumps(CONTENT | changed))
        return str(path)

    cases = [
        ({"stepz": 3}, "stepz"),
        ({"variants": {}}, "no variants"),
        ({"variants": {"x": {"module": {}}}}, "module"),
        ({"optimizer": {}}, "rate"),
    ]
    for changed, said in cases:
        with pytest.raises(ValueError, match=rf"study.json: .*{said}"):
            study.read_study(study_of(**changed))
    with pytest.raises(
        ValueError, match=r"nothing: neither .* \(ablations, comparison, smollm2_loss\)"
    ):
        study.read_study("nothing")
    config = study.StudyConfig(
        study=study_of(), model=folder / "model", data=(f"a={folder / 'a'}",), run=tmp_path / "run"
    )
    with pytest.raises(ValueError, match="blind leaves out b, which --data does not name"):
        study.train_study(config)
    data = (*config.data, f"b={folder / 'b'}")
    for changed, options, said in (
        ({}, {"save_every": 0}, "save_every must be at least 1, not 0"),
        ({"micro_batches": 0}, {}, "4 cannot be split into 0 micro-batches"),
    ):
        study_of(**changed)
        with pytest.raises(ValueError, match=said):
            study.train_study(dataclasses.replace(config, data=data, **options))
    assert not (tmp_path / "run").exists()
