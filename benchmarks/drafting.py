"""Drafted decoding on four kinds of text: tokens per step, drafter time, speed over plain decoding.

Setting: the embedded model, float32, greedy, batch 1, full cache; drafting_texts.py makes the
prompts. Sections run in the given order; each replaces its part of the report when it ends.

    cost        seconds of a step of P nodes: c(P), and c(P) / c(1); and of one whose tree comes
                from the host, begun and waited for by itself, without the drafter's time
    completion, question, editing, free_text
                every drafter at fixed P and as a controller chooses: one that knows nothing
                ("first", the first request of a process) and one that has seen the kind's other
                prompts and keeps learning ("auto", what a long-lived process gets). `speed` is
                plain over drafted seconds, both from the first token on, all that the drafter
                does included; plain runs come right before the drafted ones. It is the median
                over the repetitions. Tokens per step are those of the first repetition.
    replay      the host drafters where the source's own text is written: no model, so no loops
    peer        prompt lookup of transformers on the same weights and prompts

A warm drafter has observed the outputs of the kind's other prompts, a cold one nothing. An output
loops if its last max(3 p, 16) tokens have some period p. The best speed that was possible is the
largest of mean_accepted(P) c(1) / c(P) over the measured P, 1 (plain) included; for host drafters
also with the cost of a step that the host takes part in.

    python -m venv PEER && PEER/bin/pip install torch==2.13.0 'transformers>=4.56,<5.3'
    python benchmarks/drafting.py --peer PEER/bin/python
"""

import dataclasses
import datetime
import inspect
import itertools
import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import RESULTS, Help, commit, machine, parse, save, settings
from drafting_texts import Text, Texts

import lookahead_jax as lk
from lookahead_jax.decoding.device_drafter import NoDrafter
from lookahead_jax.decoding.host_drafter import Draft
from lookahead_jax.decoding.sampling import GREEDY
from lookahead_jax.decoding.tree import NODE_BUCKETS, TokenTree
from lookahead_jax.drafters.registry import make_drafter
from lookahead_jax.model.params import unstack

KINDS = ("completion", "question", "editing", "free_text")
SECTIONS = ("cost", *KINDS, "replay", "peer")
DRAFTERS = {  # label -> (name, warm)
    "trie": ("trie", False),
    "trie, warm": ("trie", True),
    "suffix": ("suffix", False),
    "suffix, warm": ("suffix", True),
    "prompt_lookup": ("prompt_lookup", False),
    "recycling": ("recycling", False),
}
HOST = ("trie", "trie, warm", "suffix", "suffix, warm")
CHOSEN = ("first", "auto")
REPEATED = (8, 16, *CHOSEN)  # other P run once, for their acceptance
PEER_LOOKUP = 10  # tokens of transformers' prompt lookup
LOOKUP_NODES = 16  # room for them


class Run(NamedTuple):
    tokens: list[int]
    steps: int  # forwards after the prompt's
    seconds: float  # from the first token on
    drafter_us: float | None


class Measured(NamedTuple):
    repetition: int
    row: int
    nodes: int | str  # P, or a label in CHOSEN
    plain: Run
    drafted: Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Star(NoDrafter):
    """A tree whose nodes are all valid, made at no cost: measures c(P)."""

    def propose(self, weights, state, root, nodes):
        tokens = jnp.broadcast_to(2 + jnp.arange(nodes, dtype=jnp.int32), (len(root), nodes))
        parents = jnp.zeros_like(tokens).at[:, 0].set(-1)
        return state, TokenTree(tokens.at[:, 0].set(root), parents)


class HostStar:
    """The same tree from a host drafter."""

    def begin(self, request, prompt):
        pass

    def observe(self, request, tokens):
        pass

    def propose(self, request, nodes, depth):
        return Draft(2 + np.arange(1, nodes + 1, dtype=np.int32), np.full(nodes, -1, np.int32))

    def end(self, request):
        pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    sections: Annotated[tuple[str, ...], Help("sections to run, in this order", SECTIONS)] = (
        SECTIONS
    )
    prompts: Annotated[int, Help("measured prompts of each kind")] = 4
    warm: Annotated[int, Help("further prompts, seen by warm drafters only")] = 12
    new_tokens: Annotated[int, Help("tokens to generate at most")] = 96
    repetitions: Annotated[int, Help("measurements of each case")] = 3
    nodes: Annotated[tuple[int, ...], Help("fixed numbers of draft nodes")] = NODE_BUCKETS[1:]
    peer: Annotated[str | None, Help("Python of the environment with transformers")] = None
    out: Annotated[Path, Help("file of the report; sections that ran replace theirs")] = (
        RESULTS / "drafting.json"
    )


