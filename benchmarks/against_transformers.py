"""Prefill and decoding on CPU against transformers + kvpress, on the same weights.

Two workers stay alive, one per library, each in its own environment, and take turns: every
repetition measures both, one right after the other, and the ratios are taken per repetition. So
the load of the machine, which changes over minutes, cancels. Both use two cores, float32, the
same prompt of 2048 random tokens, SnapKV with window 64 and average pooling over 5, a budget of
256 (and, for comparison, the full cache), and 128 greedy tokens. Compilation is left out and
reported apart. The peer decodes with a plain loop over its forward, without `generate`.

    python -m venv PEER
    PEER/bin/pip install torch==2.13.0 'transformers>=4.56,<5.3' kvpress==0.5.5
    python benchmarks/against_transformers.py --peer PEER/bin/python

Models: the one inside the package, and a random Llama of 100M parameters. The report also has the
limits of the machine: the bytes of weights and cache read per token, divided by the speed of
reading a matrix of that size, and the FLOPs of the prompt divided by those of one large matrix
product (both measured with torch in the same run).
"""

import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

from common import RESULTS, ROOT, Help, commit, machine, parse, save

TOKENS, BUDGET, NEW_TOKENS, WINDOW, POOL = 2048, 256, 128, 64, 5
CORES = 2
PAUSE_S = 0.5  # threads of the other worker stop spinning
POLICIES = ("snapkv", "full")
RANDOM_100M = dict(
    model_type="llama",
    architectures=["LlamaForCausalLM"],
    vocab_size=32000,
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=4,
    head_dim=64,
    intermediate_size=2048,
    hidden_act="silu",
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=4096,
    attention_bias=False,
    mlp_bias=False,
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_id=None,
    torch_dtype="float32",
)


class Ours:
    """This library in the calling environment."""

    def __init__(self, directory: str, prompt: list[int]):
        import jax
        import jax.numpy as jnp

        from lookahead_jax.checkpoints.load import load
        from lookahead_jax.model.params import unstack

        model = load(directory, dtype="float32")
        self.config, self.params = model.config, unstack(model.params)
        self.prompt = jnp.asarray([prompt], jnp.int32)
        self.versions = {"jax": jax.__version__}

    def run(self, policy: str) -> dict:
        import jax
        import jax.numpy as jnp

        from lookahead_jax.decoding.sampling import GREEDY, sampling_rows
        from lookahead_jax.decoding.step import decode_burst, start
        from lookahead_jax.policies.full import Full
        from lookahead_jax.policies.snapkv import SnapKV
        from lookahead_jax.prefilling.batching import slots_for
        from lookahead_jax.prefilling.prefill import prefill

        chosen = SnapKV(window=WINDOW, pool="avg", kernel=POOL) if policy == "snapkv" else Full()
        shape = dict(config=self.config, policy=chosen, budget=BUDGET, new_tokens=NEW_TOKENS)
        slots = slots_for(chosen, TOKENS, BUDGET, NEW_TOKENS, config=self.config)
        begin = time.perf_counter()
        read = prefill(self.params, self.prompt, slots=slots, **shape)
        state = start(
            read.cache,
            read.logits,
            sampling=sampling_rows([GREEDY], [0], self.config.vocab_size),
            limit=jnp.full(1, NEW_TOKENS, jnp.int32),
            eos=jnp.zeros(0, jnp.int32),
            seen=None,
            width=NEW_TOKENS,
        )
        kept = jax.block_until_ready(state).cache.length.max().item()
        middle = time.perf_counter()
        state = decode_burst(self.params, state, config=self.config, steps=NEW_TOKENS - 1)
        tokens = state.tokens[0].tolist()
        return {
            "prefill_s": middle - begin,
            "decode_s": time.perf_counter() - middle,
            "kept": kept,
            "tokens": tokens,
        }


