"""Estimates the TPU kernels from the TPU compiler's schedule, without a TPU.

Each kernel is compiled ahead of time for real shapes (package libtpu, extra `tpu-aot`), and the
compiler's dumps are read: memory, spills, and the final static schedule (VLIW bundles of a grid
step times the steps, at the chip's clock). The schedule ignores waiting for memory and counts code
that runs only at a row's first or last step as if it ran at each; the longer of schedule and
roofline is a lower bound of the time. --reading adds whole prompts by XLA's own estimate of cycles,
which needs jax 0.11 or newer. Nothing here has been timed on a TPU.

    python benchmarks/tpu_estimate.py --reading --out benchmarks/results/tpu_estimate.json
"""

import dataclasses
import functools
import json
import math
import os
import re
import tempfile
from pathlib import Path
from typing import Annotated, Any

from common import Help, commit, parse, save

KERNELS = ("importance_row_lse", "importance_column_scores", "block_attention")
UNITS = [
    "MATMUL",
    "MATPUSH",
    "XLU",
    "VALU",
    "VPOP",
    "EUP",
    "VLOAD",
    "FILL",
    "VSTORE",
    "SPILL",
    "SALU",
]


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip as published; the clock follows from the peak and the number of matrix units."""

    topology: str
    cores: int
    clock: float  # Hz; of v6e not published, assumed equal to v5p's
    bandwidth: float  # byte/s
    flops: float  # bfloat16


CHIPS = {
    "v5e": Chip("v5e:2x4", 1, 1.5e9, 819e9, 197e12),
    "v5p": Chip("v5p:2x2x1", 2, 1.75e9, 2765e9, 459e12),
    "v6e": Chip("v6e:2x4", 1, 1.75e9, 1640e9, 918e12),
}


def read_schedule(dump: Path, kernel: str) -> dict[str, Any] | None:
    """Bundles of the grid loop's body, its trips, and how full its slots are; None: not dumped."""
    found = sorted(dump.glob(f"*-{kernel}*-final_bundles.txt"))
    found = [path for path in found if "schedule-analysis" not in path.name]
    if not found:
        return None
    text = found[-1].read_text()
    table = next(dump.glob(f"{found[-1].name.partition('-')[0]}-{kernel}*utilization.txt"))
    lines = table.read_text().splitlines()
    capacity = [int(n) for n in lines[2].split()]
    rows = [[int(n) for n in line.split()] for line in lines[4:] if line[:1].isdigit()]
    first, last, steps = 0, len(rows), 1  # a grid of one step has no loop
    if (body := re.search(r"^\s*(0x[0-9a-f]+) LB:", text, re.M)) is not None:
        first = int(body.group(1), 16)
        # The loop closes with the last branch backwards; its bound is the grid's steps and two.
        closes = re.findall(r"^\s*(0x[0-9a-f]+)\s[^\n]*sbr\.rel \(!%p\d+_p\d+\) target", text, re.M)
        last = int(closes[-1], 16)
        ends = re.findall(r"scmp\.ge\.s32\.totalorder %s\d+_s\d+, (\d+) /\* loop exit test", text)
        steps = int(ends[-1]) - 2
    branches = sorted(_branches(text, first, last))
    used = [sum(row[i] for row in rows[first:last]) for i in range(len(UNITS))]
    shares = (round(n / c / (last - first), 2) for n, c in zip(used, capacity, strict=True))
    return {
        "bundles": last - first,
        "trips": steps,
        "bundles_in_smaller_branches": sum(branches[:-1]),
        "spills": sum(row[UNITS.index("SPILL")] for row in rows),
        "occupied": {unit: share for unit, share in zip(UNITS, shares, strict=True) if share},
    }