class Runner:
    """A model that decodes prompts, and what has been compiled for it."""

    def __init__(self, model: lk.Model, new_tokens: int, sampling: lk.Sampling = GREEDY):
        # Once, not at every call of `generate`.
        self.model = dataclasses.replace(model, params=unstack(model.params))
        self._settings = dict(
            policy=lk.make_policy("full"), max_new_tokens=new_tokens, sampling=sampling
        )
        self._ready: set[tuple[Any, int | None]] = set()

    def run(
        self, prompt: list[int], drafter: Any = None, nodes: int | lk.Controller | None = 1
    ) -> Run:
        """Decodes a prompt; programs that are new are compiled before."""
        drafter = NoDrafter() if drafter is None else drafter
        on_device = dataclasses.is_dataclass(drafter)
        fixed = nodes if isinstance(nodes, int) else None
        buckets = nodes.buckets if isinstance(nodes, lk.Controller) else NODE_BUCKETS
        for each in buckets if fixed is None else [fixed]:
            key = (drafter if on_device else None, each)  # host drafters share their programs
            if key not in self._ready:
                self._ready.add(key)
                fresh = drafter if on_device else HostStar()
                lk.generate(self.model, [prompt], drafter=fresh, draft_nodes=each, **self._settings)
        out = lk.generate(
            self.model, [prompt], drafter=drafter, draft_nodes=nodes, **self._settings
        )
        speed = out.timing.decode_tokens_per_s
        seconds = (len(out.tokens[0]) - 1) / speed if speed else 0.0
        report = out.drafting
        return Run(out.tokens[0], report.steps, seconds, report.drafter_us)