class Peer:
    """transformers + kvpress; also the machine's peak rates, measured with torch."""

    def __init__(self, directory: str, prompt: list[int]):
        import kvpress  # noqa: F401  (its version is read below)
        import torch
        import transformers

        torch.set_num_threads(CORES)
        transformers.logging.disable_progress_bar()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32
        ).eval()
        self.prompt = torch.tensor([prompt])
        from importlib.metadata import version

        self.versions = {name: version(name) for name in ("torch", "transformers", "kvpress")}

    def run(self, policy: str) -> dict:
        import contextlib

        import torch
        from kvpress import SnapKVPress
        from transformers import DynamicCache

        press = SnapKVPress(
            compression_ratio=1 - BUDGET / TOKENS, window_size=WINDOW, kernel_size=POOL
        )
        cache = DynamicCache()
        with torch.inference_mode():
            begin = time.perf_counter()
            with press(self.model) if policy == "snapkv" else contextlib.nullcontext():
                out = self.model(self.prompt, past_key_values=cache, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            tokens = [token.item()]
            kept = cache.layers[0].keys.shape[2]
            middle = time.perf_counter()
            for position in range(TOKENS, TOKENS + NEW_TOKENS - 1):
                out = self.model(
                    token, past_key_values=cache, position_ids=torch.tensor([[position]])
                )
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                tokens.append(token.item())
        return {
            "prefill_s": middle - begin,
            "decode_s": time.perf_counter() - middle,
            "kept": kept,
            "tokens": tokens,
        }

    def machine(self, nbytes: int) -> dict:
        """Bytes per second through a matrix of `nbytes`, and FLOPs per second of a product."""
        import torch

        columns = 1024
        matrix, vector = torch.ones(nbytes // 4 // columns, columns), torch.ones(columns)
        square = torch.ones(2048, 2048)
        with torch.inference_mode():
            read = min(_seconds(lambda: torch.mv(matrix, vector)) for _ in range(20))
            product = min(_seconds(lambda: square @ square) for _ in range(20))
        return {"bytes_per_s": matrix.nbytes / read, "flops_per_s": 2 * 2048**3 / product}


def _seconds(run) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def serve(side: str, directory: str) -> None:
    """The worker: reads one request per line, answers with one line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps the output of libraries apart from the answers
    prompt = json.loads(sys.stdin.readline())
    worker = (Ours if side == "ours" else Peer)(directory, prompt)
    print(json.dumps(worker.versions), file=answers, flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(worker, name)(*arguments)), file=answers, flush=True)


class Worker:
    """The driver's end of a worker process."""

    def __init__(self, python: str, side: str, directory: Path, prompt: list[int]):
        cores = sorted(os.sched_getaffinity(0))[:CORES]
        self.process = subprocess.Popen(
            [python, __file__, "--serve", side, str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(CORES)},
        )
        os.sched_setaffinity(self.process.pid, cores)
        self.versions = self._exchange(prompt)

    def ask(self, *request):
        return self._exchange(request)

    def close(self):
        self.process.stdin.close()
        self.process.wait()

    def _exchange(self, message):
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit("a worker failed; see its error above")
        return json.loads(answer)


def random_model(directory: Path, seed: int) -> None:
    """Writes the random 100M Llama as a Hugging Face directory."""
    import jax

    from lookahead_jax.checkpoints.hf_config import config_from_hf
    from lookahead_jax.checkpoints.load import save_params
    from lookahead_jax.model.params import init_params

    config = config_from_hf(RANDOM_100M)
    save_params(directory, init_params(jax.random.key(seed), config, "float32"), config)
    (directory / "config.json").write_text(json.dumps(RANDOM_100M))


def work(hf: dict, cached: int) -> tuple[int, int]:
    """Bytes a decoded token reads (weights, `cached` entries) and FLOPs of the prompt."""
    layers, d, f = hf["num_hidden_layers"], hf["hidden_size"], hf["intermediate_size"]
    n, k, h = hf["num_attention_heads"], hf["num_key_value_heads"], hf["head_dim"]
    per_layer = d * h * (2 * n + 2 * k) + 3 * d * f
    weights = layers * per_layer + hf["vocab_size"] * d
    causal = layers * 2 * n * h * TOKENS**2  # half of QK and half of PV
    flops = 2 * layers * per_layer * TOKENS + causal + 2 * hf["vocab_size"] * d
    return 4 * (weights + layers * 2 * k * h * cached), flops


def compare(name: str, directory: Path, options) -> dict:
    """All measurements of one model."""
    import random

    hf = json.loads((directory / "config.json").read_text())
    prompt = random.Random(options.seed).choices(range(3, hf["vocab_size"]), k=TOKENS)
    ours = Worker(sys.executable, "ours", directory, prompt)
    peer = Worker(options.peer, "peer", directory, prompt)
    result = {"model": name, "versions": ours.versions | peer.versions, "policies": {}}
    for policy in POLICIES:
        first = {"ours": ours.ask("run", policy), "peer": peer.ask("run", policy)}
        rows = []
        for repetition in range(options.repetitions):
            order = [("ours", ours), ("peer", peer)]
            row = {}
            for side, worker in order if repetition % 2 else reversed(order):
                time.sleep(PAUSE_S)
                row[side] = worker.ask("run", policy)
            rows.append(row)
        token_bytes, flops = work(hf, (BUDGET if policy == "snapkv" else TOKENS) + NEW_TOKENS // 2)
        machine = peer.ask("machine", token_bytes)
        entry = {
            "kept": {side: first[side]["kept"] for side in first},
            "equal_leading_tokens": _common(first["ours"]["tokens"], first["peer"]["tokens"]),
            "first_run_s": {s: first[s]["prefill_s"] + first[s]["decode_s"] for s in first},
            "machine": machine,
            "floor": {
                "prefill_s": flops / machine["flops_per_s"],
                "decode_s": (NEW_TOKENS - 1) * token_bytes / machine["bytes_per_s"],
            },
        }
        for what in ("prefill_s", "decode_s"):
            times = {side: [row[side][what] for row in rows] for side in ("ours", "peer")}
            ratios = [p / o for o, p in zip(times["ours"], times["peer"], strict=True)]
            entry[what] = times | {
                "ratio_median": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
            }
        result["policies"][policy] = entry
    ours.close()
    peer.close()
    return result


def _common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def table(models: list[dict]) -> str:
    """The results as Markdown; ratios above 1 mean that this library is faster."""
    lines = [
        "| Model | Cache | Phase | Here | transformers + kvpress | Ratio (median, range) | Floor |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in models:
        for policy, entry in model["policies"].items():
            cache = f"SnapKV {BUDGET}" if policy == "snapkv" else "full"
            for what, phase in (("prefill_s", "prefill"), ("decode_s", "decoding")):

                def show(seconds, what=what):
                    if what == "prefill_s":
                        return f"{seconds * 1e3:.0f} ms"
                    return f"{(NEW_TOKENS - 1) / seconds:.0f} tokens/s"

                e = entry[what]
                here, there = (show(statistics.median(e[side])) for side in ("ours", "peer"))
                ratio = f"{e['ratio_median']:.2f} ({e['ratio_min']:.2f} to {e['ratio_max']:.2f})"
                floor = show(entry["floor"][what])
                cells = (model["model"], cache, phase, here, there, ratio, floor)
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    peer: Annotated[str | None, Help("Python of the environment with transformers and kvpress")] = (
        None
    )
    models: Annotated[tuple[str, ...], Help("models to measure: embedded, random-100m")] = (
        "embedded",
        "random-100m",
    )
    repetitions: Annotated[int, Help("measurements of each case on both sides")] = 7
    seed: Annotated[int, Help("seed of the prompt and of the random model")] = 0
    out: Annotated[Path, Help("file of the report")] = RESULTS / "against_transformers.json"
    serve: Annotated[tuple[str, ...] | None, Help(None, nargs=2)] = None


def main() -> None:
    options = parse(Options, __doc__)
    if options.serve:
        serve(*options.serve)
        return
    if not options.peer:
        raise SystemExit("--peer is needed: the Python of an environment as described in --help")

    models = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.models:
            directory = ROOT / "lookahead_jax" / "assets" / "base"
            if name == "random-100m":
                directory = Path(scratch)
                random_model(directory, options.seed)
            models.append(compare(name, directory, options))
            print(table(models[-1:]), flush=True)
    report = {
        "command": "python benchmarks/against_transformers.py "
        f"--models {' '.join(options.models)} --repetitions {options.repetitions} "
        f"--seed {options.seed}",
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "machine": machine(CORES),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "shape": dict(tokens=TOKENS, budget=BUDGET, new_tokens=NEW_TOKENS, dtype="float32"),
        "models": models,
    }
    save(options.out, report)
    print("\n" + table(models))


if __name__ == "__main__":
    main()
