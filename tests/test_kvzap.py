"""kvzap: its scores against NumPy, and what its training command finds."""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lookahead_jax as lk
from lookahead_jax.policies.kvzip import KVzipPlus
from lookahead_jax.policies.registry import make_policy
from lookahead_jax.prompts.kvzip_replay import repeat_template
from lookahead_jax.prompts.read import read_prompt
from lookahead_jax.train import kvzap
from tests import reference, tiny
from tests.test_policies import BUDGET, LENGTHS, RICH, TOLERANCE, read, restated, weights

WINDOW, LENGTH = 5, 48


def surrogate_of(config, hidden):
    """A random surrogate, with a hidden layer of this width or none."""
    draw = np.random.default_rng(0)
    layers, into, heads = config.num_layers, hidden or config.hidden_size, config.num_kv_heads
    shapes = {"weight": (layers, into, heads), "bias": (layers, heads)}
    if hidden:
        shapes |= {"hidden_weight": (layers, config.hidden_size, hidden)}
        shapes |= {"hidden_bias": (layers, hidden)}
    return {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("hidden", [0, 7])
def test_scores_are_those_of_the_surrogate(tmp_path, hidden):
    """Of prompts in several chunks; the last tokens stay, and the best of the others."""
    path, model = tmp_path / "surrogate.safetensors", RICH
    found = surrogate_of(model, hidden)
    safetensors.numpy.save_file(found, path)
    policy = make_policy("kvzap", file=str(path), window=WINDOW)
    result = read(model, tiny.batch(LENGTHS, model), policy)
    norms = np.asarray(weights(model)["layers"]["attn_norm"], np.float64)
    for row, (length, layers) in enumerate(restated(model)):
        for index, layer in enumerate(layers):
            h = reference.norm(layer.residual[:length], norms[index], model)
            if hidden:
                h = gelu(h @ found["hidden_weight"][index] + found["hidden_bias"][index])
            expected = (h @ found["weight"][index] + found["bias"][index]).T
            got = np.asarray(result.scores)[index, row, :, :length]
            worst = TOLERANCE * np.abs(expected).max()
            np.testing.assert_allclose(got, expected, rtol=0, atol=worst)
            for head in range(model.num_kv_heads):
                kept = np.asarray(result.cache.pos)[index, row, head]
                window = model.layer_window[index]
                first = 0 if window is None else max(0, length - window + 1)
                best = reference.best(expected[head, : length - WINDOW], BUDGET - WINDOW, first)
                assert set(kept[kept >= 0]) == {*best, *range(length - WINDOW, length)}


def test_the_scores_of_a_beginning_do_not_depend_on_what_follows(tmp_path):
    path, model = tmp_path / "surrogate.safetensors", RICH
    safetensors.numpy.save_file(surrogate_of(model, 0), path)
    policy = make_policy("kvzap", file=str(path))
    (row,) = tiny.prompts((60,), vocab=model.vocab_size)
    tokens = jnp.asarray([row, [*row[:40], *[-1] * 20]], jnp.int32)
    scores = np.asarray(read(model, tokens, policy).scores)
    np.testing.assert_allclose(scores[:, 0, :, :40], scores[:, 1, :, :40], atol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.save_bytes_model(folder)
    return folder


@pytest.mark.parametrize("hidden", [0, 16])
def test_the_command_learns_the_scores_of_kvzip(folder, tmp_path, capsys, hidden):
    """The linear surrogate is the ridge solution over all windows but the eighth."""
    text, out = tmp_path / "text.txt", tmp_path / "kvzap.safetensors"
    draw = np.random.default_rng(1)
    text.write_text("".join(draw.choice(list("abcdefgh .\n"), LENGTH * 9 - 10)))
    args = ["--model", str(folder), "--text", str(text), "--out", str(out)]
    assert (
        kvzap.main([*args, "--length", str(LENGTH), "--hidden", str(hidden), "--rate", "0.03"]) == 0
    )
    assert "of the variance in windows left out" in capsys.readouterr().err
    model = lk.load(folder)
    found = safetensors.numpy.load_file(out)
    ids = model.tokenizer.encode(text.read_text())
    windows = [ids[first : first + LENGTH] for first in range(0, len(ids), LENGTH)]
    norms = np.asarray(model.params["layers"]["attn_norm"], np.float64)
    teacher, inputs, targets = KVzipPlus(), [], []
    for window in windows[:7] + windows[8:]:
        layers, _ = reference.run(model.params, model.config, window)
        inputs.append(
            [
                reference.norm(la.residual, w, model.config)
                for la, w in zip(layers, norms, strict=True)
            ]
        )
        tokens = jnp.asarray(lk.pad_batch([window], config=model.config))
        scores = read_prompt(
            model.params, tokens, config=model.config, policy=teacher, budget=LENGTH, new_tokens=0,
            with_scores=True, repeat_template=repeat_template(teacher, model.tokenizer),
        ).scores  # fmt: skip
        targets.append(np.log(np.maximum(np.asarray(scores)[:, 0, :, : len(window)], 1e-6)))
    for index in range(model.config.num_layers):
        x = np.concatenate([row[index] for row in inputs])
        y = np.concatenate([row[index] for row in targets], axis=1).T
        if hidden:
            h = gelu(x @ found["hidden_weight"][index] + found["hidden_bias"][index])
            got = h @ found["weight"][index] + found["bias"][index]
            assert ((got - y) ** 2).mean() < 0.9 * ((y - y.mean(0)) ** 2).mean()
            continue
        x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
        square = x.T @ x
        ridge = 1e-4 * np.diagonal(square)[:-1].mean() * np.eye(x.shape[1])
        ridge[-1, -1] = 0.0
        expected = np.linalg.solve(square + ridge, x.T @ y)
        got = x[:, :-1] @ found["weight"][index] + found["bias"][index]
        # The products were added in float32: weights of like features may trade places.
        np.testing.assert_allclose(got, x @ expected, atol=5e-3)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({}, "kvzap needs file: give file="),
        ({"file": "absent"}, "absent does not exist: write it with `lookahead train kvzap`"),
        ({"file": "good", "window": -1}, "window=-1 must not be negative"),
        ({"file": "half"}, r"half has no tensor hidden_bias \[L, F\]"),
    ],
)
def test_impossible_settings_are_named(tmp_path, monkeypatch, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    found = surrogate_of(RICH, 3)
    safetensors.numpy.save_file(found, "good")
    found.pop("hidden_bias")
    safetensors.numpy.save_file(found, "half")
    with pytest.raises((ValueError, FileNotFoundError), match=complaint):
        make_policy("kvzap", **arguments)


def test_a_surrogate_of_another_model_is_refused(folder, tmp_path):
    path, model = tmp_path / "surrogate.safetensors", lk.load(folder)
    found = surrogate_of(model.config, 0)
    safetensors.numpy.save_file(found | {"weight": found["weight"][:, :-1]}, path)
    policy = make_policy("kvzap", file=str(path))
    with pytest.raises(ValueError, match=r"weight of .* is for another model; this one has"):
        lk.generate(model, [[1, 2]], policy=policy)
