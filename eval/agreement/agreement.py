"""How closely a model on a cut cache follows itself on the full cache, on prompts of your own.

    lookahead eval agreement --prompts FILE.jsonl --model MODEL --policies SPEC ... --out RUN

No right answers are needed: the reference is the model's own greedy answer on the full cache, or an
answer of the file. With --evict-every the cut caches are cut again while the answer is read. The
same command resumes a run, and other policies, budgets and categories extend it. RUN/rows.jsonl has
a row for each prompt, policy and budget; the table at the end is also in RUN/table.md.
"""

import contextlib
import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tyro
from tqdm import tqdm

import lookahead_jax as lk
from lookahead_jax.checkpoints.load import Model
from lookahead_jax.eval.agreement.config import AgreementConfig, reads_modules
from lookahead_jax.eval.agreement.forced import forced_agreement, read_text
from lookahead_jax.eval.agreement.measure import agreements, read_reference
from lookahead_jax.eval.agreement.prompts import Prompt, read_prompts
from lookahead_jax.eval.agreement.table import ROW, table
from lookahead_jax.eval.grid.config import method_of, model_folder
from lookahead_jax.eval.grid.rows import ROWS, RowFile, read_rows
from lookahead_jax.generation.settings import EvictionSettings
from lookahead_jax.host.command import run_command
from lookahead_jax.host.files import atomic_write, make_folder
from lookahead_jax.host.lock import folder_lock
from lookahead_jax.host.run_folder import keep_settings
from lookahead_jax.model.fingerprint import fingerprint
from lookahead_jax.modules.definition import LookaheadModules
from lookahead_jax.modules.files import CONFIG_FILE

PROG = "lookahead eval agreement"

Key = tuple[str, str, int, str | None]
"""The id of a prompt, a policy, a budget, and the digest of the modules that the policy reads."""


def run(config: AgreementConfig) -> None:
    """Measures what the run lacks, prints the table and writes it to `table.md` of the run.

    Raises ValueError for a model without a tokenizer, or with sliding windows where caches are cut
    after the prompt only, for a file without prompts, and for a run begun with other settings;
    BlockingIOError if another process writes it.
    """
    print(f"{PROG}: loading the model", file=sys.stderr, flush=True)
    model = lk.load(model_folder(config.model), dtype=config.dtype)
    if model.tokenizer is None:
        raise ValueError(f"{config.model} has no tokenizer, and the prompts are texts")
    modules = None
    if (folder := config.modules) is not None:
        modules = lk.load_modules(folder, params=model.params, config=model.config)
    prompts = read_prompts(
        config.prompts, model.tokenizer, categories=config.categories, count=config.count,
        shortest=_fewest_tokens(config), longest=min(config.longest, _most_tokens(config, model)),
        answers=config.responses == "given", answer_tokens=config.response_tokens,
    )  # fmt: skip
    make_folder(config.out)
    with folder_lock(config.out):
        keep_settings(config.out, _settings(config, model), ROWS)
        _measure(config, model, prompts, modules)
        rows = list(read_rows(config.out / ROWS, ROW))
    asked, digests = {prompt.id for prompt in prompts}, _digests(config)
    rows = [r for r in rows if r["id"] in asked and digests.get(r["policy"]) == r["modules"]]
    text = table(rows, config.policies, config.budgets)
    atomic_write(config.out / "table.md", text)
    print(text, end="")


def _fewest_tokens(config: AgreementConfig) -> int:
    """So many that the largest budget cuts: the prompt, or while decoding prompt and answer.

    An own answer that ends early may leave a text of which nothing is cut. It is measured as well,
    so that every budget has the same prompts.
    """
    least = max(config.budgets) + 1
    if config.evict_every is None or config.responses == "given":
        return least
    return max(least - config.own_tokens, 1)


def _most_tokens(config: AgreementConfig, model: Model) -> int:
    return model.config.max_position - (0 if config.responses == "given" else config.own_tokens)