class Bench:
    """The embedded model and the texts."""

    def __init__(self, options: Options):
        self.options = options
        model = lk.load(lk.EMBEDDED_MODEL, dtype="float32")
        assert model.tokenizer is not None
        self.texts = Texts(model.tokenizer.backend)
        self.run = Runner(model, options.new_tokens).run

    def make(self, kind: str) -> list[Text]:
        """The measured prompts, then those that only warm up drafters."""
        options = self.options
        return self.texts.make(kind, options.prompts + options.warm, options.new_tokens)

    def cost(self) -> dict:
        """Microseconds of a step of P nodes, all of them verified."""
        prompt = self.make("completion")[0].prompt
        drafters = {"": Star(), "host_": HostStar()}
        times: dict[tuple[str, int], list[float]] = {}
        for _ in range(2 * self.options.repetitions + 1):
            for nodes, (where, drafter) in itertools.product(NODE_BUCKETS, drafters.items()):
                run = self.run(prompt, drafter if nodes > 1 else None, nodes)
                times.setdefault((where, nodes), []).append(1e6 * run.seconds / max(run.steps, 1))
        median = {key: statistics.median(measured) for key, measured in times.items()}
        plain, report = median["", 1], {}
        for where in drafters:
            steps = {nodes: median[where, nodes] for nodes in NODE_BUCKETS}
            report[f"{where}step_us"] = {str(n): round(us, 1) for n, us in steps.items()}
            report[f"{where}ratio"] = {str(n): round(us / plain, 3) for n, us in steps.items()}
        return report

    def kind(self, name: str) -> dict:
        options, texts = self.options, self.make(name)
        outputs = [self.run(text.prompt).tokens for text in texts]
        count = min(options.prompts, len(texts))
        measured: dict[str, list[Measured]] = {label: [] for label in DRAFTERS}
        settled = {label: lk.Controller() for label in DRAFTERS}
        for row in range(count, len(texts)):
            for label, controller in settled.items():
                self.run(texts[row].prompt, prepared(label, []), controller)
        for repetition in range(options.repetitions):
            every = [*options.nodes, *CHOSEN]
            wanted = [n for n in every if repetition == 0 or n in REPEATED]
            for row in range(count):
                for label in DRAFTERS:
                    plain = self.run(texts[row].prompt)
                    for nodes in wanted:
                        drafter = prepared(label, outputs[:row] + outputs[row + 1 :])
                        chosen = {"first": None, "auto": settled[label]}.get(nodes, nodes)
                        drafted = self.run(texts[row].prompt, drafter, chosen)
                        measured[label].append(Measured(repetition, row, nodes, plain, drafted))
        looping = [loops(tokens) for tokens in outputs[:count]]
        groups = {"all": range(count)}
        groups["not_looping"] = [row for row in range(count) if not looping[row]]
        groups["looping"] = [row for row in range(count) if looping[row]]
        agreement = [_agree(o, t.truth) for o, t in zip(outputs, texts[:count], strict=False)]
        return {
            "prompts": count,
            "warmed_on": len(texts) - 1,
            "tokens": sum(map(len, outputs[:count])),
            "looping": sum(looping),
            # `question` and `editing` deserve their names only if the model answers correctly.
            "equal_to_truth": round(statistics.mean(agreement), 3),
            "drafters": {
                label: {
                    str(nodes): {
                        group: tally([m for m in runs if m.nodes == nodes and m.row in rows])
                        for group, rows in groups.items()
                        if rows
                    }
                    for nodes in [*options.nodes, *CHOSEN]
                }
                for label, runs in measured.items()
            },
        }

    def replay(self) -> dict:
        """Tokens per step of the host drafters on the sources' own text."""
        result = {}
        for kind in (*KINDS, "edited_code"):
            texts = self.make(kind)
            count = min(self.options.prompts, len(texts))
            truths = [text.truth for text in texts]
            result[kind] = {"prompts": count, "tokens": sum(map(len, truths[:count]))}
            for label in HOST:
                result[kind][label] = {}
                for nodes in self.options.nodes:
                    emitted = steps = 0
                    for row in range(count):
                        drafter = prepared(label, truths[:row] + truths[row + 1 :])
                        steps += replayed(drafter, texts[row], nodes)
                        emitted += len(truths[row]) - 1
                    result[kind][label][str(nodes)] = round(emitted / steps, 3)
        return result

    def peer(self) -> dict | str:
        options = self.options
        if not options.peer or not Path(options.peer).exists():
            return "not run"
        texts = {kind: self.make(kind)[: options.prompts] for kind in KINDS}
        ask = {
            "model": str(lk.EMBEDDED_MODEL),
            "cores": len(os.sched_getaffinity(0)),
            "prompts": {kind: [text.prompt for text in made] for kind, made in texts.items()},
            "new_tokens": options.new_tokens,
            "repetitions": options.repetitions,
            "lookup": PEER_LOOKUP,
            "assistant": 0,
        }
        # The function is sent as source code: the peer's environment has no jax.
        program = inspect.getsource(peer_side) + "\npeer_side()\n"
        answer = subprocess.run(
            [options.peer, "-c", program], input=json.dumps(ask), text=True, check=True,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        result = json.loads(answer.stdout.splitlines()[-1])
        for kind, made in texts.items():
            theirs = result["kinds"][kind].pop("outputs")
            ours = [self.run(t.prompt, make_drafter("prompt_lookup"), LOOKUP_NODES) for t in made]
            tokens = sum(len(run.tokens) for run in ours)
            forwards = sum(run.steps + 1 for run in ours)
            differing = sum(a.tokens != b for a, b in zip(ours, theirs, strict=True))
            result["kinds"][kind]["ours"] = {
                "tokens_per_forward": round(tokens / forwards, 3),
                "rows_unlike_theirs": differing,
            }
        return result


def peer_side() -> None:
    """Runs in the environment of transformers. Counts the prompt's forward: it verifies a draft.

    What is asked for has `lookup`, the tokens of prompt lookup, and `assistant`, how many of the
    model's first layers are an assistant; 0: there is none.
    """
    import json
    import statistics
    import sys
    import time

    import torch
    import transformers

    ask = json.load(sys.stdin)
    torch.set_num_threads(ask["cores"])
    transformers.logging.set_verbosity_error()  # assisted decoding warns at every step
    transformers.logging.disable_progress_bar()
    load, forwards = transformers.AutoModelForCausalLM.from_pretrained, []
    model = load(ask["model"], dtype=torch.float32)
    model.eval().register_forward_pre_hook(lambda *_: forwards.append(1))
    ways = {"prompt_lookup": {"prompt_lookup_num_tokens": ask["lookup"]}}
    if ask["assistant"]:
        small = load(ask["model"], dtype=torch.float32, num_hidden_layers=ask["assistant"])
        ways["assistant"] = {"assistant_model": small.eval()}

    def run(prompt, new_tokens, **options):
        forwards.clear()
        ids = torch.tensor([prompt])
        begin = time.perf_counter()
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False,
            max_new_tokens=new_tokens, **options,
        )  # fmt: skip
        return out[0, len(prompt) :].tolist(), len(forwards), time.perf_counter() - begin

    kinds = {}
    for kind, prompts in ask["prompts"].items():
        runs = [[] for _ in range(ask["repetitions"] + 1)]  # the first warms up
        for repetition in runs:
            for prompt in prompts:
                first, plain = run(prompt, 1), run(prompt, ask["new_tokens"])
                drafted = {way: run(prompt, ask["new_tokens"], **ways[way]) for way in ways}
                repetition.append((first, plain, drafted))
        plain = [(len(p[0]) - 1, p[2] - f[2]) for rows in runs[1:] for f, p, _ in rows]
        tokens, seconds = map(sum, zip(*plain, strict=True))
        kinds[kind] = {"plain_tokens_per_s": round(tokens / seconds, 1)}
        for way in ways:
            drafted = [row[2][way] for row in runs[0]]
            speeds = [
                sum(p[2] - f[2] for f, p, _ in rows) / sum(d[way][2] - f[2] for f, _, d in rows)
                for rows in runs[1:]
            ]
            kinds[kind][way] = {
                "tokens_per_forward": round(
                    sum(len(d[0]) for d in drafted) / sum(d[1] for d in drafted), 3
                ),
                "speed": round(statistics.median(speeds), 3),
                "changed_rows": sum(
                    p[0] != d[0] for (_, p, _), d in zip(runs[0], drafted, strict=True)
                ),
            }
        print(f"transformers, {kind}: {json.dumps(kinds[kind])}", file=sys.stderr, flush=True)
        kinds[kind]["outputs"] = [plain[0] for _, plain, _ in runs[0]]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print("\n" + json.dumps({"versions": versions, "kinds": kinds}))


