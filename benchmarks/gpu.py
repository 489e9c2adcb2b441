"""Measures kernels and the whole pipeline on one accelerator, in sections that can be resumed.

    python benchmarks/gpu.py --minutes 9          # repeat until nothing is left to measure
    python benchmarks/gpu.py --section ttft       # one section
    python benchmarks/gpu.py --table              # the merged report as a table

Sections, the most useful first: ceilings (the others refer to it), ttft (time to the first
token), decode, compilers and graph (decoding compiled in other ways), steps (of 1 to 128 nodes),
scores and attention (every kernel is checked against float64 NumPy before it is timed), long (128K
tokens), train, peer (transformers + kvpress on the same card, "not run" where not installed),
select, drafting (the embedded model), memory. All but kernels and drafting use an 8B-shaped random
model in bfloat16. Together they take about 36 minutes on an H100 or H200 by estimate (`SECTIONS`),
half of it compiling.

Every measurement is written at once to one JSON file per card and commit; a later run skips it.
Each section is a process: if a kernel hangs or takes the device down, that measurement becomes an
error and the section continues with the next one. --again repeats errors. --smoke runs everything
at toy sizes on any machine, in one process, and writes no report. docs/gpu.md lists the
requirements and says how to add kvpress.
"""

import dataclasses
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

from common import RESULTS, Help, commit, parse

SECTIONS = {  # seconds: the largest estimate for one measurement
    "ceilings": 20, "ttft": 120, "decode": 45, "compilers": 60, "graph": 60, "steps": 40,
    "scores": 30, "attention": 30, "long": 240, "train": 90, "peer": 60, "select": 20,
    "drafting": 60, "memory": 40,
}  # fmt: skip
GRAPHS = (  # allows loops in CUDA graphs
    "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,"
    "WHILE --xla_gpu_command_buffer_unroll_loops=true"
)
ENVIRONMENT = {  # for the process of a section
    "peer": {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},  # it has an allocator of its own
    "graph": {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {GRAPHS}"},
}
UNFINISHED = "began and did not end"
PATIENCE = 2  # a process is killed after a minute plus this many times the estimate without output


def items(section: str, smoke: bool, report: dict[str, Any]) -> Iterator[Any]:
    """The (label, measurement) pairs of a section. Importing the measuring modules starts JAX."""
    import gpu_kernels
    import gpu_model

    return (gpu_kernels.SECTIONS | gpu_model.SECTIONS)[section](smoke, report)


def run_section(
    name: str,
    smoke: bool,
    report: dict[str, Any],
    save: Callable[[], None],
    *,
    again: bool = False,
    until: float = float("inf"),
) -> None:
    """Measures what the report lacks, and saves before and after every measurement."""
    part = report.setdefault(name, {})
    for label, measure in items(name, smoke, report):
        if label in part and not (again and "error" in part[label]):
            continue
        if time.time() + SECTIONS[name] > until:
            return
        part[label] = {"error": UNFINISHED}
        save()
        print(name, label, "begins", flush=True)
        began = time.perf_counter()
        try:
            found = measure()
        except Exception as error:  # out of memory or not supported: the others still run
            if smoke:
                raise
            found = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        part[label] = {**found, "wall_s": round(time.perf_counter() - began, 1)}
        save()
        print(name, label, json.dumps(part[label]), flush=True)


def supervise(command: list[str], patience: float, env: Any = None) -> int | None:
    """Forwards the output of a process; its exit status, or None if it hung and was killed."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    )
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        while (line := lines.get(timeout=patience)) is not None:
            print(line, end="", flush=True)
        return process.wait(timeout=patience)
    except (queue.Empty, subprocess.TimeoutExpired):
        return None
    finally:
        process.kill()
        process.wait()


def in_processes(sections: list[str], arguments: list[str], until: float) -> None:
    """Every section in its own process; after a crash, a new process continues after it."""
    for name in sections:
        command = [sys.executable, __file__, "--child", "--section", name, *arguments]
        command += ["--until", str(until)]
        env = os.environ | ENVIRONMENT.get(name, {})
        for _ in range(10):
            if time.time() + SECTIONS[name] > until:
                break
            status = supervise(command, PATIENCE * SECTIONS[name] + 60, env)
            if status == 0:
                break
            # Only the first process repeats errors; the next one would repeat the crash.
            command = [word for word in command if word != "--again"]
            said = "was silent and is killed" if status is None else f"ended with {status}"
            print(f"{name}: the process {said}", flush=True)


def shown(value: Any) -> str:
    """A measurement as text for the table."""
    if isinstance(value, dict):
        parts = ((k, v) for k, v in value.items() if k != "wall_s")
        return ", ".join(
            f"{k}: ({shown(v)})" if isinstance(v, dict) else f"{k} {shown(v)}" for k, v in parts
        )
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(report: dict[str, Any]) -> str:
    """The report as Markdown, one row per measurement."""
    rows = [f"{report['device']}, jax {report['jax']}, commit {report['commit']}", ""]
    rows += ["| section | measurement | result |", "| --- | --- | --- |"]
    for section in SECTIONS:
        for label, found in report.get(section, {}).items():
            rows.append(f"| {section} | {label} | {shown(found)} |")
    return "\n".join(rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    section: Annotated[
        tuple[str, ...],
        Help("a section, once per section; by default all", tuple(SECTIONS), repeated=True),
    ] = ()
    minutes: Annotated[float, Help("nothing begins that would end later, by estimate")] = 9.0
    smoke: Annotated[bool, Help("toy sizes on any machine; writes no report")] = False
    again: Annotated[bool, Help("repeat measurements that ended in an error")] = False
    table: Annotated[bool, Help("print the reports as Markdown and measure nothing")] = False
    results: Annotated[Path, Help("folder of the reports")] = RESULTS
    commit: Annotated[str | None, Help("name of the measured code; by default git's commit")] = None
    compiled: Annotated[Path, Help("folder of compiled programs, shared by the processes")] = (
        Path(tempfile.gettempdir()) / "lookahead-gpu-compiled"
    )
    child: Annotated[bool, Help(None)] = False
    until: Annotated[float, Help(None)] = float("inf")


def measure_here(options: Options) -> None:
    """The sections in this process."""
    import jax

    from lookahead_jax.host.files import atomic_write

    if not options.smoke:
        # Processes share their compiled programs.
        jax.config.update("jax_compilation_cache_dir", str(options.compiled))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    device = jax.devices()[0].device_kind
    card = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    path = options.results / f"gpu-{card}-{options.commit}.json"
    report: dict[str, Any] = {"device": device, "jax": jax.__version__, "commit": options.commit}
    if path.exists() and not options.smoke:
        report = json.loads(path.read_text())

    def save() -> None:
        if not options.smoke:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, json.dumps(report, indent=1) + "\n")

    for name in options.section or SECTIONS:
        run_section(name, options.smoke, report, save, again=options.again, until=options.until)


def main() -> None:
    options = parse(Options, __doc__)
    options = dataclasses.replace(options, commit=options.commit or commit())
    if options.table:
        for path in sorted(options.results.glob(f"gpu-*-{options.commit}.json")):
            print(table(json.loads(path.read_text())))
    elif options.child or options.smoke:
        measure_here(options)
    else:
        passed = ["--results", str(options.results), "--commit", options.commit]
        passed += ["--compiled", str(options.compiled), *(["--again"] * options.again)]
        until = time.time() + 60 * options.minutes
        in_processes(options.section or list(SECTIONS), passed, until)


if __name__ == "__main__":
    main()
