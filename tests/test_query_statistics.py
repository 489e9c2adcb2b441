"""Files of qfilter and triattention: computed, read by the policy, against NumPy; bad ones."""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lookahead_jax as lk
from lookahead_jax.policies.base import CutByEntries
from lookahead_jax.policies.registry import make_policy
from lookahead_jax.policies.statistics_file import load_statistics
from lookahead_jax.prompts.read import read_prompt
from lookahead_jax.train import qfilters, triattention
from tests import reference, tiny
from tests.test_policies import BUDGET

LENGTH = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.save_bytes_model(folder)
    return folder


def test_the_command_writes_what_the_policy_reads(folder, tmp_path, capsys):
    """Filters of three windows, the last one shorter; scores and texts that are cut by them."""
    text, out = tmp_path / "text.txt", tmp_path / "filters.safetensors"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 2 + "And then again.")
    args = ["--model", str(folder), "--text", str(text), "--out", str(out)]
    assert qfilters.main([*args, "--length", str(LENGTH)]) == 0
    assert "q_filters of 3 layers" in capsys.readouterr().err
    model = lk.load(folder)
    ids = model.tokenizer.encode(text.read_text())
    config = model.config
    queries = [[] for _ in range(config.num_layers)]
    for first in range(0, len(ids), LENGTH):
        layers, _ = reference.run(model.params, config, ids[first : first + LENGTH])
        for row, layer in zip(queries, layers, strict=True):
            row.append(layer.q)
    expected = [
        reference.query_filters(np.concatenate(row, axis=1), config.num_kv_heads) for row in queries
    ]
    found = safetensors.numpy.load_file(out)["q_filters"]
    assert found.shape == (config.num_layers, config.num_kv_heads, config.head_dim)
    np.testing.assert_allclose(found, expected, atol=1e-3)

    policy = make_policy("qfilter", file=str(out))
    assert policy.decode_cut == CutByEntries()
    (row,) = tiny.prompts((50,), vocab=256)
    tokens = jnp.asarray(lk.pad_batch([row], config=config))
    read = read_prompt(
        model.params, tokens, config=config, policy=policy, budget=BUDGET, new_tokens=8,
        with_scores=True,
    )  # fmt: skip
    layers, _ = reference.run(model.params, config, row)
    scores = np.stack(
        [-np.einsum("kth,kh->kt", la.k, f) for la, f in zip(layers, found, strict=True)]
    )
    np.testing.assert_allclose(read.scores[:, 0, :, :50], scores, atol=1e-3)


def test_mean_queries_of_texts_score_a_prompt(folder, tmp_path):
    """As above, for triattention; the texts are not the prompt."""
    text, out = tmp_path / "text.txt", tmp_path / "queries.safetensors"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 2)
    args = ["--model", str(folder), "--text", str(text), "--out", str(out)]
    assert triattention.main([*args, "--length", str(LENGTH)]) == 0
    model = lk.load(folder)
    ids, config = model.tokenizer.encode(text.read_text()), model.config
    texts = [
        reference.run(model.params, config, ids[first : first + LENGTH])[0]
        for first in range(0, len(ids), LENGTH)
    ]
    policy = make_policy("triattention", file=str(out), window=4, reach=100)
    assert policy.decode_cut == CutByEntries()
    (row,) = tiny.prompts((50,), vocab=256)
    read = read_prompt(
        model.params, jnp.asarray(lk.pad_batch([row], config=config)), config=config,
        policy=policy, budget=BUDGET, new_tokens=8, with_scores=True,
    )  # fmt: skip
    layers, _ = reference.run(model.params, config, row)
    for index, layer in enumerate(layers):
        centre = reference.query_centre(texts, config, index)
        scores = reference.triattention(layer, 50, config, index, centre, 100)
        np.testing.assert_allclose(read.scores[index, 0, :, :50], scores, atol=1e-3)
    assert (read.cache.pos[0, :, :, :BUDGET] >= 0).all()
    for kept in np.asarray(read.cache.pos[0]).reshape(-1, read.cache.pos.shape[-1]):
        assert {46, 47, 48, 49} <= set(kept.tolist())


def test_filters_in_bfloat16_are_read(tmp_path):
    path = tmp_path / "filters.safetensors"
    filters = np.asarray(jnp.full((3, 2, 8), 0.5, jnp.bfloat16))
    safetensors.numpy.save_file({"q_filters": filters}, path)
    found = load_statistics(str(path), "a command", q_filters="LKH")["q_filters"]
    assert found.dtype == np.float32
    assert (found == 0.5).all()


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        (None, "does not exist"),
        (b"", "is not a safetensors file"),
        ({"other": np.zeros((3, 2, 8), np.float32)}, "has no tensor q_filters"),
        ({"q_filters": np.zeros((3, 2), np.float32)}, "has no tensor q_filters"),
        ({"q_filters": np.full((3, 2, 8), np.nan, np.float32)}, "NaN or infinite"),
    ],
)
def test_files_without_filters_are_refused(tmp_path, tensors, complaint):
    path = tmp_path / "filters.safetensors"
    if tensors is not None:
        path.write_bytes(b"" if tensors == b"" else safetensors.numpy.save(tensors))
    with pytest.raises((ValueError, FileNotFoundError), match=complaint):
        make_policy("qfilter", file=str(path))


def test_filters_of_another_model_are_refused(folder, tmp_path):
    path = tmp_path / "filters.safetensors"
    path.write_bytes(safetensors.numpy.save({"q_filters": np.ones((4, 2, 8), np.float32)}))
    with pytest.raises(ValueError, match=r"of \(4, 2, 8\) is for another model"):
        lk.generate(lk.load(folder), [[1, 2]], policy=make_policy("qfilter", file=str(path)))


@pytest.mark.parametrize(
    ("content", "options", "complaint"),
    [
        (b"", [], "there is no text in it"),
        (b"\xff", [], "is not UTF-8 text"),
        (b"a", ["--length", "0"], "--length 0"),
    ],
)
def test_the_command_says_what_is_wrong(folder, tmp_path, capsys, content, options, complaint):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    out = tmp_path / "out.safetensors"
    args = ["--model", str(folder), "--text", str(path), "--out", str(out), *options]
    assert qfilters.main(args) == 1
    assert complaint in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()
