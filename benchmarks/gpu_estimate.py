"""Counts the bytes that programs compiled for an NVIDIA card move: an estimate, without a card.

Steps of an 8B-shaped model and its prefill are compiled ahead of time for a card's description
(benchmarks/cards/). Bytes and kernels are counted from the result (hlo_traffic.py), next to the
floor: every weight but the embedding table and every filled slot, once. Nothing runs on a card.
Rows "XLA's own options" are the same programs with XLA's default options
(lookahead_jax/model/jit.py).

    pip install jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm \\
        nvidia-cuda-runtime
    python benchmarks/gpu_estimate.py --card h200 --out benchmarks/results/gpu_estimate_h200.json

(the plugins of the installed jax's version, 0.11 or newer; no driver is needed).
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from common import Help, commit, parse, save

CARDS = Path(__file__).parent / "cards"
BANDWIDTH = {"h100": 3.35e12, "h200": 4.8e12}  # byte/s, datasheets
FLOPS = 989e12  # dense bfloat16 of both, datasheets
Row = tuple[str, Callable[[], dict[str, Any]]]


def environment() -> dict[str, str]:
    """Environment of a process that compiles for CUDA: the compiler's folder, and no device."""
    found = importlib.util.find_spec("nvidia")
    bases = [] if found is None else [Path(p) for p in found.submodule_search_locations or ()]
    folders = [base / name for base in bases for name in ("cu13", "cuda_nvcc")]
    cuda = next((folder for folder in folders if (folder / "bin" / "ptxas").exists()), None)
    if cuda is None:
        raise SystemExit("NVIDIA's compiler is not installed: pip install nvidia-cuda-nvcc")
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PATH": f"{cuda / 'bin'}:{os.environ['PATH']}",
        "CUDA_ROOT": str(cuda),
        "LD_LIBRARY_PATH": ":".join(str(p) for p in cuda.parent.glob("*/lib")),
        "XLA_FLAGS": f"--xla_gpu_cuda_data_dir={cuda} --xla_gpu_autotune_level=0",
    }


class Card:
    """Compiles for a card that is not present."""

    def __init__(self, name: str):
        import jax
        import numpy as np
        from jax._src.cudnn import fused_attention_stablehlo as cudnn
        from jax.experimental import topologies
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        from lookahead_jax.kernels import causal_attention

        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="", topology="1x1x1",
            target_config=(CARDS / f"{name}.pbtxt").read_text(),
        )  # fmt: skip
        self.mesh = Mesh(np.array(topology.devices[:1]), ("x",))
        self.place = NamedSharding(self.mesh, PartitionSpec())
        # JAX asks the driver which cuDNN there is while it traces; the program is the same.
        cudnn.check_cudnn_version = lambda: 91400
        cudnn.check_compute_capability = lambda capability: True
        unsupported = causal_attention._unsupported
        causal_attention._unsupported = lambda name, *a: (
            None if name == "cudnn" else unsupported(name, *a)
        )
        jax.config.update("jax_enable_compilation_cache", False)

    def put(self, tree: Any) -> Any:
        """Abstract arrays placed on the card."""
        import jax

        def placed(a):
            return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=self.place)

        return jax.tree.map(placed, tree)

    def compile(
        self, f: Callable[..., Any], *arguments: Any, own: bool = False, donated: Any = ()
    ) -> Any:
        """`f`, jitted and compiled; with `own`, by XLA's default options."""
        import jax

        from lookahead_jax.model.jit import compiler_options

        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            options = {} if own else compiler_options()
            jitted = jax.jit(f, compiler_options=options, donate_argnums=donated)
            return jitted.lower(*arguments).compile()


def counted(program: Any) -> dict[str, Any]:
    """Bytes and kernels of a compiled program, and its temporaries."""
    from hlo_traffic import traffic

    found = traffic(program.as_text())
    temporaries = program.memory_analysis().temp_size_in_bytes
    return {"gb": found.bytes / 1e9, "kernels": found.kernels, "temporaries_mb": temporaries / 1e6}


def shapes() -> tuple[Any, Any, Any]:
    """Configuration, parameters and lookahead modules of the 8B model, without arrays."""
    import gpu_subject
    import jax
    import jax.numpy as jnp

    import lookahead_jax as lk
    from lookahead_jax.model.params import init_params
    from lookahead_jax.train.shapes import SHAPES

    config = lk.config_from_hf(SHAPES["llama-3.1-8b"])
    make = partial(init_params, config=config, dtype=jnp.bfloat16)
    modules = jax.eval_shape(partial(gpu_subject.random_modules, config))
    return config, jax.eval_shape(make, jax.random.key(0)), modules


