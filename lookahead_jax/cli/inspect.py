"""`lookahead inspect`: a page that shows what the cache kept and what was drafted."""

from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path

from lookahead_jax.cli.encoded import EncodedPrompt
from lookahead_jax.cli.options import OutFile, RunOptions, Text, megabytes
from lookahead_jax.host.files import atomic_write, check_output, is_stdout


@dataclass(frozen=True, kw_only=True)
class Inspect(RunOptions):
    """Write an HTML page: how many heads kept each prompt token, and the tree of every step."""

    out: OutFile = Path("inspect.html")
    """The page to write."""
    mark: Text = None
    """Underline this text wherever it occurs in the prompt, and report how much of it was kept."""


def main(config: Inspect) -> None:
    from lookahead_jax.cli.inspect_page import drafted_steps, render  # imports jax
    from lookahead_jax.policies.base import check_positions

    check_output(config.out)
    run = config.prepare()
    model, eviction = run.model, run.eviction
    check_positions(eviction.policy, "inspect")
    if len(run.prompts) != 1:
        raise ValueError(
            f"inspect shows one prompt, and {config.input.tokens} has {len(run.prompts)} rows"
        )
    plain, steps = config.drafting.drafter == "none", []
    on_step = None if plain else steps.append
    result = run.generate(on_step=on_step)
    name = partial(_name, model.tokenizer)
    prompt, offsets, pieces = _pieces(model.tokenizer, run.prompts[0])
    page = render(
        prompt=prompt,
        offsets=offsets,
        pieces=pieces,
        kept=[[head[head >= 0] for head in layer[0]] for layer in result.kept],
        generated=" ".join(map(str, result.tokens[0])) if result.text is None else result.text[0],
        facts={
            "Model": str(config.source.model or "embedded"),
            "Policy": " ".join([eviction.name, *config.eviction.policy_arg]),
            "Budget": f"{config.eviction.budget:,} per layer and head",
            "Prompt": f"{len(offsets):,} tokens",
            "Cache": f"{megabytes(result.cache.bytes)}, full {megabytes(result.cache.full_bytes)}",
        },
        mark=config.mark,
        steps=None if plain else drafted_steps(steps, result.tokens[0], name),
    )
    atomic_write(config.out, page)
    if not is_stdout(config.out):
        print(config.out)


def _pieces(tokenizer, prompt: EncodedPrompt) -> tuple[str, list[tuple[int, int]], list[str]]:
    """The prompt's text, each token's characters in it, and each token's name.

    The text of a prompt given as ids is made of its tokens one by one.
    """
    pieces = [_name(tokenizer, i) for i in prompt.ids]
    if prompt.text is not None and prompt.offsets is not None:
        return prompt.text, prompt.offsets, pieces
    return "".join(pieces), list(pairwise(accumulate(map(len, pieces), initial=0))), pieces


def _name(tokenizer, token: int) -> str:
    """A token's text as it is within a text: decoders may strip a space from the beginning."""
    if tokenizer is None:
        return f"{token} "
    return tokenizer.decode_continuation([token], [token], skip_special=False)
