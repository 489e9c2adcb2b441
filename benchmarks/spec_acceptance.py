"""Tokens per step of drafters on all prompts of Spec-Bench and of other kinds, without decoding.

A drafter changes no token, so how much of its drafts is accepted follows from plain outputs: they
are made once, in batches, and the drafters are then replayed along them, with all P nodes of every
step. For sampled outputs the replay is exact as well, since the token of a position is drawn with a
key of its own and the draft is compared with it. Drafters that learn from the model's logits
(recycling, stand) or compute with it cannot be replayed: see spec_bench.py, which also has times.

`cold` drafters know one prompt each. `warm` ones keep what they have learned from the prompts of
their kind that came before, and never see one twice. Means are over all tokens of a kind, with 95 %
intervals from 2,000 resamplings of its prompts.

    python benchmarks/spec_acceptance.py --questions question.jsonl --outputs outputs.jsonl

Outputs are appended to the file batch by batch. What a file has is not made again, so that a run
that was stopped goes on, and other drafters are replayed at once.
"""

import dataclasses
import itertools
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from common import RESULTS, Help, machine, parse, publish, ran_on, settings
from drafting import replayed
from drafting_texts import Text
from spec_prompts import KINDS, conversations

import lookahead_jax as lk
from lookahead_jax.decoding.device_drafter import DeviceDrafter
from lookahead_jax.decoding.host_drafter import Draft
from lookahead_jax.drafters.prompt_lookup import PromptLookup
from lookahead_jax.drafters.registry import make_drafter
from lookahead_jax.model.params import unstack

DRAFTERS = ("prompt_lookup", "trie", "suffix", "sam", "sam+trie", "aded")
RESAMPLINGS = 2_000
ROWS = 8  # of a batch
PADDING = 256  # texts of `OnHost` are padded to multiples of this


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    questions: Annotated[Path, Help("Spec-Bench's question.jsonl")]
    outputs: Annotated[Path, Help("file of the plain outputs, made where they are missing")]
    model: Annotated[str, Help("model, as for --model of the commands")] = "smollm2"
    kinds: Annotated[tuple[str, ...], Help("kinds of prompts", KINDS)] = KINDS
    prompts: Annotated[int, Help("prompts of each kind at most")] = 80
    new_tokens: Annotated[int, Help("tokens to generate at most")] = 64
    temperatures: Annotated[tuple[float, ...], Help("of the outputs; 0 is greedy")] = (0.0, 0.7)
    drafters: Annotated[tuple[str, ...], Help("drafters, as for --drafter")] = DRAFTERS
    nodes: Annotated[tuple[int, ...], Help("draft nodes P of every step")] = (8, 16)
    out: Annotated[Path, Help("file of the report")] = RESULTS / "spec_acceptance.json"


