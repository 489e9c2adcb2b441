"""Loading model directories: round trips, placement, and files that must be refused."""

import contextlib
import json
import os
import shutil
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from lookahead_jax.checkpoints.load import load, save_params
from lookahead_jax.checkpoints.source import StoredTensor, Tensors
from lookahead_jax.checkpoints.stored_layout import stored_index
from lookahead_jax.checkpoints.weights import load_weights
from lookahead_jax.model.sharding import make_mesh, param_shardings

MODELS = Path(__file__).parent / "fixtures" / "models"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def copy(tmp_path):
    """A function that copies a fixture model to a directory of the test's own."""
    return lambda name: Path(shutil.copytree(MODELS / name, tmp_path / "model"))


def edit_json(path, **changes):
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | changes))


def edit_tensors(directory, change):
    """Applies `change` to the dict of tensors of an unsharded model."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_load_reads_everything():
    model = load(MODELS / "llama3")
    assert model.config.model_type == "llama"
    assert model.path == MODELS / "llama3"
    assert model.generation.eos_ids == (2,)
    assert (model.generation.bos_id, model.generation.pad_id) == (1, 0)
    assert model.generation.temperature is None
    assert model.tokenizer is not None
    assert model.params["embed"].dtype == jnp.float32
    raw = load_file(MODELS / "llama3" / "model.safetensors")
    q = raw["model.layers.1.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(model.params["layers"]["q"][1].reshape(32, -1), q.T)


def test_generation_config_wins_over_config(copy):
    directory = copy("llama2")
    generation = {"eos_token_id": [2, 7], "temperature": 1, "top_k": 40, "top_p": 0.9}
    edit_json(directory / "generation_config.json", **generation)
    edit_json(directory / "config.json", pad_token_id=-1, bos_token_id=5, text_config=3)
    edit_json(directory / "generation_config.json", pad_token_id=-1)
    defaults = load(directory).generation
    assert defaults.eos_ids == (2, 7)
    assert (defaults.temperature, defaults.top_k, defaults.top_p) == (1, 40, 0.9)
    assert defaults.pad_id is None
    (directory / "generation_config.json").unlink()
    assert load(directory).generation.bos_id == 5
    assert load(directory).tokenizer is None


@pytest.mark.parametrize(
    "name", ["llama_linear_biased", "gemma3", "phi3", "qwen3", "olmo2", "glm4"]
)
def test_save_then_load_is_exact(name, tmp_path):
    model = load(MODELS / name)
    save_params(tmp_path, model.params, model.config)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    shutil.copy(MODELS / name / "config.json", tmp_path)
    assert_trees_equal(load(tmp_path).params, model.params)


@pytest.mark.parametrize("name", ["llama2", "gemma3", "phi3", "qwen2", "olmo2"])
@pytest.mark.parametrize(("fsdp", "tensor"), [(1, 2), (2, 2), (4, 1)])
def test_sharded_loading_is_exact(name, fsdp, tensor):
    mesh = make_mesh(fsdp=fsdp, tensor=tensor)
    model = load(MODELS / name, mesh=mesh)
    assert_trees_equal(model.params, load(MODELS / name).params)
    jax.tree.map(
        lambda leaf, sharding: (
            leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
            or pytest.fail(f"{leaf.sharding} is not {sharding}")
        ),
        model.params,
        param_shardings(model.config, mesh),
    )


def test_each_slice_is_read_once_and_nothing_else(monkeypatch):
    """Two of four devices hold the same half of a parameter: two reads of a half per layer."""
    reads = []

    def spy(spec, config, index):
        reads.append((spec.tensor, stored_index(spec, config, index)))
        return reads[-1][1]

    monkeypatch.setattr("lookahead_jax.checkpoints.weights.stored_index", spy)
    load(MODELS / "mistral", mesh=make_mesh(data=2, tensor=2))
    gate = [index for tensor, index in reads if "gate_proj" in tensor]
    columns = slice(0, 32)
    halves = [(slice(0, 24), columns), (slice(24, 48), columns)]
    assert sorted(gate, key=str) == sorted(halves * 2, key=str)


def test_tensors_of_another_format(copy):
    """Another format gives named tensors and a reader, and no more."""
    expected = load(MODELS / "phi3")
    values = load_file(MODELS / "phi3" / "model.safetensors")
    stored = {n: StoredTensor(Path("memory"), n, v.shape, "F32") for n, v in values.items()}

    @contextlib.contextmanager
    def open_values():
        yield lambda tensor, index: values[tensor.name][index]

    tensors = Tensors(where="memory", stored=stored, open=open_values)
    weights = load_weights(tensors, expected.config)
    assert_trees_equal(weights.params, expected.params)
    assert weights.notices == ()


def test_dtypes(copy):
    exact = load(MODELS / "qwen3").params
    rounded = load(MODELS / "qwen3", dtype="bfloat16").params
    assert_trees_equal(rounded, jax.tree.map(lambda a: a.astype(jnp.bfloat16), exact))
    directory = copy("qwen3")
    config = load(directory).config
    save_params(directory, rounded, config)
    assert load(directory).params["embed"].dtype == jnp.bfloat16
    assert_trees_equal(load(directory).params, rounded)
    for wrong in ("int8", "float64", "floats"):
        with pytest.raises(
            ValueError, match=rf"dtype='{wrong}': parameters are float32, .*weights="
        ):
            load(directory, dtype=wrong)


def test_mixed_dtypes_need_a_choice(copy):
    directory = copy("qwen3")

    def change(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float16)

    edit_tensors(directory, change)
    with pytest.raises(ValueError, match=r"mixes dtypes.*model\.norm\.weight as F16.*dtype="):
        load(directory)
    assert load(directory, dtype=jnp.float32).params["final_norm"].dtype == jnp.float32


def test_float16_overflow_is_an_error(copy):
    directory = copy("qwen3")
    edit_tensors(directory, lambda tensors: tensors["model.norm.weight"].fill(1e5))
    with pytest.raises(ValueError, match=r"model\.norm\.weight does not fit float16"):
        load(directory, dtype="float16")


def test_harmless_tensors_are_ignored(copy):
    directory = copy("llama3")
    expected = load(directory).params

    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    edit_tensors(directory, change)
    assert_trees_equal(load(directory).params, expected)


def test_a_head_that_differs_from_its_embedding_is_used_with_a_warning():
    """test_parity compares the logits of this fixture with transformers, which does the same."""
    with pytest.warns(UserWarning, match=r"ties lm_head\.weight .* values differ"):
        model = load(MODELS / "llama_own_head")
    assert not model.config.tie_embeddings
    stored = load_file(MODELS / "llama_own_head" / "model.safetensors")
    np.testing.assert_array_equal(model.params["lm_head"], stored["lm_head.weight"])
    np.testing.assert_array_equal(model.params["embed"], stored["model.embed_tokens.weight"])


@pytest.mark.filterwarnings("error")
def test_a_head_alone_serves_as_embedding(copy):
    directory = copy("llama3")
    expected = load(directory)

    def change(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    edit_tensors(directory, change)
    assert_trees_equal(load(directory).params, expected.params)
    assert load(directory).config == expected.config


def test_a_tied_head_of_another_shape(copy):
    directory = copy("llama3")
    edit_tensors(directory, lambda t: t.update({"lm_head.weight": np.ones((3, 32), np.float32)}))
    with pytest.raises(ValueError, match=r"lm_head\.weight has shape \(3, 32\)"):
        load(directory)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_weights_that_are_not_finite_are_named(copy, value, stored, dtype):
    directory = copy("qwen3")
    save_params(directory, load(directory, dtype=stored).params, load(directory).config)

    def change(tensors):
        for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
            tensors[name].flat[-1] = value

    edit_tensors(directory, change)
    message = r"NaN or infinite .*: model\.layers\.1\.mlp\.up_proj\.weight, model\.norm\.weight$"
    with pytest.warns(UserWarning, match=message) as warnings:
        load(directory, dtype=dtype)
    assert len(warnings) == 1


def test_names_without_the_model_prefix(copy):
    directory = copy("llama3")
    expected = load(directory).params

    def change(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    edit_tensors(directory, change)
    assert_trees_equal(load(directory).params, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"lacks tensors .*model\.norm\.weight"),
        (lambda t: t.update(extra=np.ones(1, np.float32)), "does not call for: extra"),
        (
            lambda t: t.update({"model.norm.weight": np.ones(33, np.float32)}),
            r"model\.norm\.weight has shape \(33,\), config\.json calls for \(32,\)",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.ones(32, np.int32)}),
            r"model\.norm\.weight is stored as I32; convert",
        ),
        (
            lambda t: t.update({"norm.weight": np.ones(32, np.float32)}),
            r"does not call for: norm\.weight",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_config(copy, change, message):
    directory = copy("qwen3")
    edit_tensors(directory, change)
    with pytest.raises(ValueError, match=message):
        load(directory)


def test_missing_files(tmp_path, copy):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load(tmp_path)
    directory = copy("llama2")
    (directory / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"00002-of-00004.*download it again"):
        load(directory)
    (directory / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match="only safetensors are read from"):
        load(directory)


def test_index_and_shards_must_agree(copy):
    directory = copy("llama2")
    weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
    moved = weight_map | {"model.norm.weight": weight_map["model.embed_tokens.weight"]}
    assert moved != weight_map
    edit_json(directory / INDEX, weight_map=moved)
    with pytest.raises(ValueError, match=r"tensors differ from .*: model\.norm\.weight"):
        load(directory)
    for broken in ([], {"model.norm.weight": 3}, None):
        edit_json(directory / INDEX, weight_map=broken)
        with pytest.raises(ValueError, match="weight_map must map"):
            load(directory)


@pytest.mark.filterwarnings("error")
def test_index_and_shards_may_differ_in_what_is_ignored(copy):
    directory = copy("llama2")
    expected = load(directory).params
    shard = directory / "model-00001-of-00004.safetensors"
    tensors, rotary = load_file(shard), "model.layers.{}.self_attn.rotary_emb.inv_freq"
    save_file({**tensors, rotary.format(0): np.ones(4, np.float32)}, shard)
    weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
    edit_json(directory / INDEX, weight_map=weight_map | {rotary.format(1): shard.name})
    assert_trees_equal(load(directory).params, expected)
    edit_json(directory / INDEX, weight_map=weight_map | {"lm_head.bias": shard.name})
    with pytest.raises(ValueError, match=r"tensors differ from .*: lm_head\.bias"):
        load(directory)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/hostname", "sub/x.safetensors", "..", "", "a\0b", "."]
)
def test_names_that_leave_the_directory(copy, tmp_path, name):
    directory = copy("llama2")
    save_file({"x": np.ones(1, np.float32)}, tmp_path / "secret.safetensors")
    edit_json(directory / INDEX, weight_map={"x": name})
    with pytest.raises(ValueError, match="refused file name"):
        load(directory)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_links_that_leave_the_directory(copy, tmp_path, name):
    directory = copy("llama3")
    os.replace(directory / name, tmp_path / "outside")
    (directory / name).symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match=f"{name}: refused, the link leads out"):
        load(directory)


def test_links_of_the_hugging_face_cache_are_followed(tmp_path):
    """snapshots/<revision>/<name> -> ../../blobs/<hash>, and nowhere else."""
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in (MODELS / "llama3").iterdir():
        shutil.copy(path, blobs / f"hash-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash-{path.name}")
    assert_trees_equal(load(snapshot).params, load(MODELS / "llama3").params)
    (snapshot / "config.json").unlink()
    shutil.copy(MODELS / "llama3" / "config.json", tmp_path / "elsewhere")
    (snapshot / "config.json").symlink_to("../../elsewhere")
    with pytest.raises(ValueError, match="leads out"):
        load(snapshot)


def test_links_to_the_store_that_repositories_share_are_followed(tmp_path):
    """<repo>/blobs/<hash> may be a link to blobs/<2 digits>/<hash> beside the repositories."""
    repo = tmp_path / "models--a--b"
    snapshot, blobs, store = repo / "snapshots" / "abc", repo / "blobs", tmp_path / "blobs" / "ha"
    for folder in (snapshot, blobs, store):
        folder.mkdir(parents=True)
    for path in (MODELS / "llama3").iterdir():
        shutil.copy(path, store / f"hash-{path.name}")
        (blobs / f"etag-{path.name}").symlink_to(f"../../blobs/ha/hash-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/etag-{path.name}")
    assert_trees_equal(load(snapshot).params, load(MODELS / "llama3").params)
    (blobs / "etag-config.json").unlink()
    (tmp_path / "blobs" / "xx").mkdir()
    shutil.copy(MODELS / "llama3" / "config.json", tmp_path / "blobs" / "xx" / "hash")
    (blobs / "etag-config.json").symlink_to("../../blobs/xx/hash")
    with pytest.raises(ValueError, match="leads out"):
        load(snapshot)


def test_special_files_are_refused(copy):
    """A FIFO would block the reader for ever."""
    directory = copy("llama3")
    (directory / "config.json").unlink()
    os.mkfifo(directory / "config.json")
    with pytest.raises(ValueError, match="not a regular file"):
        load(directory)
    (directory / "config.json").unlink()
    (directory / "config.json").symlink_to("gone.json")
    with pytest.raises(ValueError, match="broken link"):
        load(directory)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "expected a JSON object, got list"),
        (b" " * (64 * 2**20 + 1), "larger than"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_malformed_json(copy, name, content, message):
    directory = copy("llama3")
    (directory / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        load(directory)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", float("nan"), "temperature is out of range"),
        ("top_k", 2.5, "top_k must be of type int"),
        ("top_k", 10**12, "top_k is out of range"),
        ("bos_token_id", [1], "bos_token_id must be of type int"),
    ],
)
def test_malformed_generation_defaults(copy, name, value, message):
    directory = copy("llama3")
    edit_json(directory / "generation_config.json", **{name: value})
    with pytest.raises(ValueError, match=message):
        load(directory)


@pytest.mark.parametrize("eos", ["x", [None], -1, [True], 2.0, 2**40])
def test_malformed_eos(copy, eos):
    directory = copy("llama3")
    edit_json(directory / "generation_config.json", eos_token_id=eos)
    with pytest.raises(ValueError, match="eos_token_id must be token ids"):
        load(directory)


def lying(header, data=b"\0" * 16):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 8,
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 99) + b"{}",
        lying({"a": entry([5], 0, 16)}),  # shape and offsets disagree
        lying({"a": entry([4], 0, 32)}),  # beyond the end
        lying({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}),  # overlap
        lying({"a": entry([2], 0, 8)}),  # bytes nobody owns
        lying({"a": entry([2**40, 2**40], 0, 16)}),  # overflow
        lying({"a": entry([4], 16, 0)}),
        lying({"a": entry([4], 0, 16, dtype="F33")}),
        lying({"a": 3}),
        lying([]),
    ],
)
def test_lying_safetensors(copy, content):
    directory = copy("llama3")
    (directory / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors: not a complete safetensors file"):
        load(directory)


WHOLE = (MODELS / "qwen3" / "model.safetensors").read_bytes()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_truncated_or_flipped_headers_never_crash(tmp_path_factory, data):
    """A damaged header is an error that names the file, or (a name's byte) a tensor mismatch."""
    directory = tmp_path_factory.getbasetemp() / "fuzzed"
    directory.mkdir(exist_ok=True)
    shutil.copy(MODELS / "qwen3" / "config.json", directory)
    header = 8 + struct.unpack("<Q", WHOLE[:8])[0]
    if data.draw(st.booleans()):
        content = WHOLE[: data.draw(st.integers(0, len(WHOLE) - 1))]
    else:
        place = data.draw(st.integers(0, header - 1))
        flipped = WHOLE[place] ^ data.draw(st.integers(1, 255))
        content = WHOLE[:place] + bytes([flipped]) + WHOLE[place + 1 :]
    (directory / "model.safetensors").write_bytes(content)
    message = str(directory)
    try:
        load(directory)
        # JSON white space and the free-form metadata may change without meaning anything.
        harmless = len(content) == len(WHOLE)
    except ValueError as error:
        harmless, message = True, str(error)
    assert harmless
    assert str(directory) in message


def test_nothing_is_allocated_before_everything_is_checked(copy, monkeypatch):
    directory = copy("llama2")
    last = directory / "model-00004-of-00004.safetensors"
    last.write_bytes(last.read_bytes()[:-4])

    def allocate(*args, **kwargs):
        raise AssertionError("allocated")

    monkeypatch.setattr(jax, "make_array_from_callback", allocate)
    with pytest.raises(ValueError, match="00004-of-00004"):
        load(directory)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    model = load(MODELS / "qwen3")
    save_params(tmp_path, model.params, model.config)
    before = (tmp_path / "model.safetensors").read_bytes()

    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("lookahead_jax.checkpoints.load.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_params(tmp_path, model.params, model.config)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before
