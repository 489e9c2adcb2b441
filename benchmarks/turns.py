"""Two libraries on the same weights and prompt, in processes of their own that take turns.

Every repetition measures both sides, one right after the other, and ratios are taken per
repetition. So the load of the machine, which changes over minutes, cancels. Cases in which the peer
does the same work share its measurement.
"""

import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from common import commit, machine

CORES = 2
PAUSE_S = 0.5  # threads of the other worker stop spinning
WINDOW, POOL = 64, 5  # of SnapKV


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement: read `tokens` of the prompt, write `new_tokens` greedily."""

    tokens: int
    new_tokens: int
    budget: int | None = None  # SnapKV's entries per head; None: the full cache
    weights: str = "float32"
    cache: str = "float32"

    @property
    def name(self) -> str:
        kept = "full" if self.budget is None else f"SnapKV {self.budget}"
        eight = [n for n in ("weights", "cache") if getattr(self, n) == "int8"]
        return ", ".join([kept, *([f"int8 {' and '.join(eight)}"] * bool(eight))])


class Ours:
    """This library in the calling environment."""

    def __init__(self, path: str, prompt: list[int]):
        import jax

        self.path, self.prompt = path, prompt
        self.loaded: dict[str, tuple] = {}  # by dtype of the weights
        self.versions = {"jax": jax.__version__}

    def _model(self, weights: str) -> tuple:
        from lookahead_jax.checkpoints.load import load
        from lookahead_jax.model.params import unstack

        if weights not in self.loaded:
            eight = "int8" if weights == "int8" else None
            model = load(self.path, dtype="float32", weights=eight)
            self.loaded[weights] = model.config, unstack(model.params)
        return self.loaded[weights]

    def run(self, case: dict) -> dict:
        import jax
        import jax.numpy as jnp

        from lookahead_jax.decoding.sampling import GREEDY, sampling_rows
        from lookahead_jax.decoding.state import start
        from lookahead_jax.decoding.step import decode_burst
        from lookahead_jax.policies.full import Full
        from lookahead_jax.policies.snapkv import SnapKV
        from lookahead_jax.prefilling.batching import slots_for
        from lookahead_jax.prefilling.prefill import prefill

        asked = Case(**case)
        config, params = self._model(asked.weights)
        prompt = jnp.asarray([self.prompt[: asked.tokens]], jnp.int32)
        budget, new = asked.budget or asked.tokens, asked.new_tokens
        policy = SnapKV(window=WINDOW, pool="avg", kernel=POOL) if asked.budget else Full()
        slots = slots_for(policy, asked.tokens, budget, new, config=config)
        begin = time.perf_counter()
        read = prefill(
            params, prompt, slots=slots, config=config, policy=policy, budget=budget,
            new_tokens=new, cache_dtype="int8" if asked.cache == "int8" else None,
        )  # fmt: skip
        state = start(
            read.cache,
            read.logits,
            sampling=sampling_rows([GREEDY], [0], config.vocab_size),
            limit=jnp.full(1, new, jnp.int32),
            eos=jnp.zeros(0, jnp.int32),
            seen=None,
            width=new,
        )
        kept = jax.block_until_ready(state).cache.length.max().item()
        middle = time.perf_counter()
        state = decode_burst(params, state, config=config, steps=new - 1)
        tokens = state.tokens[0].tolist()
        return measured(begin, middle, kept=kept, tokens=tokens)


def measured(begin: float, middle: float, *, kept: int, tokens: list[int]) -> dict:
    """The result of a case that began, was read and has ended now."""
    return {
        "prefill_s": middle - begin,
        "decode_s": time.perf_counter() - middle,
        "kept": kept,
        "tokens": tokens,
    }


def is_worker(serving: tuple[str, ...] | None, peer: str | None, kind: type) -> bool:
    """Whether this process is a side of the comparison, whose requests it then has answered.

    `serving` is (side, path) of a worker, `kind` the peer's class.
    """
    if serving:
        side, path = serving
        serve(partial(Ours if side == "ours" else kind, path))
        return True
    if not peer:
        raise SystemExit("--peer is needed: the Python of an environment as described in --help")
    return False


def serve(worker: Any) -> None:
    """Answers one request per line of standard input with one line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps the output of libraries apart from the answers
    prompt = json.loads(sys.stdin.readline())
    subject = worker(prompt)
    print(json.dumps(subject.versions), file=answers, flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(subject, name)(*arguments)), file=answers, flush=True)


