"""Base forwards on disk: what the base model computes for a row is computed once.

Training changes only the modules, so that every later epoch, seed or variant meets the same keys,
values and targets. A file per row is named after its tokens; keys and values are float16.
Letters: A micro-batches, B rows of one, L layers, K KV heads, T prompt, H head dim.
"""

import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lookahead_jax.host.files import load_arrays, save_arrays
from lookahead_jax.host.run_folder import keep_settings
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.jit import compiler_options
from lookahead_jax.model.parameter_specs import WeightType
from lookahead_jax.model.params import Params
from lookahead_jax.model.sharding import param_shardings, sharding
from lookahead_jax.train.batches import Batch, ForwardBatch, forward_sharding
from lookahead_jax.train.objective import BaseForward, base_forward

_DTYPE = np.float16
_LAYERS = ("k", "v", "mean", "max")


def bytes_per_token(config: ModelConfig) -> int:
    """Bytes that a token of a prompt takes on disk."""
    kept = 2 * config.num_kv_heads * config.head_dim * np.dtype(_DTYPE).itemsize
    return config.num_layers * (kept + 2 * config.num_heads * np.dtype(np.float32).itemsize)


class ForwardStore:
    """The base forwards in one folder, for one base model and the devices of one process."""

    def __init__(
        self,
        folder: Path,
        params: Params,
        *,
        config: ModelConfig,
        mesh: Mesh,
        base_fingerprint: str,
        chunk: int | None,
        weights: WeightType | None = None,
    ):
        """Opens or makes `folder`. `params` lie on the mesh; `weights` is their type.

        Raises ValueError for a folder of another model, or where several processes train.
        """
        if jax.process_count() > 1:
            raise ValueError(
                f"forwards {folder}: one process can keep base forwards, and "
                f"{jax.process_count()} train; leave it out"
            )
        keep_settings(folder, {"base_fingerprint": base_fingerprint, "weights": weights}, "*.npz")
        self._folder, self._params, self._shardings = folder, params, forward_sharding(mesh)
        rows: Any = sharding(("batch",), mesh)
        layers: Any = sharding((None, "batch"), mesh)

        def run(params: Params, prompts: jax.Array, responses: jax.Array) -> BaseForward:
            return base_forward(
                params, prompts, responses, config=config, dtype=jnp.dtype(_DTYPE), chunk=chunk
            )

        self._run = jax.jit(
            run,
            in_shardings=(param_shardings(config, mesh, weights), rows, rows),
            out_shardings=BaseForward(layers, layers, layers, layers, rows, rows, rows),
            compiler_options=compiler_options(),
        )

    def batch(self, batch: Batch) -> ForwardBatch:
        """The base forwards of a batch's rows; those that are not in the folder are made.

        Raises ValueError if keys or values exceed float16.
        """
        prompts, responses = np.asarray(batch.prompts), np.asarray(batch.responses)
        paths = [
            [self._path(prompt, response) for prompt, response in zip(*part, strict=True)]
            for part in zip(prompts, responses, strict=True)
        ]
        for part, (rows, answers) in zip(paths, zip(prompts, responses, strict=True), strict=True):
            if not all(path.is_file() for path in part):
                self._make(part, rows, answers)
        read = [[load_arrays(path) for path in part] for part in paths]
        width = prompts.shape[-1]
        arrays: dict[str, Any] = {
            name: np.stack([_stacked([row[name] for row in part], width) for part in read])
            for name in _LAYERS
        }
        arrays["length"] = (prompts >= 0).sum(-1, dtype=np.int32)
        arrays["answered"] = (responses >= 0).sum(-1, dtype=np.int32)
        arrays["responses"] = responses
        return jax.device_put(ForwardBatch(BaseForward(**arrays)), self._shardings)

    def _path(self, prompt: np.ndarray, response: np.ndarray) -> Path:
        tokens = [row[row >= 0].astype("<i4").tobytes() for row in (prompt, response)]
        digest = hashlib.sha256(len(tokens[0]).to_bytes(8, "little") + b"".join(tokens))
        return self._folder / f"{digest.hexdigest()[:32]}.npz"

    def _make(self, paths: list[Path], prompts: np.ndarray, responses: np.ndarray) -> None:
        """Writes the rows [B, ...] that are missing; all of them are run, in one shape."""
        made = self._run(self._params, prompts, responses)
        arrays = {name: np.asarray(getattr(made, name)) for name in _LAYERS}
        for row, (path, length) in enumerate(zip(paths, np.asarray(made.length), strict=True)):
            kept = {
                name: array[:, row, :, :length] for name, array in arrays.items()
            }  # [L, K, T, H] or [L, N, T]
            if not all(np.isfinite(array).all() for array in kept.values()):
                raise ValueError(
                    f"{path}: keys or values of a row exceed float16 or are not numbers; train "
                    "without forwards"
                )
            if not path.is_file():
                save_arrays(path, **kept)


def _stacked(rows: list[np.ndarray], width: int) -> np.ndarray:
    """Rows [L, heads, T, ...] of different lengths as one array [L, B, heads, width, ...]."""
    first = rows[0]
    shape = (first.shape[0], len(rows), first.shape[1], width, *first.shape[3:])
    padded = np.zeros(shape, first.dtype)
    for row, array in enumerate(rows):
        padded[:, row, :, : array.shape[2]] = array
    return padded