class OnHost:
    """A device drafter that only reads tokens, as a host drafter: every draft begins a new row."""

    def __init__(self, drafter: DeviceDrafter, config: lk.ModelConfig):
        self._config, self._texts = config, {}
        self._propose = partial(jax.jit(_propose, static_argnums=(0, 1, 4)), drafter, config)

    def begin(self, request: Any, prompt: list[int]) -> None:
        self._texts[request] = list(prompt)

    def observe(self, request: Any, tokens: list[int]) -> None:
        self._texts[request] += tokens

    def end(self, request: Any) -> None:
        del self._texts[request]

    def propose(self, request: Any, nodes: int, depth: int) -> Draft:
        *before, root = self._texts[request]
        padded = np.full((1, -(-(len(before) + 1) // PADDING) * PADDING), -1, np.int32)
        padded[0, : len(before)] = before
        tree = self._propose(padded, np.asarray([root], np.int32), nodes + 1)
        tokens, parents = np.asarray(tree.tokens)[0, 1:], np.asarray(tree.parents)[0, 1:]
        count = int((tokens >= 0).sum())  # a chain, so that the nodes that exist come first
        return Draft(tokens[:count][:depth], parents[:count][:depth] - 1)


def _propose(drafter: DeviceDrafter, config: lk.ModelConfig, before: Any, root: Any, nodes: int):
    state = drafter.init(1, before.shape[1], config)
    state = drafter.begin(drafter.weights, state, jnp.zeros(1, jnp.int32), before)
    return drafter.propose(drafter.weights, state, root, nodes)[1]


class Outputs:
    """Plain outputs of the prompts, kept in a file of one JSON object a line."""

    def __init__(self, path: Path, model: lk.Model, name: str, new_tokens: int):
        self._path, self._name, self._new_tokens = path, name, new_tokens
        self._model = dataclasses.replace(model, params=unstack(model.params))
        self._made: dict[str, list[int]] = {}
        if path.exists():
            for line in filter(None, path.read_text("utf-8").split("\n")):
                row = json.loads(line)
                self._made[row["key"]] = row["tokens"]

    def _key(self, prompt: list[int], temperature: float, seed: int) -> str:
        """Everything that the tokens depend on."""
        return json.dumps([self._name, prompt, temperature, seed, self._new_tokens])

    def of(self, prompts: list[list[int]], temperature: float) -> list[list[int]]:
        """The output of each prompt; those that are missing are made and kept."""
        keys = [self._key(prompt, temperature, seed) for seed, prompt in enumerate(prompts)]
        missing = [row for row, key in enumerate(keys) if key not in self._made]
        missing.sort(key=lambda row: len(prompts[row]))  # rows of a batch share a length
        begin = time.perf_counter()
        for done in range(0, len(missing), ROWS):
            rows = missing[done : done + ROWS]
            made = lk.generate(
                self._model,
                [prompts[row] for row in rows],
                policy=lk.make_policy("full"),
                max_new_tokens=self._new_tokens,
                sampling=lk.Sampling(temperature=temperature),
                seeds=rows,
            )
            new = dict(zip([keys[row] for row in rows], made.tokens, strict=True))
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"key": k, "tokens": t}) + "\n" for k, t in new.items())
            self._made |= new
            print(
                f"outputs at temperature {temperature}: {done + len(rows)} of {len(missing)}, "
                f"{time.perf_counter() - begin:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        return [self._made[key] for key in keys]


def drafter_of(name: str, config: lk.ModelConfig) -> Any:
    """A drafter that has learned nothing."""
    drafter = make_drafter(name)
    if isinstance(drafter, PromptLookup):
        return OnHost(drafter, config)
    if dataclasses.is_dataclass(drafter):
        raise SystemExit(
            f"--drafters: {name} needs more than the tokens of a text; measure it with "
            "spec_bench.py"
        )
    return drafter


def interval(emitted: np.ndarray, steps: np.ndarray) -> list[float]:
    """The 95 % interval of tokens per step if the prompts [n] were drawn again."""
    drawn = np.random.default_rng(0).integers(len(steps), size=(RESAMPLINGS, len(steps)))
    rates = emitted[drawn].sum(1) / np.maximum(steps[drawn].sum(1), 1)
    return [round(float(q), 3) for q in np.quantile(rates, (0.025, 0.975))]


def replay(make: Any, texts: list[Text], nodes: int, *, warm: bool) -> dict[str, Any]:
    """What one drafter does on the texts of one kind."""
    kept = make()
    steps = np.asarray([replayed(kept if warm else make(), text, nodes) for text in texts])
    emitted = np.asarray([len(text.truth) - 1 for text in texts])
    return {
        "tokens_per_step": round(float(emitted.sum() / steps.sum()), 3),
        "interval": interval(emitted, steps),
    }


def main() -> None:
    options = parse(Options, __doc__)
    model = lk.load(options.model, dtype="float32")
    if model.tokenizer is None or not model.tokenizer.chat_templates:
        raise SystemExit(f"--model {options.model} has no chat template")
    make = {name: partial(drafter_of, name, model.config) for name in options.drafters}
    for name in options.drafters:
        make[name]()  # a name that is none ends the program before anything is decoded
    outputs = Outputs(options.outputs, model, options.model, options.new_tokens)
    report: dict[str, Any] = ran_on() | {
        "processor": machine(),
        "load_average": os.getloadavg(),
        "settings": {
            k: str(v) for k, v in settings(options, "out", "outputs", "questions").items()
        },
        "kinds": {},
    }
    for kind, temperature in itertools.product(options.kinds, options.temperatures):
        prompts = [
            model.tokenizer.encode_chat(messages)
            for messages in conversations(kind, options.questions, options.prompts)
        ]
        pairs = zip(prompts, outputs.of(prompts, temperature), strict=True)
        texts = [Text(prompt, tokens) for prompt, tokens in pairs if len(tokens) > 1]
        of = report["kinds"].setdefault(kind, {"prompts": len(prompts)})
        of[f"temperature {temperature:g}"] = found = {
            "tokens": sum(len(text.truth) - 1 for text in texts)
        }
        for name, nodes, warm in itertools.product(make, options.nodes, (False, True)):
            found.setdefault(name, {}).setdefault("warm" if warm else "cold", {})[str(nodes)] = (
                replay(make[name], texts, nodes, warm=warm)
            )
        print(f"{kind}: {json.dumps(found)}", file=sys.stderr, flush=True)
    publish(report, options.out)


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    main()