class Worker:
    """The driver's end of a process that runs `program --serve SIDE PATH`."""

    def __init__(self, python: str, program: str, side: str, path: Path, *, prompt: list[int]):
        cores = sorted(os.sched_getaffinity(0))[:CORES]
        self.process = subprocess.Popen(
            [python, program, "--serve", side, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(CORES)},
        )
        os.sched_setaffinity(self.process.pid, cores)
        self.versions = self._exchange(prompt)

    def ask(self, *request: Any) -> Any:
        return self._exchange(request)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _exchange(self, message: Any) -> Any:
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit("a worker failed; see its error above")
        return json.loads(answer)


def take_turns(ours: Worker, peer: Worker, cases: list[Case], *, repetitions: int) -> list[dict]:
    """Measures `cases` on both sides; `prefill_s` and `decode_s` with the ratios peer / ours.

    The peer does the same work for all of them, so every repetition measures it once. The first
    run of a case, which may compile, is reported apart.
    """
    asked = [dataclasses.asdict(case) for case in cases]

    def here() -> list[dict]:
        return [_rested(ours, one) for one in asked]

    first_here, first_there = here(), _rested(peer, asked[0])
    mine: list[list[dict]] = []  # by repetition and case
    theirs: list[dict] = []
    for repetition in range(repetitions):
        if repetition % 2:
            mine.append(here())
        theirs.append(_rested(peer, asked[0]))
        if not repetition % 2:
            mine.append(here())
    entries = []
    for index, case in enumerate(cases):
        first = {"ours": first_here[index], "peer": first_there}
        entry: dict[str, Any] = {
            "case": case.name,
            "settings": asked[index],
            "kept": {side: first[side]["kept"] for side in first},
            "equal_leading_tokens": _common(first["ours"]["tokens"], first["peer"]["tokens"]),
            "first_run_s": {s: first[s]["prefill_s"] + first[s]["decode_s"] for s in first},
        }
        for what in ("prefill_s", "decode_s"):
            times = {"ours": [row[index][what] for row in mine], "peer": [r[what] for r in theirs]}
            ratios = [p / o for o, p in zip(times["ours"], times["peer"], strict=True)]
            entry[what] = times | {
                "ratio_median": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
            }
        entries.append(entry)
    return entries


def _rested(worker: Worker, asked: dict) -> dict:
    """The result of a run that begins when the other worker's threads have stopped spinning."""
    time.sleep(PAUSE_S)
    return worker.ask("run", asked)


def ran(program: str, *arguments: str) -> dict[str, Any]:
    """What a report says about a run of `program` with these arguments."""
    return {
        "command": " ".join(["python", f"benchmarks/{program}", *arguments]),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "machine": machine(CORES),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
    }


def rows_of(entry: dict, floor: dict | None = None) -> list[list[str]]:
    """Rows of a table: case, phase, here, there, ratio, floor."""
    new, rows = entry["settings"]["new_tokens"], []
    for what, phase in (("prefill_s", "prefill"), ("decode_s", "decoding")):

        def show(seconds: float, what: str = what) -> str:
            if what == "prefill_s":
                return f"{seconds * 1e3:.0f} ms"
            return f"{(new - 1) / seconds:.0f} tokens/s"

        e = entry[what]
        here, there = (show(statistics.median(e[side])) for side in ("ours", "peer"))
        ratio = f"{e['ratio_median']:.2f} ({e['ratio_min']:.2f} to {e['ratio_max']:.2f})"
        bound = [show(floor[what])] if floor else []
        rows.append([entry["case"], phase, here, there, ratio, *bound])
    return rows


def _common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
