"""Train lookahead modules on chats of one's own, and generate with them.

    python examples/train_own.py

A few steps on a few chats, to show the pieces; real modules need thousands of prompts (see
docs/train.md). The prompts are tokenized, the model writes its own greedy responses, and the
modules learn to attend to what these responses attend to.
"""

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


def chats() -> list[dict]:
    """Prompts cut from a file, in place of chats. `{"messages": [...]}` works as well."""
    text = (lk.EMBEDDED_MODEL.parent / "example.txt").read_text()
    return [{"prompt": text[start : start + 300]} for start in range(0, 2400, 300)]


def main() -> tuple[list[float], lk.Generation]:
    losses: list[float] = []
    with TemporaryDirectory() as folder:
        work = Path(folder)
        source = work / "chats.jsonl"
        source.write_text("".join(json.dumps(chat) + "\n" for chat in chats()))
        model_folder = lk.EMBEDDED_MODEL
        prepare(
            DataConfig(
                model=model_folder,
                source=(str(source),),
                out=work / "data",
                max_response=16,
                batch=8,
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
    prompt = chats()[0]["prompt"]
    result = lk.generate(model, [prompt], lookahead=modules, budget=48, max_new_tokens=16)
    print("loss per step:", *(f"{loss:.3f}" for loss in losses))
    print(repr(result.text[0]))
    return losses, result


if __name__ == "__main__":
    main()
