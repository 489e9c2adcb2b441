"""Train lookahead modules on chats of one's own, and generate with them.

    python examples/train_own.py                                  # texts that ship
    python examples/train_own.py chats.jsonl --model smollm2      # your chats, for a chat model

A line of chats.jsonl is {"messages": [{"role": "user", "content": "..."}]} or {"prompt": "..."}.
A few steps on a few chats show the pieces; real modules need thousands of prompts (docs/train.md).
The prompts are tokenized, the model writes its own greedy responses, and the modules learn to
attend to what these responses attend to.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import jax

import lookahead_jax as lk
from lookahead_jax.modules.definition import LookaheadConfig
from lookahead_jax.train.data import DataConfig, prepare
from lookahead_jax.train.lookahead import TrainConfig, train
from lookahead_jax.train.optimizer import OptimizerConfig

STEPS = 6


def shipped_prompts(path: Path) -> Path:
    """Writes prompts cut from a text that ships; the embedded model has no chat template."""
    text = (lk.EMBEDDED_MODEL.parent / "example.txt").read_text()
    rows = [{"prompt": text[start : start + 300]} for start in range(0, 2400, 300)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def main(chats: Path | None = None, model_folder: Path = lk.EMBEDDED_MODEL):
    """The loss of every step, and a generation with the modules: (list of float, Generation)."""
    losses: list[float] = []
    with TemporaryDirectory() as folder:
        work = Path(folder)
        chats = chats or shipped_prompts(work / "prompts.jsonl")
        prepare(
            DataConfig(
                model=model_folder,
                source=(str(chats),),
                out=work / "data",
                max_response=16,
                batch=4,
            )
        )
        train(
            TrainConfig(
                model=model_folder,
                data=(work / "data",),
                run=work / "run",
                modules=LookaheadConfig(
                    tokens=8, rank=4, alpha=16.0, targets=("q", "k", "v", "o"), init="table"
                ),
                optimizer=OptimizerConfig(rate=6e-3, warmup=2, clip=1.0),
                steps=STEPS,
                batch=jax.device_count(),
                log_every=1,
            ),
            on_metrics=lambda line: losses.append(line["loss"]),
        )
        model = lk.load(model_folder)
        modules = lk.load_modules(
            work / "run" / "modules", params=model.params, config=model.config
        )
    prompt = (lk.EMBEDDED_MODEL.parent / "example.txt").read_text()[:300]
    result = lk.generate(model, [prompt], lookahead=modules, budget=48, max_new_tokens=16)
    print("loss per step:", *(f"{loss:.3f}" for loss in losses))
    print(repr(result.text[0]))
    return losses, result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("chats", nargs="?", type=Path, help="a .jsonl file of chats or prompts")
    parser.add_argument("--model", type=Path, default=lk.EMBEDDED_MODEL, help="the base model")
    options = parser.parse_args()
    main(options.chats, options.model)
