"""Checkpoints of a training run: written in the background, checked leaf by leaf when read.

Orbax does the writing. A step holds the modules, the optimizer and a JSON item with the sizes, the
next step (also the position in the data, which is a function of it) and a SHA-256 of every leaf:
storage that flips a byte would otherwise go unnoticed.
"""

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

_LOG = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run. Close it: the last one is complete only then."""

    def __init__(self, directory: str | os.PathLike, *, keep: int, identity: dict[str, Any]):
        """Opens or makes `directory`, which keeps the latest `keep` steps.

        `identity` is JSON that describes the run (sizes, base model, seed): a step of another
        identity is an error, not damage.
        """
        self._path = Path(directory).absolute()
        self._identity = identity
        self._manager = ocp.CheckpointManager(
            self._path, options=ocp.CheckpointManagerOptions(max_to_keep=keep)
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def save(self, step: int, state: Any) -> None:
        """Copies the state after `step` steps and writes it in the background."""
        if step in self._manager.all_steps():
            return
        about = {"step": step, "identity": self._identity, "sha256": digests(state)}
        items = {"state": ocp.args.StandardSave(state), "about": ocp.args.JsonSave(about)}
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """The newest intact step and its state, placed as `like`; None if there is none.

        Damaged steps are reported and moved to the folder `damaged` next to the checkpoints. All
        processes return the same step. Raises ValueError if a step belongs to another run.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            state, problem = None, None
            try:
                state = self._read(step, like)
            except _OtherRun:
                raise
            except Exception as error:  # damage shows as almost any exception
                problem = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            if _everywhere(problem is None):
                return step, state
            _LOG.warning(
                "checkpoint %d is damaged (%s): moved aside, trying the one before",
                step,
                problem or "found by another process",
            )
            self._move_aside(step)
        return None

    def _read(self, step: int, like: Any) -> Any:
        def read(**items: Any) -> Any:
            return self._manager.restore(step, args=ocp.args.Composite(**items))

        about = read(about=ocp.args.JsonRestore())["about"]
        if about["identity"] != self._identity:
            own = self._identity
            changed = [name for name in own if about["identity"].get(name) != own[name]]
            raise _OtherRun(
                f"{self._path} belongs to another run ({', '.join(changed)} differ): "
                "choose another run directory"
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        state = read(state=ocp.args.StandardRestore(abstract))["state"]
        actual = digests(state)
        wrong = [name for name, digest in about["sha256"].items() if actual.get(name) != digest]
        if wrong or len(actual) != len(about["sha256"]):
            raise ValueError(f"the checksum of {wrong[0] if wrong else 'a leaf'} does not match")
        return state

    def _move_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            aside = self._path.parent / "damaged"
            aside.mkdir(exist_ok=True)
            taken = len(list(aside.glob(f"{step}.*")))
            os.replace(self._path / str(step), aside / f"{step}.{taken}")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoint")
        self._manager.reload()


class _OtherRun(ValueError):
    pass


def digests(tree: Any) -> dict[str, str]:
    """SHA-256 of type, shape and bytes of every leaf (which must be replicated), by path."""
    by_path = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        values = np.asarray(leaf)
        digest = hashlib.sha256(f"{values.dtype} {values.shape}".encode())
        digest.update(np.ascontiguousarray(values).data)
        by_path[jax.tree_util.keystr(path)] = digest.hexdigest()
    return by_path


def _everywhere(fine: bool) -> bool:
    """Whether `fine` holds on every process."""
    if jax.process_count() == 1:
        return fine
    return bool(np.all(multihost_utils.process_allgather(np.asarray(fine))))