def steps(card: Card, bandwidth: float) -> Iterator[Row]:
    """A token of a burst for several cache sizes, and a step of several nodes."""
    import gpu_subject
    import jax
    import jax.numpy as jnp

    from lookahead_jax.decoding.step import decode_burst

    config, params, _ = shapes()

    def next_to_floor(program: Any, entries: int) -> dict[str, Any]:
        found, floor = counted(program), gpu_subject.step_bytes(entries, params, config)
        beside = {"floor_gb": floor / 1e9, "floor_ms": 1e3 * floor / bandwidth}
        return found | beside | {"times_floor": 1e9 * found["gb"] / floor}

    def decode(entries: int, own: bool) -> dict[str, Any]:
        def burst(params, state, steps):
            return decode_burst(params, state, config=config, steps=steps)

        state = jax.eval_shape(partial(gpu_subject.opened, entries, 64, config))
        arguments = (params, state, jax.ShapeDtypeStruct((), jnp.int32))
        return next_to_floor(card.compile(burst, *card.put(arguments), own=own, donated=1), entries)

    def step(nodes: int) -> dict[str, Any]:
        entries = 1024
        cache = jax.eval_shape(partial(gpu_subject.filled_cache, entries, 128, config))
        tokens = jax.ShapeDtypeStruct((1, nodes), jnp.int32)
        run = partial(gpu_subject.one_step, entries, config)
        return next_to_floor(card.compile(run, *card.put((params, cache, tokens))), entries)

    yield "token, 1024 entries, XLA's own options", partial(decode, 1024, True)
    for entries in (128, 1024, 2048, 8192, 32768):
        yield f"token, {entries} entries", partial(decode, entries, False)
    for nodes in (8, 64, 128):
        yield f"step of {nodes} nodes, 1024 entries", partial(step, nodes)


def reading(card: Card, bandwidth: float) -> Iterator[Row]:
    """A prompt, and the additional traffic of a policy's scoring and eviction."""
    import gpu_subject
    import jax
    import jax.numpy as jnp

    import lookahead_jax as lk

    config, params, modules = shapes()
    alone: dict[int, dict[str, Any]] = {}

    def read(tokens: int, label: str) -> dict[str, Any]:
        name, fields = gpu_subject.POLICIES[label]
        policy = lk.make_policy(name, **fields)

        def run(params, text, modules):
            return lk.read_prompt(
                params, text, config=config, policy=policy, budget=128, new_tokens=64,
                modules=modules,
            )  # fmt: skip

        text = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
        found = counted(card.compile(run, *card.put((params, text, modules))))
        flops = 2 * tokens * sum(a.size for a in jax.tree.leaves(params["layers"]))
        flops += 2 * config.num_layers * config.num_heads * config.head_dim * tokens**2
        found["compute_ms"] = 1e3 * flops / FLOPS
        first = alone.setdefault(tokens, found)
        if first is not found:
            more = found["gb"] - first["gb"]
            found["more_gb"] = more
            found["more_percent"] = 1e14 * more / bandwidth / first["compute_ms"]
        return found

    for tokens in (8192, 32768):
        for label in ("prefill alone", "lookaheadkv", "snapkv"):
            yield f"prompt of {tokens}, {label}", partial(read, tokens, label)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    card: Annotated[str, Help("card to compile for", tuple(BANDWIDTH))] = "h200"
    out: Annotated[Path | None, Help("file of the counts, as JSON")] = None
    child: Annotated[bool, Help(None)] = False


def main() -> None:
    options = parse(Options, __doc__)
    if not options.child:  # the compiler's folder must be known before JAX starts
        command = [sys.executable, __file__, "--child", *sys.argv[1:]]
        raise SystemExit(subprocess.run(command, env=environment()).returncode)

    import jax

    card = Card(options.card)
    report: dict[str, Any] = {
        "what": "bytes and kernels of compiled programs; nothing was run on a card",
        "card": options.card, "commit": commit(), "jax": jax.__version__, "rows": {},
    }  # fmt: skip
    for section in (steps, reading):
        for label, count in section(card, BANDWIDTH[options.card]):
            report["rows"][label] = count()
            print(label, json.dumps(report["rows"][label]), flush=True)
    if options.out is not None:
        save(options.out, report)


if __name__ == "__main__":
    main()
