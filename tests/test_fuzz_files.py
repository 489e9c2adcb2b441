"""Damaged files: they load to what they hold, or raise one error that names the file."""

import contextlib
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lookahead_jax.checkpoints.cache_files import load_cache, save_cache
from lookahead_jax.checkpoints.load import load
from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.model.cache import empty_cache
from lookahead_jax.modules.definition import LookaheadConfig, init_modules
from lookahead_jax.modules.files import load_modules, save_modules
from tests import tiny

MODELS = Path(__file__).parent / "fixtures" / "models"
TOKENIZERS = Path(__file__).parent / "fixtures" / "tokenizers"
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]


def damaged(whole: bytes, count: int, first: int = 0) -> list[bytes]:
    """Contents with one flipped bit, one overwritten stretch, or a missing end.

    Half of the flips lie in the first `first` bytes, if that is given.
    """
    rng = np.random.default_rng(len(whole))
    contents = []
    for i in range(count):
        content = bytearray(whole)
        place = int(rng.integers(len(whole) if i % 2 or not first else first))
        match i % 4:
            case 0 | 1:
                content[place] ^= 1 << int(rng.integers(8))
            case 2:
                stretch = rng.integers(0, 256, int(rng.integers(1, 9)), np.uint8).tobytes()
                content[place : place + len(stretch)] = stretch
            case 3:
                del content[place:]
        contents.append(bytes(content))
    return contents


def attempt(read, where: Path):
    """What `read` returns, or None if it raised an error that names the place."""
    try:
        return read()
    except (ValueError, OSError) as error:
        message = str(error)
    assert str(where) in message
    return None


@pytest.mark.parametrize(
    ("name", "file", "count"),
    [
        ("llama3", "config.json", 200),
        ("gemma3", "config.json", 100),
        ("llama3", "generation_config.json", 60),
        ("llama2", "model.safetensors.index.json", 200),
    ],
)
def test_damaged_descriptions(tmp_path, name, file, count):
    directory = Path(shutil.copytree(MODELS / name, tmp_path / "model"))
    expected = load(directory)
    for content in damaged((directory / file).read_bytes(), count):
        (directory / file).write_bytes(content)
        model = attempt(lambda: load(directory), directory)
        if model is not None and model.config == expected.config:
            jax.tree.map(np.testing.assert_array_equal, model.params, expected.params)


def test_damaged_weights(tmp_path):
    """There is no checksum: one stretch of values may differ, or two tensors change places."""
    directory = Path(shutil.copytree(MODELS / "qwen3", tmp_path / "model"))
    expected = load(directory)
    file = directory / "model.safetensors"
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for content in damaged(whole, 200, first=header):
        file.write_bytes(content)
        model = attempt(lambda: load(directory), directory)
        if model is not None:
            assert len(content) == len(whole)
            assert model.config == expected.config
            leaves = zip(*map(jax.tree.leaves, (model.params, expected.params)), strict=True)
            equal = [np.array_equal(a, b, equal_nan=True) for a, b in leaves]
            assert equal.count(False) <= (0 if content[header:] == whole[header:] else 2)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_damaged_tokenizers(tmp_path, name, file):
    directory = Path(shutil.copytree(TOKENIZERS / name, tmp_path / "model"))
    for content in damaged((directory / file).read_bytes(), 300):
        (directory / file).write_bytes(content)
        tokenizer = attempt(lambda: Tokenizer.load(directory), directory)
        if tokenizer is not None:
            use(tokenizer)


def use(tokenizer: Tokenizer) -> None:
    """Damage that only shows in use raises ValueError there."""
    text = "a her <|end|> b \u00e9\n"
    with contextlib.suppress(ValueError):
        tokenizer.decode(tokenizer.encode(text))
    with contextlib.suppress(ValueError):
        tokenizer.encode(text, plain=True)
    with contextlib.suppress(ValueError):
        tokenizer.encode_chat([{"role": "user", "content": "a <|start|>"}])


def test_damaged_caches(tmp_path):
    model = tiny.config()
    cache = empty_cache(model, 1, 128, jnp.float32, jnp.zeros(1, jnp.int32))
    cache = cache.replace(k=cache.k + 1, v=cache.v + 2)
    file = tmp_path / "cache"
    save_cache(file, cache, fingerprint="model-a")
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for content in damaged(whole, 400, first=header):
        file.write_bytes(content)
        loaded = attempt(lambda: load_cache(file, fingerprint="model-a"), file)
        if loaded is not None:
            jax.tree.map(np.testing.assert_array_equal, loaded, cache)


@pytest.mark.parametrize("file", ["lookahead_model.safetensors", "lookahead_config.json"])
def test_damaged_modules(tmp_path, file):
    model = tiny.config()
    params = tiny.params(model)
    config = LookaheadConfig(tokens=4, rank=2, alpha=4.0, targets=("q", "v"), init="normal")
    modules = init_modules(jax.random.key(0), config, model)
    save_modules(tmp_path, modules, params=params)
    for content in damaged((tmp_path / file).read_bytes(), 80):
        (tmp_path / file).write_bytes(content)
        loaded = attempt(lambda: load_modules(tmp_path, params=params, config=model), tmp_path)
        if loaded is not None and loaded.config == modules.config:
            jax.tree.map(np.testing.assert_array_equal, loaded, modules)
