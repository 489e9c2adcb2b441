"""`convert` writes a Hugging Face folder that loads as its source, from every format and family."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import SafetensorError, safe_open

import lookahead_jax as lk
from lookahead_jax.checkpoints import convert as module
from lookahead_jax.checkpoints.convert import convert
from lookahead_jax.checkpoints.gguf_tokenizer import tokenizer_of
from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.cli.main import main
from tests import tiny
from tests.test_gguf import ARCHITECTURES, TEXTS, byte_level, write_gguf

MODELS = Path(__file__).parent / "fixtures" / "models"
CHAT = [{"role": "user", "content": "Hi <|im_end|> there"}]


def assert_same(model, expected):
    assert model.config == expected.config
    assert model.generation == expected.generation
    assert jax.tree.structure(model.params) == jax.tree.structure(expected.params)
    for ours, theirs in zip(*map(jax.tree.leaves, (model.params, expected.params)), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    assert (model.tokenizer is None) == (expected.tokenizer is None)
    if model.tokenizer is not None:
        assert_same_tokenizer(model.tokenizer, expected.tokenizer)


def assert_same_tokenizer(ours, theirs):
    for text in (*TEXTS, "<unk> <s> </s> t3"):
        for options in ({}, {"special": False}, {"plain": True}):
            assert ours.encode(text, **options) == theirs.encode(text, **options)
    assert ours.special_tokens == theirs.special_tokens
    assert ours.special_ids == theirs.special_ids
    assert ours.chat_templates == theirs.chat_templates
    for name in theirs.chat_templates:
        options = dict(template=name, add_generation_prompt=False)
        assert ours.render_chat(CHAT, **options) == theirs.render_chat(CHAT, **options)
        assert ours.encode_chat(CHAT, **options) == theirs.encode_chat(CHAT, **options)


@pytest.mark.parametrize("name", sorted(path.name for path in MODELS.iterdir()))
def test_a_folder_of_every_family(name, tmp_path):
    convert(MODELS / name, tmp_path / "out")
    assert_same(lk.load(tmp_path / "out"), lk.load(MODELS / name))
    if name.startswith("gpt_oss"):  # the names that transformers reads: the folder's own
        with safe_open(tmp_path / "out" / "model.safetensors", "numpy") as file:
            names = set(file.keys())
        assert "model.layers.0.mlp.experts.gate_up_proj" in names
        assert not any("_blocks" in n or ".experts.0." in n for n in names)


@pytest.mark.parametrize(("fixture", "architecture"), [*ARCHITECTURES[:5], ARCHITECTURES[-1]])
def test_a_gguf_file(fixture, architecture, tmp_path):
    file = tmp_path / "model.gguf"
    write_gguf(file, MODELS / fixture, architecture)
    convert(file, tmp_path / "out")
    assert_same(lk.load(tmp_path / "out"), lk.load(file))


def byte_level_metadata():
    content = json.loads(byte_level(100).to_str())
    vocabulary = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": np.array([3, 1, 4] + [1] * (len(vocabulary) - 3)),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in content["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,  # special although its type is normal
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0]['content'] }}<|im_end|>",
        "tokenizer.chat_template.rag": "rag: {{ messages[0]['content'] }}",
    }


def test_the_tokenizer_of_a_gguf_file(tmp_path):
    source = tokenizer_of(byte_level_metadata())
    assert source.special_ids == {0, 1}
    module._write_tokenizer(tmp_path, source, tiny.config())
    assert (tmp_path / "additional_chat_templates" / "rag.jinja").is_file()
    assert_same_tokenizer(Tokenizer.load(tmp_path), source)


def test_a_template_cannot_choose_another_folder(tmp_path):
    metadata = byte_level_metadata() | {"tokenizer.chat_template.../../x": "hostile"}
    source = tokenizer_of(metadata)
    with pytest.raises(ValueError, match=r"'/x' cannot be the name of a file"):
        module._write_tokenizer(tmp_path, source, tiny.config())


def test_shards_and_dtype(tmp_path):
    out = tmp_path / "out"
    convert(MODELS / "llama3", out, dtype="bfloat16", shard_bytes=20_000)
    assert_same(lk.load(out), lk.load(MODELS / "llama3", dtype="bfloat16"))
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(out.glob("*.safetensors"))
    assert [s.name for s in shards] == sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    sizes = []
    for shard in shards:
        with safe_open(shard, framework="numpy") as file:
            names = set(file.keys())
            sizes.append(sum(file.get_tensor(name).nbytes for name in names))
        assert names == {n for n, f in index["weight_map"].items() if f == shard.name}
        assert sizes[-1] <= 20_000 or len(names) == 1
    assert sum(sizes) == index["metadata"]["total_size"]


def test_a_folder_that_holds_something_is_refused_before_the_model_is_read(tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file"):
        with pytest.raises(FileExistsError, match=f"{out} exists already: name a new folder"):
            convert(tmp_path / "no model", out)


@pytest.mark.parametrize("fault", [SafetensorError("I/O error: disk full"), KeyboardInterrupt()])
def test_a_fault_leaves_nothing(fault, tmp_path, monkeypatch):
    def fails(tensors, path, metadata):
        path.write_bytes(b"half")
        raise fault

    monkeypatch.setattr(module, "save_file", fails)
    with pytest.raises((OSError, KeyboardInterrupt), match=r"disk full|^$"):
        convert(MODELS / "llama3", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["convert", str(MODELS / "qwen3"), str(out), "--dtype", "float16"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert_same(lk.load(out), lk.load(MODELS / "qwen3", dtype="float16"))
    modes = {file.stat().st_mode for file in out.iterdir()}
    assert len(modes) == 1
    assert main(["convert", str(MODELS / "qwen3"), str(out)]) == 1
    assert "exists already" in capsys.readouterr().err