def _branches(text: str, first: int, last: int) -> list[int]:
    """Bundles of the loop's conditional parts that have no conditional parts of their own."""
    opened, found, inner = [], [], False
    address = r"^\s*(0x[0-9a-f]+)\s"
    for line in text.splitlines():
        if (at := re.match(address, line)) is None or not first <= int(at.group(1), 16) <= last:
            continue
        if (branch := re.search(r"sbr\.rel \(%p\w+\) target = \$region(\d+)", line)) is not None:
            opened.append((int(branch.group(1)) - 1, int(at.group(1), 16)))
            inner = True
        while opened and re.search(rf"End region {opened[-1][0]} ", line + " "):
            if inner:
                found.append(int(at.group(1), 16) - opened[-1][1])
            opened.pop()
            inner = False
    return found


def read_vmem(dump: Path, kernel: str) -> int | None:
    """Bytes of vector memory that the kernel's buffers take, from the compiler's report."""
    sizes = []
    for path in dump.glob("*vmem_report.html"):
        data = re.search(r"const DATA ?= ?(\{.*?\});\s*\n", path.read_text(), re.S)
        entries = json.loads(data.group(1))["hlo_breakdowns"] if data else {}
        sizes += [e["total_size"] for name, e in entries.items() if name.startswith(kernel)]
    return max(sizes, default=None)


def compile_spec(spec: Any, mesh: Any, dtype: Any) -> Any:
    """The operation compiled for a mesh: rows over data, heads over tensor."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from lookahead_jax.kernels.specs import call

    def place(name, shape):
        size = mesh.shape["tensor"]
        axis = 2 if name == "q" else 1
        split = name in ("q", "own_k", "own_v", "k", "v", "length", "lse", "pos")
        split = split and shape.shape[axis] % size == 0
        names = [None] * len(shape.shape)
        names[0] = "data" if shape.shape[0] % mesh.shape["data"] == 0 else None
        if split:
            names[axis] = "tensor"
        sharding = NamedSharding(mesh, PartitionSpec(*names))
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    arguments = {name: place(name, shape) for name, shape in spec.shapes(dtype).items()}
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        run = functools.partial(call, spec, implementation="pallas_tpu", scale=0.088)
        return jax.jit(run).lower(arguments).compile()


def estimate(spec: Any, kind: str, dump: Path) -> dict[str, Any]:
    """Compiles one spec for one chip and reads the compiler's dumps."""
    import jax.numpy as jnp
    from jax.experimental import topologies

    from lookahead_jax.model.sharding import make_mesh

    chip = CHIPS[kind]
    topology = topologies.get_topology_desc(platform="tpu", topology_name=chip.topology)
    for path in dump.iterdir():
        path.unlink()
    program = compile_spec(spec, make_mesh(devices=topology.devices[:1]), jnp.bfloat16)
    memory = program.memory_analysis()
    kernels, seconds = {}, 0.0
    for name in KERNELS:
        if (schedule := read_schedule(dump, name)) is not None:
            steps = schedule["trips"] * chip.cores  # the dump shows one core's share
            schedule["bundles_per_key"] = round(
                schedule["bundles"] * steps / (spec.batch * spec.kv_heads * spec.keys), 3
            )
            schedule["ms"] = round(1e3 * schedule["bundles"] * schedule["trips"] / chip.clock, 4)
            schedule["vmem_bytes"] = read_vmem(dump, name)
            kernels[name] = schedule
            seconds += schedule["ms"] / 1e3
    return {
        "spec": spec.name,
        "chip": kind,
        "bytes": spec.key_bytes + spec.output_bytes,
        "flops": spec.flops,
        "exponentials": spec.pairs * (1 if spec.known else 2),
        "temporaries": memory.temp_size_in_bytes,
        "kernels": kernels,
        "schedule_ms": round(1e3 * seconds, 4),
        "memory_ms": round(1e3 * (spec.key_bytes + spec.output_bytes) / chip.bandwidth, 4),
        "matrix_ms": round(1e3 * spec.flops / chip.flops, 4),
    }