def _settings(config: AgreementConfig, model: Model) -> dict[str, Any]:
    """What decides on the numbers of a row."""
    own = config.responses == "own"
    return {
        "base_fingerprint": fingerprint(model.params),
        "dtype": config.dtype,
        "prompts": hashlib.sha256(config.prompts.read_bytes()).hexdigest(),
        "response_tokens": config.own_tokens if own else config.response_tokens,
        "evict_every": config.evict_every,
        "responses": None if own else config.responses,
    }


def _measure(
    config: AgreementConfig,
    model: Model,
    prompts: Sequence[Prompt],
    modules: LookaheadModules | None,
) -> None:
    """Appends the rows that the run does not hold yet; progress goes to stderr."""
    path = config.out / ROWS
    done = {_key(row) for row in read_rows(path, ROW)}
    digests = _digests(config)
    with (
        contextlib.closing(RowFile(path)) as file,
        tqdm(total=len(prompts) * len(config.policies), unit="cut") as bar,
    ):
        for prompt in prompts:
            bar.set_description(f"prompt of {len(prompt.ids)} tokens")
            missing = {
                spec: [b for b in config.budgets if (prompt.id, spec, b, digests[spec]) not in done]
                for spec in config.policies
            }
            bar.update(sum(not budgets for budgets in missing.values()))
            if any(missing.values()):
                measured = _rows if config.evict_every is None else _rows_while_decoding
                for rows in measured(model, prompt, missing, config=config, modules=modules):
                    file.append(row | {"modules": digests[row["policy"]]} for row in rows)
                    bar.update()


def _rows(
    model: Model,
    prompt: Prompt,
    missing: Mapping[str, Sequence[int]],
    *,
    config: AgreementConfig,
    modules: LookaheadModules | None,
) -> Iterator[list[dict[str, Any]]]:
    """The missing rows, policy by policy; the prompt is read once."""
    reference = read_reference(model, prompt.ids, config.own_tokens)
    for spec, budgets in missing.items():
        if not budgets:
            continue
        found = agreements(
            model, reference, method_of(spec).policy, tuple(budgets), modules=modules
        )
        yield [
            _row(prompt, spec, budget) | agreement._asdict()
            for budget, agreement in zip(budgets, found, strict=True)
        ]


def _rows_while_decoding(
    model: Model,
    prompt: Prompt,
    missing: Mapping[str, Sequence[int]],
    *,
    config: AgreementConfig,
    modules: LookaheadModules | None,
) -> Iterator[list[dict[str, Any]]]:
    """The missing rows, policy by policy; prompt and answer are read again for each of them."""
    text = read_text(model, prompt.ids, prompt.answer, response_tokens=config.own_tokens)
    common = {"answer_tokens": len(text.answer)}
    for spec, budgets in missing.items():
        if not budgets:
            continue
        found = []
        for budget in budgets:
            settings = EvictionSettings(
                policy=method_of(spec).policy, budget=budget, modules=modules,
                evict_every=config.evict_every,
            )  # fmt: skip
            measured = forced_agreement(model, text, settings)
            found.append(_row(prompt, spec, budget) | common | measured._asdict())
        yield found


def _row(prompt: Prompt, spec: str, budget: int) -> dict[str, Any]:
    return {
        "id": prompt.id, "category": prompt.category, "prompt_tokens": len(prompt.ids),
        "policy": spec, "budget": budget,
    }  # fmt: skip


def _key(row: dict[str, Any]) -> Key:
    return row["id"], row["policy"], row["budget"], row["modules"]


def _digests(config: AgreementConfig) -> dict[str, str | None]:
    """Policy -> the digest of the modules it reads, which their config file holds."""
    folder = config.modules
    digest = hashlib.sha256((folder / CONFIG_FILE).read_bytes()).hexdigest() if folder else None
    return {spec: digest if reads_modules(spec) else None for spec in config.policies}


def main(args: Sequence[str] | None = None) -> int:
    """The command line; a failure is one line on stderr."""
    return run_command(
        lambda: tyro.cli(AgreementConfig, prog=PROG, args=args, description=__doc__), run, prog=PROG
    )


if __name__ == "__main__":
    sys.exit(main())
