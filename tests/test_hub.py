"""Models by their hub name, from a hub on loopback: equal to the folder, one line a fault."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub import constants, file_download

import lookahead_jax as lk
from lookahead_jax.checkpoints.hub import HubName, hub_name
from tests import tiny
from tests.hub_server import TOKEN, commit, serve
from tests.test_gguf import write_gguf

MODELS = Path(__file__).parent / "fixtures" / "models"
REPOSITORY = "someone/tiny-llama"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one model folder that has a few files too many; an empty cache."""
    folder = tmp_path / "upload"
    folder.mkdir()
    tiny.save_bytes_model(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag")
    for extra in ("pytorch_model.bin", "model.fp16.safetensors", "onnx.bin", "README.md"):
        (folder / extra).write_bytes(b"not needed")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with serve() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        pages = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", pages)
        hub.repositories[REPOSITORY] = {"main": folder}
        yield hub


def assert_same(model, folder):
    expected = lk.load(folder)
    assert model.config == expected.config
    assert model.generation == expected.generation
    assert jax.tree.structure(model.params) == jax.tree.structure(expected.params)
    jax.tree.map(np.testing.assert_array_equal, model.params, expected.params)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("owner/name", HubName("owner/name", None, None)),
        ("owner/na.me-1@v2.0", HubName("owner/na.me-1", None, "v2.0")),
        ("owner/name@refs/pr/1", HubName("owner/name", None, "refs/pr/1")),
        ("o/n/q4/x.gguf@abc", HubName("o/n", "q4/x.gguf", "abc")),
        ("owner/file.gguf", None),
        ("name", None),
        ("../name", None),
        ("/owner/name", None),
        ("a/b/c", None),
        ("owner/name@", None),
        ("owner/\u00fcber", None),
    ],
)
def test_names(text, parsed):
    assert hub_name(text) == parsed
    assert parsed is None or str(parsed) == text


def test_a_cold_and_a_warm_load_equal_the_folder(hub):
    folder = hub.repositories[REPOSITORY]["main"]
    model = lk.load(REPOSITORY)
    assert_same(model, folder)
    assert model.tokenizer.chat_templates == {
        "default": "{{ messages[0]['content'] }}",
        "rag": "rag",
    }
    fetched = {path.rpartition("/")[2] for method, path in hub.take_log() if method == "GET"}
    assert "model.safetensors" in fetched
    assert not fetched & {"pytorch_model.bin", "model.fp16.safetensors", "onnx.bin", "README.md"}
    assert model.path.name == commit(folder)
    assert_same(lk.load(REPOSITORY), folder)
    assert hub.take_log() == [("GET", f"/api/models/{REPOSITORY}/revision/main")]


def test_logits_of_a_sharded_repository(hub):
    hub.repositories["a/shards"] = {"main": MODELS / "llama2"}
    tokens = jnp.arange(1, 17, dtype=jnp.int32)[None]
    logits = [
        np.asarray(lk.token_logits(m.params, tokens, config=m.config))
        for m in (lk.load("a/shards"), lk.load(MODELS / "llama2"))
    ]
    np.testing.assert_array_equal(*logits)


def test_offline_a_cached_model_needs_no_hub(hub, monkeypatch):
    lk.load(REPOSITORY)
    hub.take_log()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_same(lk.load(REPOSITORY), hub.repositories[REPOSITORY]["main"])
    assert hub.take_log() == []
    with pytest.raises(FileNotFoundError, match=r"file a/b, and .*HF_HUB_OFFLINE is set"):
        lk.load("a/b")


def test_a_hub_that_is_down(hub, monkeypatch):
    folder = hub.repositories[REPOSITORY]["main"]
    lk.load(REPOSITORY)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    assert_same(lk.load(REPOSITORY), folder)
    with pytest.raises(FileNotFoundError, match=r"127\.0\.0\.1:9 cannot be reached .*network"):
        lk.load("a/b")


def test_revisions(hub, tmp_path):
    other = Path(shutil.copytree(hub.repositories[REPOSITORY]["main"], tmp_path / "other"))
    tiny.save_bytes_model(other, num_hidden_layers=1)
    hub.repositories[REPOSITORY]["v2"] = other
    assert lk.load(f"{REPOSITORY}@v2").config.num_layers == 1
    assert lk.load(f"{REPOSITORY}@{commit(other)}").config.num_layers == 1
    assert lk.load(REPOSITORY).config.num_layers == 3
    with pytest.raises(FileNotFoundError, match=f"{REPOSITORY} has no revision v3: name a branch"):
        lk.load(f"{REPOSITORY}@v3")