def sharded(kind: str = "v5e") -> list[dict[str, Any]]:
    """Both operations on 2x4 chips: batch over 2, heads over 4; which collectives there are."""
    import jax.numpy as jnp
    from jax.experimental import topologies

    from lookahead_jax.kernels.specs import SPECS
    from lookahead_jax.model.sharding import make_mesh

    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[kind].topology)
    mesh = make_mesh(data=2, tensor=4, devices=topology.devices)
    found = []
    for name in ("scores_32k", "tree_64_32k"):
        spec = dataclasses.replace(SPECS[name], batch=4)
        program = compile_spec(spec, mesh, jnp.bfloat16)
        text = program.as_text()
        collectives = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
        found.append(
            {
                "spec": name,
                "mesh": dict(mesh.shape),
                "kernel_calls": text.count('custom_call_target="tpu_custom_call"'),
                "temporaries": program.memory_analysis().temp_size_in_bytes,
                "arguments": program.memory_analysis().argument_size_in_bytes,
                **{c: text.count(f" {c}(") + text.count(f" {c}-start(") for c in collectives},
            }
        )
    return found


def model_step(nodes: int, entries: int, kind: str, dump: Path) -> dict[str, Any]:
    """A whole step of Llama 3.1 8B over `nodes` rows, its heads split over the 2x4 chips.

    Long because the shapes of all its arguments are spelled out.
    """
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    import lookahead_jax as lk
    from lookahead_jax.model.decoder import Block, forward
    from lookahead_jax.model.params import abstract_params
    from lookahead_jax.model.sharding import make_mesh, param_shardings, sharding
    from lookahead_jax.train.shapes import SHAPES

    chip = CHIPS[kind]
    topology = topologies.get_topology_desc(platform="tpu", topology_name=chip.topology)
    mesh = make_mesh(tensor=len(topology.devices), devices=topology.devices)
    config = lk.config_from_hf(SHAPES["llama-3.1-8b"])
    lead = (config.num_layers, 1, config.num_kv_heads)
    place = sharding(("layer", "batch", "kv_heads"), mesh)
    nowhere = sharding((), mesh)

    def shape(dims, dtype, where=nowhere):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=where)

    keys = shape((*lead, entries, config.head_dim), jnp.bfloat16, place)
    row = shape((1,), jnp.int32)
    cache = lk.KVCache(
        k=keys, v=keys, pos=shape((*lead, entries), jnp.int32, place),
        length=shape(lead, jnp.int32, place), next_pos=row, rope_span=row,
    )  # fmt: skip
    params = jax.tree.map(
        lambda a, where: shape(a.shape, a.dtype, where),
        abstract_params(config, jnp.bfloat16),
        param_shardings(config, mesh),
    )

    def step(params, cache, tokens, visible):
        positions = jnp.broadcast_to(cache.next_pos[:, None], tokens.shape)
        x = lk.embed(params, tokens, config=config)
        block = Block(x, positions, cache.rope_span, visible)
        hidden = forward(params, block, cache, config=config).hidden
        return lk.logits(params, hidden, config=config).argmax(-1)

    for path in dump.iterdir():
        path.unlink()
    tokens, visible = shape((1, nodes), jnp.int32), shape((1, nodes, nodes), jnp.bool_)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        program = jax.jit(step).lower(params, cache, tokens, visible).compile()
    memory, text = program.memory_analysis(), program.as_text()
    gathered = re.findall(r"= \(?\w+\[([\d,]+)\][^\n]*? all-gather(?:-start)?\(", text)
    sizes = [math.prod(int(n) for n in dims.split(",")) for dims in gathered]
    schedule = read_schedule(dump, "block_attention")
    seconds = config.num_layers * schedule["bundles"] * schedule["trips"] / chip.clock
    return {
        "step": f"{nodes} nodes over {entries} slots",
        "chips": f"{chip.topology}, tensor {len(topology.devices)}",
        "arguments_per_chip": memory.argument_size_in_bytes,
        "temporaries_per_chip": memory.temp_size_in_bytes,
        "attention_schedule_ms": round(1e3 * seconds, 3),
        "memory_ms": round(1e3 * memory.argument_size_in_bytes / chip.bandwidth, 3),
        "largest_all_gather_elements": max(sizes, default=0),
        "collectives_in_text": {
            name: text.count(f" {name}(") + text.count(f" {name}-start(")
            for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute")
        },
    }


