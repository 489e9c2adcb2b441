"""The command `lookahead`: each command is a frozen dataclass and a `main(config)` in this package.

`lookahead train ...` and `lookahead eval ...` call the commands of those two packages.
"""

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import tyro

import lookahead_jax
from lookahead_jax.cli import chat, convert, demo, generate, inspect, logits, score, serve
from lookahead_jax.cli.summaries import policy_summaries
from lookahead_jax.drafters.registry import drafter_summaries
from lookahead_jax.host.activity import telling
from lookahead_jax.host.command import run_command, say
from lookahead_jax.host.compile_cache import keep_compiled_programs
from lookahead_jax.host.config_files import UsageError
from lookahead_jax.strategies.registry import strategy_summaries


@dataclass(frozen=True)
class Train:
    """Train lookahead modules; `lookahead train --help` lists the commands."""


@dataclass(frozen=True)
class Eval:
    """Measure policies and drafters; `lookahead eval --help` lists the commands."""


COMMANDS = {
    generate.Generate: generate.main,
    chat.Chat: chat.main,
    score.Score: score.main,
    logits.Logits: logits.main,
    inspect.Inspect: inspect.main,
    demo.Demo: demo.main,
    convert.Convert: convert.main,
    serve.Serve: serve.main,
}
# Imported when called: these modules import JAX. Each has a `main(args)` that returns the status.
GROUPS = {
    "train": {
        "recipe": ("train.recipe.recipe", "From a model's name to lookahead modules, in one run."),
        "data": ("train.data", "Tokenize chats or prompts, and generate missing responses."),
        "lookahead": ("train.lookahead", "Train lookahead modules for a model."),
        "study": ("train.study", "Train several sets of modules at once, for comparisons."),
        "compile": ("train.compile", "Compile the training step for TPUs and report its needs."),
        "qfilters": ("train.qfilters", "Compute the filters of the policy qfilter from texts."),
        "triattention": (
            "train.triattention",
            "Compute the statistics of the policy triattention.",
        ),
        "kvzap": ("train.kvzap", "Train the surrogate of the policy kvzap from texts."),
        "adadec": ("train.adadec", "Learn the threshold of the strategy adadec from answers."),
        "specdec": ("train.specdec", "Train the acceptance head of the drafter specdec."),
        "denoiser": ("train.denoiser", "Train the head of the drafter denoiser."),
        "reward": ("train.reward", "Train a reward head on labelled steps, for strategies."),
        "reward-data": ("train.reward_data", "Make labelled steps from problems with answers."),
        "kv-prediction": ("train.kv_prediction", "Train the maps of KV Prediction."),
    },
    "eval": {
        "run": ("eval.grid.run", "Answer the tasks with each policy, budget and drafter."),
        "report": ("eval.report.report", "Write a page with the tables and charts of runs."),
        "compare": ("eval.compare.compare", "Compare policies on the answers of one model."),
        "frontier": ("eval.frontier.frontier", "Compare policies and caches at equal bytes."),
        "agreement": ("eval.agreement.agreement", "Compare cut caches with the full one."),
        "smollm2": ("eval.report.smollm2", "Renew the table of the modules that ship for SmolLM2."),
    },
}
_WITH_POLICY = ("generate", "chat", "score", "inspect", "demo", "serve")
_WITH_DRAFTS = ("generate", "inspect")  # they draft answers for the policy speckv
_WITH_STRATEGY = ("generate",)
_WITH_DRAFTER = ("generate", "chat", "inspect", "serve")
_WITHOUT_CACHE = ("train", "compile")  # it reports what compiling needs
NO_CACHE = "--no-compile-cache"
DESCRIPTION = f"""Long prompts through a fixed-budget KV cache. Every command also takes {NO_CACHE}:
keep no compiled programs in the user's cache folder. `lookahead --version` prints the version."""


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; see `run_command`."""
    args = list(sys.argv[1:] if args is None else args)
    keep = NO_CACHE not in args
    args = [arg for arg in args if arg != NO_CACHE]
    if args and args[0] in GROUPS:
        return _run_group(args[0], args[1:], keep=keep)
    if args == ["--version"]:
        print("lookahead", lookahead_jax.__version__)
        return 0
    named = args and args[0] in (command.__name__.lower() for command in COMMANDS)
    return run_command(
        lambda: parse(args),
        partial(_work, keep=keep),
        prog="lookahead",
        help_with=f"lookahead {args[0]} --help" if named else "",
    )


def _work(config: Any, *, keep: bool) -> None:
    if keep:
        _keep_programs()
    with telling(lambda what: say("lookahead", what)):
        COMMANDS[type(config)](config)


def _keep_programs() -> None:
    if problem := keep_compiled_programs():
        say("lookahead", f"notice: {problem}")


def parse(args: Sequence[str]):
    """The dataclass of the command that `args` name; SystemExit, as tyro's, if none fits.

    The help of a command with the options --policy, --drafter and --strategy lists their values.
    """
    commands = {command.__name__.lower(): command for command in (*COMMANDS, Train, Eval)}
    if len(args) > 1 and args[0] in _WITH_POLICY and {"-h", "--help"} & set(args[1:]):
        try:
            _parse(commands, args)
        finally:
            policies = policy_summaries()
            if args[0] not in _WITH_DRAFTS:
                del policies["speckv"]
            _list("Policies (--policy)", policies)
            if args[0] in _WITH_DRAFTER:
                _list("Drafters (--drafter)", drafter_summaries())
            if args[0] in _WITH_STRATEGY:
                _list("Strategies (--strategy)", strategy_summaries())
    return _parse(commands, args)


def _parse(commands: dict[str, type], args: Sequence[str]):
    return tyro.extras.subcommand_cli_from_dict(
        commands,
        prog="lookahead",
        description=DESCRIPTION,
        args=args,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def _list(title: str, sentences: dict[str, str]) -> None:
    """Prints names with a sentence each, as wide as tyro's help."""
    indent = max(map(len, sentences)) + 4
    print(f"\n{title}:")
    for name, sentence in sentences.items():
        head = f"  {name:{indent - 2}}"
        print(textwrap.fill(sentence, 80, initial_indent=head, subsequent_indent=" " * indent))


def _run_group(group: str, args: list[str], *, keep: bool) -> int:
    commands = GROUPS[group]
    if args and args[0] in commands:
        if keep and (group, args[0]) != _WITHOUT_CACHE:
            _keep_programs()
        return import_module(f"lookahead_jax.{commands[args[0]][0]}").main(args[1:])
    if args and args[0] in ("-h", "--help"):
        print(f"usage: lookahead {group} COMMAND ...")
        _list("Commands", {name: sentence for name, (_, sentence) in commands.items()})
        print(f"\nlookahead {group} COMMAND --help lists the options of a command.")
        return 0

    def unknown() -> None:
        given = f"unknown command {args[0]!r}" if args else "no command"
        raise UsageError(f"{given}: expected one of {', '.join(commands)}")

    return run_command(unknown, lambda _: None, prog=f"lookahead {group}")