def test_a_local_folder_wins(hub, tmp_path):
    folder = tmp_path / REPOSITORY
    folder.mkdir(parents=True)
    tiny.save_bytes_model(folder, num_hidden_layers=2)
    assert lk.load(REPOSITORY).config.num_layers == 2
    assert hub.take_log() == []


def test_a_gguf_file_of_a_repository(hub, tmp_path):
    folder = tmp_path / "files"
    (folder / "f32").mkdir(parents=True)
    write_gguf(folder / "f32" / "tiny.gguf", MODELS / "llama2", "llama")
    hub.repositories["a/files"] = {"main": folder, "v1": folder}
    loaded = lk.load("a/files/f32/tiny.gguf@v1", dtype="float32")
    expected = lk.load(folder / "f32" / "tiny.gguf", dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected.params)
    with pytest.raises(FileNotFoundError, match=r"name one of them, as in a/files/f32/tiny\.gguf"):
        lk.load("a/files")
    with pytest.raises(FileNotFoundError, match=r"a/files has no file none\.gguf"):
        lk.load("a/files/none.gguf")


def test_pickled_weights_are_refused(hub):
    (hub.repositories[REPOSITORY]["main"] / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"tiny-llama has no safetensors, only pickled"):
        lk.load(REPOSITORY)
    assert not [path for _, path in hub.take_log() if path.endswith(".bin")]


def test_an_index_cannot_ask_for_pickled_weights(hub):
    index = {"weight_map": {"model.embed_tokens.weight": "pytorch_model.bin"}}
    folder = hub.repositories[REPOSITORY]["main"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"refused, it names pytorch_model\.bin as safetensors"):
        lk.load(REPOSITORY)
    assert not [path for _, path in hub.take_log() if path.endswith(".bin")]


def test_an_unsupported_model_is_refused_before_its_weights_are_fetched(hub):
    config = hub.repositories[REPOSITORY]["main"] / "config.json"
    config.write_text(json.dumps({**tiny.LLAMA, "model_type": "mamba"}))
    with pytest.raises(ValueError, match="unknown model_type 'mamba'"):
        lk.load(REPOSITORY)
    assert not [path for _, path in hub.take_log() if "safetensors" in path]


def test_absent_and_gated_repositories(hub, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no local folder or file a/b, and http.* has no"):
        lk.load("a/b")
    hub.gated.add(REPOSITORY)
    with pytest.raises(PermissionError, match=f"{REPOSITORY} is gated: .*HF_TOKEN"):
        lk.load(REPOSITORY)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert_same(lk.load(REPOSITORY), hub.repositories[REPOSITORY]["main"])
    hub.repositories["a/empty"] = {"main": MODELS / "none"}
    with pytest.raises(FileNotFoundError, match=r"a/empty lacks config\.json"):
        lk.load("a/empty")


def test_a_download_that_breaks_off_is_completed_by_the_next_call(hub, monkeypatch):
    real = file_download.http_get
    once = {"fail": True}

    def broken(url, file, **options):
        if url.endswith("model.safetensors") and once.pop("fail", False):
            file.write(b"half")
            raise OSError("the connection was reset")
        return real(url, file, **options)

    monkeypatch.setattr(file_download, "http_get", broken)
    with pytest.raises(OSError, match=r"cannot be fetched from .*reset.*run the command again"):
        lk.load(REPOSITORY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set"):
        lk.load(REPOSITORY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert_same(lk.load(REPOSITORY), hub.repositories[REPOSITORY]["main"])
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))


def test_a_connection_that_is_cut_is_resumed(hub):
    hub.cut["model.safetensors"] = 1000
    assert_same(lk.load(REPOSITORY), hub.repositories[REPOSITORY]["main"])


def test_a_full_disk(hub, monkeypatch):
    def full(url, file, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file_download, "http_get", full)
    with pytest.raises(OSError, match=r"tiny-llama cannot be stored: no space left in .*HF_HOME"):
        lk.load(REPOSITORY)


def command(*args, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-m", "lookahead_jax", *args],
        capture_output=True,
        text=True,
        env={**clean, **environment},
    )


@pytest.mark.slow
def test_the_command_reads_the_environment(hub, tmp_path):
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, np.arange(8, dtype=np.int32)[None])
    args = ("logits", "--model", REPOSITORY, "--tokens", tokens, "--out", tmp_path / "out.npz")
    absent = command(*args, **settings, HF_HUB_OFFLINE="1")
    assert absent.returncode == 1
    assert absent.stderr.startswith("lookahead: error: there is no local folder or file")
    assert absent.stderr.count("\n") == 1
    fetched = command(*args, **settings)
    assert fetched.returncode == 0, fetched.stderr
    assert command(*args, **settings, HF_HUB_OFFLINE="1").returncode == 0
    assert (tmp_path / "home" / "hub").is_dir()