def _agree(tokens: list[int], truth: list[int]) -> float:
    """Fraction of the tokens of the truth that are at the same position."""
    return sum(a == b for a, b in zip(tokens, truth, strict=False)) / len(truth)


def loops(tokens: list[int]) -> bool:
    """Whether the last max(3 p, 16) tokens have period p, for some p."""
    for period in range(1, len(tokens) // 3 + 1):
        end = tokens[-max(3 * period, 16) :]
        if len(end) >= 16 and end[period:] == end[:-period]:
            return True
    return False


def prepared(label: str, outputs: list[list[int]]) -> Any:
    """A fresh drafter; a warm one has observed `outputs`."""
    name, warm = DRAFTERS[label]
    drafter = make_drafter(name)
    for i, tokens in enumerate(outputs if warm else []):
        drafter.begin(i, [])
        drafter.observe(i, tokens)
        drafter.end(i)
    return drafter


def replayed(drafter: Any, text: Text, nodes: int) -> int:
    """Steps until `text.truth`, whose first token is given, has been emitted."""
    drafter.begin(0, text.prompt)
    steps, told, at = 0, 0, 1
    while at < len(text.truth):
        drafter.observe(0, text.truth[told:at])
        told, left = at, len(text.truth) - at
        draft = drafter.propose(0, nodes - 1, min(left, nodes) - 1)
        nodes_at = zip(draft.parents.tolist(), draft.tokens.tolist(), strict=True)
        children = {key: node for node, key in enumerate(nodes_at)}
        node = -1
        while at < len(text.truth) - 1 and (node, text.truth[at]) in children:
            node, at = children[node, text.truth[at]], at + 1
        at, steps = at + 1, steps + 1
    drafter.observe(0, text.truth[told:])
    drafter.end(0)
    return steps


def tally(runs: list[Measured]) -> dict:
    """The results of one drafter at one P on some of the prompts."""
    first = [m.drafted for m in runs if m.repetition == 0]
    steps = sum(run.steps for run in first)
    drafter_us = [run.drafter_us for run in first if run.drafter_us is not None]
    speeds = []
    for repetition in sorted({m.repetition for m in runs}):
        part = [m for m in runs if m.repetition == repetition]
        seconds = sum(m.drafted.seconds for m in part)
        speeds.append(sum(m.plain.seconds for m in part) / seconds if seconds else 1.0)
    return {
        "mean_accepted": round(sum(len(r.tokens) - 1 for r in first) / steps, 3) if steps else None,
        "drafter_us": round(statistics.mean(drafter_us), 1) if drafter_us else None,
        "speed": round(statistics.median(speeds), 3),
        "speed_range": [round(min(speeds), 3), round(max(speeds), 3)],
        "runs": len(runs),
        "differing_rows": sum(m.plain.tokens != m.drafted.tokens for m in runs),
    }


def summary(report: dict) -> dict:
    """The best speed that c(P) and acceptance allow, the measured speed, and the mix of kinds."""
    result: dict[str, Any] = {"kinds": {}, "mean_accepted_of_the_mix": {}}
    cost = report.get("cost")
    kinds = {kind: report[kind]["drafters"] for kind in KINDS if kind in report}
    for kind, drafters in kinds.items():
        result["kinds"][kind] = {}
        for label, runs in drafters.items():
            done = {n: r["all"] for n, r in runs.items() if r["all"]["mean_accepted"]}
            if cost is None or "auto" not in done:
                continue
            result["kinds"][kind][label] = of = {}
            for where in ("", "host_") if label in HOST else ("",):
                ratio = cost[f"{where}ratio"]
                possible = {n: r["mean_accepted"] / ratio[n] for n, r in done.items() if n in ratio}
                nodes, best = max((possible | {"1": 1.0}).items(), key=lambda item: item[1])
                of |= {
                    f"{where}best_nodes": int(nodes),
                    f"{where}best_speed": round(best, 3),
                    f"{where}reached": round(done["auto"]["speed"] / best, 3),
                    f"{where}reached_first": round(done["first"]["speed"] / best, 3),
                }
    if len(kinds) == len(KINDS):  # with equally many tokens of each kind: the harmonic mean
        for label in DRAFTERS:
            means = [kinds[kind][label].get("64", {}).get("all") for kind in KINDS]
            if all(means):
                inverse = statistics.mean(1 / m["mean_accepted"] for m in means)
                result["mean_accepted_of_the_mix"][label] = round(1 / inverse, 3)
    return result


def table(report: dict) -> str:
    """The report as Markdown."""
    lines = []
    if "cost" in report:
        ratios = ", ".join(f"{n}: {r:.2f}" for n, r in report["cost"]["ratio"].items())
        plain = report["cost"]["step_us"]["1"]
        lines += [f"c(P)/c(1) {ratios}; a plain step {plain:.0f} us"]
        ratios = ", ".join(f"{n}: {r:.2f}" for n, r in report["cost"]["host_ratio"].items())
        lines += [f"with the host in every step {ratios}", ""]
    lines += [
        "| Kind | Drafter | tokens/step 8, 64, chosen | 64 without loops | drafter us | "
        "speed 8, 16, first, chosen | best possible (P) | reached (with host steps) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind in (kind for kind in KINDS if kind in report):
        for label, runs in report[kind]["drafters"].items():
            shown = [runs[n]["all"] for n in ("8", "64", "auto") if n in runs]
            timed = [runs[n]["all"] for n in ("8", "16", *CHOSEN) if n in runs]
            apart = runs.get("64", {}).get("not_looping", {}).get("mean_accepted")
            best = report["summary"]["kinds"][kind].get(label)
            cells = [
                kind,
                label,
                ", ".join(f"{r['mean_accepted'] or 0:.2f}" for r in shown),
                f"{apart:.2f}" if apart else "-",
                f"{shown[-1]['drafter_us']:.0f}" if shown[-1]["drafter_us"] else "-",
                ", ".join(f"{r['speed']:.2f}" for r in timed),
                f"{best['best_speed']:.2f} ({best['best_nodes']})" if best else "-",
                ", ".join(f"{best[k]:.0%}" for k in ("reached", "host_reached") if k in best)
                if best
                else "-",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    options = parse(Options, __doc__)
    jax.config.update("jax_default_matmul_precision", "highest")
    bench, out = Bench(options), options.out
    for section in options.sections:
        begin = time.perf_counter()
        result = bench.kind(section) if section in KINDS else getattr(bench, section)()
        report = json.loads(out.read_text()) if out.exists() else {}
        report[section] = result
        report["summary"] = summary(report)
        report.setdefault("runs", {})[section] = {
            "commit": commit(),
            "date": datetime.date.today().isoformat(),
            "machine": machine(),
            "load_average": os.getloadavg(),
            "python": platform.python_version(),
            "jax": jax.__version__,
            "seconds": round(time.perf_counter() - begin, 1),
            "settings": settings(options, "sections", "peer", "out"),
        }
        save(out, report)
        print(f"{section}: {time.perf_counter() - begin:.0f} s", flush=True)
    print("\n" + table(report))


if __name__ == "__main__":
    main()