def reading(tokens: int, policy: str, kind: str) -> dict[str, Any]:
    """A prompt of the 8B model on one chip: XLA's own estimate of its loop over the layers.

    It leaves out what XLA does not know: the attention kernels, and scoring's.
    """
    import jax
    import jax.numpy as jnp
    from gpu_estimate import shapes
    from jax.experimental import topologies

    import lookahead_jax as lk
    from lookahead_jax.model.sharding import make_mesh, sharding

    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[kind].topology)
    mesh = make_mesh(devices=topology.devices[:1])
    config, params, modules = shapes()

    def run(params, text, modules):
        return lk.read_prompt(
            params, text, config=config, policy=lk.make_policy(policy), budget=128,
            new_tokens=64, modules=modules,
        )  # fmt: skip

    arguments = (params, jax.ShapeDtypeStruct((1, tokens), jnp.int32), modules)
    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding((), mesh)), arguments
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        program = jax.jit(run).lower(*arguments).compile()
    cycles: dict[str, int] = {}
    name = ""
    for line in program.as_text().splitlines():
        if line.endswith("{") and (found := re.match(r"(?:ENTRY )?%(\S+) \(", line)):
            name = found.group(1)
        for number in re.findall(r'estimated_cycles":"(\d+)"', line):
            if int(number) < 2**62:  # XLA reports this where it has no estimate
                cycles[name] = cycles.get(name, 0) + int(number)
    return {
        "prompt": tokens, "policy": policy, "chip": kind,
        "layer_cycles": max(n for name, n in cycles.items() if not name.startswith("main")),
        "temporaries": program.memory_analysis().temp_size_in_bytes,
    }  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    specs: Annotated[
        tuple[str, ...], Help("names in kernels/specs.py; by default all", nargs="*")
    ] = ()
    chips: Annotated[tuple[str, ...], Help("chips to compile for", tuple(CHIPS), nargs="*")] = (
        tuple(CHIPS)
    )
    reading: Annotated[bool, Help("estimate the reading of whole prompts, too")] = False
    out: Annotated[Path | None, Help("file of the report; without it the report is printed")] = None


def main() -> None:
    options = parse(Options, __doc__)

    from lookahead_jax.train.compile import ENVIRONMENT

    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder)
        flags = (
            f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true "
            "--xla_jf_dump_llo_pass_label_regex=final_.*"
        )
        before = os.environ.get("LIBTPU_INIT_ARGS", "")  # read when the compiler is loaded
        os.environ.update(ENVIRONMENT, JAX_PLATFORMS="cpu", LIBTPU_INIT_ARGS=f"{before} {flags}")
        import jax

        from lookahead_jax.kernels.specs import SPECS

        rows = [
            estimate(SPECS[name], chip, dump)
            for chip in options.chips
            for name in options.specs or SPECS
        ]
        report = {
            "what": "static estimate of the TPU compiler; nothing was run on a TPU",
            "commit": commit(),
            "jax": jax.__version__,
            "rows": rows,
            "sharded": sharded(),
            "steps": [
                model_step(nodes, entries, "v5e", dump)
                for nodes, entries in ((1, 1024), (64, 1024), (1, 262144))
            ],
            "reading": [
                reading(8192, policy, chip)
                for chip in (("v5p", "v6e") if options.reading else ())
                for policy in ("full", "lookaheadkv")
            ],
        }
    if options.out is None:
        print(json.dumps(report, indent=1))
    else:
        save(options.out, report)
        for row in rows:
            times = {k: row[k] for k in ("schedule_ms", "memory_ms", "matrix_ms")}
            print(row["chip"], row["spec"], times)


if __name__ == "__main__":
    main()
