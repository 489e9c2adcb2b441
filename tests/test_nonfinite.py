"""Logits that are NaN or infinite end a run with an error that names the first layer at fault."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from lookahead_jax.checkpoints.load import load, save_params
from lookahead_jax.cli.main import main
from lookahead_jax.decoding.step import decode
from lookahead_jax.engine.engine import Engine
from lookahead_jax.engine.requests import Request
from lookahead_jax.eval.harness.model import HarnessModel, Settings
from lookahead_jax.generation.generate import generate
from lookahead_jax.generation.score import score
from lookahead_jax.policies.full import Full
from lookahead_jax.prefilling.diagnosis import NonFiniteError, non_finite_error
from lookahead_jax.prompts.read import read_prompt
from tests import tiny

PROMPTS = tiny.prompts((20, 12), vocab=97)
BAD = 96  # a token that no prompt has and whose embedding, in one model, is NaN
PROMPTS = [[token % BAD for token in row] for row in PROMPTS]
ALL = dict(policy=Full(), budget=64, eos_ids=())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    tiny.save_bytes_model(folder)
    return load(folder, dtype=jnp.float32)


def broken(model, name, layer, value=np.nan):
    """The model with one weight of one layer replaced."""
    layers = dict(model.params["layers"])
    weight = layers[name]
    layers[name] = weight.at[(layer, *[0] * (weight.ndim - 1))].set(value)
    params = {**model.params, "layers": layers}
    return dataclasses.replace(model, params=params)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_generate_names_the_layer_and_its_weight(model, value):
    message = "row 0: the logits after 20 tokens .* layer 1 of 3; its weights down hold"
    with pytest.raises(NonFiniteError, match=message):
        generate(broken(model, "down", 1, value), PROMPTS, max_new_tokens=4, **ALL)


def test_score_names_the_layer(model):
    tokens = np.asarray([PROMPTS[1]], np.int32)
    with pytest.raises(NonFiniteError, match="layer 2 of 3; its weights q hold"):
        score(broken(model, "q", 2), tokens, policy=Full(), budget=64)


def test_an_engine_ends_the_request_and_serves_on(model):
    engine = Engine(broken(model, "v", 0), rows=2, max_new_tokens=4, max_prompt_tokens=32, **ALL)
    for result in engine.run([Request(prompt=row, max_new_tokens=4) for row in PROMPTS]):
        assert result.finish == "error"
        assert "layer 0 of 3; its weights v hold" in result.error
        assert result.tokens == []


def test_a_row_that_turns_bad_while_decoding(model):
    """The embedding of one token is NaN: the row ends there, whatever is beside it."""
    greedy = generate(model, PROMPTS, max_new_tokens=8, **ALL).tokens
    bad = greedy[0][2]
    assert bad not in greedy[0][:2] + PROMPTS[0] + PROMPTS[1]
    embed = model.params["embed"]
    apart = {**model.params, "lm_head": embed, "embed": embed.at[bad].set(jnp.nan)}
    config = dataclasses.replace(model.config, tie_embeddings=False)
    read = read_prompt(
        apart, jnp.asarray([PROMPTS[0], PROMPTS[1] + [-1] * 8]), config=config, policy=Full(),
        budget=0, new_tokens=8,
    )  # fmt: skip
    done = decode(apart, read.cache, read.logits, config=config, max_new_tokens=8)
    finite = [bad not in row[:-1] for row in greedy]
    np.testing.assert_array_equal(done.finite, finite)
    assert not finite[0]
    assert done.tokens[0].tolist() == greedy[0][:3] + [-1] * 5
    assert not done.overflowed.any()
    bad_model = dataclasses.replace(model, params=apart, config=config)
    for drafter, nodes in (("none", None), ("prompt_lookup", 8)):
        with pytest.raises(NonFiniteError, match=r"after 23 tokens .*token embedding; its"):
            generate(
                bad_model, PROMPTS[:1], max_new_tokens=8, drafter=drafter, draft_nodes=nodes, **ALL
            )


def test_a_finite_model_puts_the_blame_elsewhere(model):
    error = non_finite_error(model.params, PROMPTS[0], "row 3", config=model.config)
    assert "row 3" in str(error)
    assert "a plain pass over these tokens is finite" in str(error)


def test_commands_and_the_harness_fail_with_one_line(model, tmp_path, capsys):
    for file in model.path.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    bad = broken(model, "down", 1)
    save_params(tmp_path, bad.params, bad.config)
    rows = tmp_path / "rows.npy"
    np.save(rows, np.asarray([PROMPTS[1]], np.int32))
    for command in (
        ["generate", "--model", str(tmp_path), "--prompt", "abc"],
        [
            "logits",
            "--model",
            str(tmp_path),
            "--tokens",
            str(rows),
            "--out",
            str(tmp_path / "x.npz"),
        ],
    ):
        assert main(command) == 1
        assert "layer 1 of 3; its weights down hold" in capsys.readouterr().err
    assert not (tmp_path / "x.npz").exists()
    harness = HarnessModel(Settings.of(dict(pretrained=str(tmp_path), batch_size=2)))
    with pytest.raises(NonFiniteError, match="layer 1 of 3"):
        harness.loglikelihoods([(PROMPTS[0], [1, 2])])
