"""Compile the training step for TPUs without having one, and report memory and FLOPs.

    lookahead train compile --topology v5e:16x16 --model llama-3.1-8b --prompt 16384

Weights, state and batch are abstract shapes. The compiler is the real one (package libtpu) and
needs no TPU. A step that does not fit into a chip's memory fails here. Memory is what the compiler
allocates per chip; FLOPs are counted by hand, since compilers count the body of a loop once.
"""

import collections
import dataclasses
import importlib.util
import json
import os
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax.experimental import topologies

from lookahead_jax.checkpoints.hf_config import config_from_hf
from lookahead_jax.host.command import end_process, run_command
from lookahead_jax.model.config import ModelConfig
from lookahead_jax.model.params import abstract_params
from lookahead_jax.model.sharding import make_mesh
from lookahead_jax.modules.definition import TARGETS, LookaheadConfig, init_modules
from lookahead_jax.train.batches import Batch
from lookahead_jax.train.flops import training_flops
from lookahead_jax.train.optimizer import OptimizerConfig, make_optimizer
from lookahead_jax.train.shapes import SHAPES
from lookahead_jax.train.step import compile_step, init_state

GIB = 2**30
ENVIRONMENT = {  # read by the TPU compiler at its start; without a TPU it cannot query a host
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
HBM = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "tpu7x": 192}  # GiB of a chip, as published


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compile:
    """Compile the training step for a TPU topology, from abstract shapes."""

    topology: str
    """Kind and shape of the slice: v5e:16x16, v5p:4x4x4, ..."""
    model: str = "llama-3.1-8b"
    """A published shape (train/shapes.py)."""
    prompt: int = 16384
    """Tokens per prompt."""
    response: int = 512
    """Tokens per response."""
    batch: int = 32
    """Rows per step, over all chips."""
    tensor: int = 8
    """Ways to split heads and MLP; at most the number of KV heads."""
    fsdp: int = 1
    """Ways to split the model dimension of the weights, and the batch."""
    tokens: int = 32
    """Lookahead tokens M."""
    rank: int = 8
    """LoRA rank R."""


def compile_training_step(options: Compile) -> dict[str, Any]:
    """Compiles and reports; raises the compiler's own error where the step does not fit."""
    if options.model not in SHAPES:
        raise ValueError(f"unknown model {options.model!r}; known: {', '.join(SHAPES)}")
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("the TPU compiler is not installed: pip install 'lookahead-jax[tpu-aot]'")
    config = config_from_hf(SHAPES[options.model])
    jax.config.update("jax_platforms", "cpu")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with tempfile.TemporaryDirectory() as dump:
        wanted = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_pass_label_regex=none"
        before = os.environ.get("LIBTPU_INIT_ARGS", "")  # read when the compiler is loaded
        os.environ["LIBTPU_INIT_ARGS"] = f"{before} {wanted}".strip()
        return _compile(options, config, Path(dump))


def _compile(options: Compile, config: ModelConfig, dump: Path) -> dict[str, Any]:
    topology = topologies.get_topology_desc(platform="tpu", topology_name=options.topology)
    mesh = make_mesh(fsdp=options.fsdp, tensor=options.tensor, devices=topology.devices)
    sizes = LookaheadConfig(
        tokens=options.tokens, rank=options.rank, alpha=32.0, targets=tuple(TARGETS), init="normal"
    )
    optimizer = make_optimizer(OptimizerConfig(rate=1e-3, warmup=152), steps=7600)

    def state():
        return init_state(init_modules(jax.random.key(0), sizes, config), optimizer)

    def rows(length: int) -> Any:  # a shape, where Batch declares arrays
        return jax.ShapeDtypeStruct((1, options.batch, length), jnp.int32)

    step = compile_step(mesh, config=config, optimizer=optimizer, chunk=options.prompt)
    begin = time.perf_counter()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = step.lower(
            abstract_params(config, jnp.bfloat16),
            jax.eval_shape(state),
            Batch(rows(options.prompt), rows(options.response)),
        )
        program = lowered.compile()
    memory = program.memory_analysis()
    kind = options.topology.partition(":")[0]
    flops = options.batch * training_flops(config, options.prompt, options.response, options.tokens)
    return {
        **dataclasses.asdict(options),
        "chips": len(topology.devices),
        "mesh": dict(mesh.shape),
        "compile_s": round(time.perf_counter() - begin, 1),
        "arguments_gib": round(memory.argument_size_in_bytes / GIB, 3),
        "temporaries_gib": round(memory.temp_size_in_bytes / GIB, 3),
        "peak_gib": round(memory.peak_memory_in_bytes / GIB, 3),
        "hbm_gib": HBM.get(kind),
        "tflops_per_chip": round(flops / len(topology.devices) / 1e12, 2),
        "kernels": collections.Counter(re.findall(r'kernel_name = "(\w+)"', lowered.as_text())),
        "collectives": _collectives(dump),
        "jax": jax.__version__,
    }


def _collectives(dump: Path) -> dict[str, int] | str:
    """How often each collective occurs in the compiled program (in a loop's body: once).

    From the compiler's own dump: jaxlib cannot print every program of a newer libtpu.
    """
    texts = [path.read_text() for path in dump.glob("*-TLP-hlo.txt")]
    step = [text for text in texts if text.startswith("HloModule jit_step,")]
    if not step:
        return "not available: the TPU compiler has written no program"
    names = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
    return {name: step[0].count(f" {name}(") + step[0].count(f" {name}-start(") for name in names}


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    prog = "lookahead train compile"
    return run_command(
        lambda: tyro.cli(Compile, args=args, prog=prog),
        lambda options: print(json.dumps(compile_training_step(options), indent=2)),
        prog=prog,
    )


if __name__ == "__main__":
    end_process(main())
