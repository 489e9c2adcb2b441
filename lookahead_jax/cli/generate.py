"""`lookahead generate`: continue a prompt from a budgeted cache."""

import json
from dataclasses import asdict, dataclass, field

from lookahead_jax.cli.options import File, RunOptions
from lookahead_jax.cli.strategy import StrategyOptions
from lookahead_jax.host.activity import printed
from lookahead_jax.host.files import atomic_write, check_output, is_stdout


@dataclass(frozen=True, kw_only=True)
class Generate(RunOptions):
    """Continue a prompt and print the text as it is generated."""

    search: StrategyOptions = field(default_factory=StrategyOptions)
    json: File = None
    """Also write tokens, text, sizes, timing (without compilation) and drafting to this file; with
    --strategy, candidates and work. `-` writes them to standard output instead of the text."""
    json_schema: File = None
    """Answer with JSON that follows the JSON schema in this file."""


def main(config: Generate) -> None:
    silent = False
    if config.json is not None:
        check_output(config.json)
        silent = is_stdout(config.json)
    strategy = config.search.make(config)
    if strategy is not None and config.json_schema is not None:
        raise ValueError("--json-schema and --strategy exclude each other: leave out one")
    grammar = None
    if config.json_schema is not None:
        import lookahead_jax as lk

        grammar = lk.Grammar.json_schema(config.json_schema.read_text(encoding="utf-8"))
    routed = strategy is not None and strategy.rule.routes
    run = config.prepare(strategy=config.search.strategy if routed else None)
    one = len(run.prompts) == 1 and run.model.tokenizer is not None
    if strategy is None:
        stream = one and not silent
        result = run.generate(
            on_text=_print if stream else None, measure=config.json is not None, grammar=grammar
        )
        report = described(result)
    else:
        stream, result = False, config.search.search(run, strategy)
        report = asdict(result)
    if stream:
        print()
    elif not silent:
        for row, continuation in enumerate(result.text or result.tokens):
            print(continuation if one else f"[{row}] {continuation}")
    if config.json is not None:
        atomic_write(config.json, json.dumps(report, indent=2, allow_nan=False) + "\n")


def described(result) -> dict:
    """What --json writes of a `Generation`; tokens, text and prompt_tokens have one entry a row."""
    return dict(
        tokens=result.tokens,
        text=result.text,
        finish=result.finish,
        prompt_tokens=result.prompt_tokens,
        cache=asdict(result.cache),
        timing=asdict(result.timing),
        drafting=asdict(result.drafting),
    )


def _print(row: int, text: str) -> None:
    print(text, end="", flush=True)
    printed(text)
