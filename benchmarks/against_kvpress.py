"""Kept entries and scores of the policies against the presses of kvpress, on the same weights.

Both sides read the same prompts in float32 and drop half of the entries. A process in the peer's
environment, made as benchmarks/against_transformers.py says, writes what each press keeps:

    python benchmarks/against_kvpress.py --peer PEER/bin/python

The table has, over all prompts, layers and KV heads, the kept entries that both have in common
(in parts of those of the side that keeps more), the mean over heads and the smallest of any head,
and the largest difference of scores, in parts of the largest score of its head, over entries that
neither side protects. Prompts are the first tokens of pages of docs/. KVzip replays the prompt
behind a chat template without a system part, since kvpress does not replay that part.
"""

import dataclasses
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated, Any

from against_transformers import packaged_model
from common import RESULTS, ROOT, Help, parse, save
from kvpress_presses import LAYER_RATIOS, RATIO, ROWS, Row, peer, read
from turns import ran

PAGES = ("method.md", "architecture.md", "evaluation.md")
TEMPLATE = "{{ messages[0]['content'] }}\n\nAnswer: "


def overlap(ours: Any, theirs: Any) -> Any:
    """Common entries in parts of the larger set, of bool [..., T]; 1 where both are empty."""
    import numpy as np

    most = np.maximum(ours.sum(-1), theirs.sum(-1))
    return np.where(most, (ours & theirs).sum(-1) / np.maximum(most, 1), 1.0)


def difference(ours: Any, theirs: Any, first: int, last: int) -> float | None:
    """The largest difference of scores [..., T] in parts of the head's largest; None without any.

    `first` and `last` entries are left out.
    """
    import numpy as np

    part = slice(first, ours.shape[-1] - last)
    a, b = ours[..., part], theirs[..., part]
    if not a.shape[-1]:
        return None
    return float((np.abs(a - b).max(-1) / np.maximum(np.abs(b).max(-1), 1e-30)).max())


def compare(place: int, row: Row, model: Any, prompts: list[list[int]], folder: Path) -> dict:
    """One row of the report."""
    import jax.numpy as jnp
    import numpy as np

    import lookahead_jax as lk
    from lookahead_jax.prompts.read import read_prompt

    theirs = np.load(folder / "peer.npz")
    files = {"file": folder / "filters.safetensors", "shares": folder / "shares.json"}
    settings = {k: str(files.get(k, v)) for k, v in row.settings.items()}
    policy = lk.make_policy(row.policy, **settings)
    parts, differences, entry = [], [], {"policy": row.name, "press": row.press}
    for number, prompt in enumerate(prompts):
        tokens, length = np.asarray([prompt], np.int32), len(prompt)
        name, budget = f"{place}/{number}", int(length * RATIO)
        if row.policy.startswith("rerotate"):
            result = read_prompt(
                model.params, jnp.asarray(tokens), config=model.config, policy=policy,
                budget=budget, new_tokens=0,
            )  # fmt: skip
            peer_keys = theirs[f"{name}/keys"]
            keys = np.asarray(result.cache.k)[:, 0, :, : peer_keys.shape[2]]
            off = np.abs(keys - peer_keys).max(-1) / np.abs(peer_keys).max((-2, -1))[..., None]
            parts.append((off < 1e-3).mean(-1))
            differences.append(float(off.max()))
            entry.setdefault("next_positions", []).append(
                {"here": int(result.cache.next_pos[0]), "kvpress": peer_keys.shape[2]}
            )
            continue
        capped = length if row.policy.startswith("threshold") else budget
        scored = lk.score(model, tokens, policy=policy, budget=capped)
        pos = np.asarray(scored.kept)[:, 0]
        kept = (pos[..., None] == np.arange(length)).any(-2)
        parts.append(overlap(kept, theirs[f"{name}/kept"]))
        if row.scored:
            scores = np.asarray(scored.scores)[:, 0]
            if row.policy == "h2o":
                scores = scores / np.arange(length, 0, -1)
            peer_scores = theirs[f"{name}/scores"]
            differences.append(difference(scores, peer_scores, row.first, row.last))
    known = [d for d in differences if d is not None]
    return entry | {
        "equal_entries": float(np.mean([part.mean() for part in parts])),
        "equal_entries_by_prompt": [float(part.mean()) for part in parts],
        "worst_head": float(min(part.min() for part in parts)),
        "score_difference": max(known) if known else None,
        "how": row.how,
    }


def table(rows: list[dict]) -> str:
    """The results as Markdown."""
    lines = [
        "| Policy | Press | Equal entries | Worst head | Score difference | How they differ |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        score = row["score_difference"]
        shown = "" if score is None else f"{score:.1e}"
        equal = f"{row['equal_entries']:.4f} | {row['worst_head']:.3f}"
        lines.append(f"| `{row['policy']}` | {row['press']} | {equal} | {shown} | {row['how']} |")
    return "\n".join(lines)


def exchange(options: "Options", folder: Path) -> list[list[int]]:
    """Writes what both sides read: weights, filters, shares and prompts. Returns the prompts."""
    import numpy as np
    from safetensors.numpy import save_file

    from lookahead_jax.checkpoints.tokenizer import Tokenizer

    given = Path(options.model)
    packaged_model(folder / "model", str(given.resolve()) if given.is_dir() else options.model)
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    hf = read(folder / "model" / "config.json")
    layers, heads = hf["num_hidden_layers"], hf["num_key_value_heads"]
    width = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    filters = np.random.default_rng(options.seed).normal(size=(layers, heads, width))
    save_file({"q_filters": filters.astype(np.float32)}, folder / "filters.safetensors")
    shares = [1 - LAYER_RATIOS[i % 2] for i in range(layers)]
    (folder / "shares.json").write_text(json.dumps(shares))
    tokenizer = Tokenizer.load(folder / "model")
    pages = [tokenizer.encode((ROOT / "docs" / page).read_text("utf-8")) for page in PAGES]
    prompts = [pages[i % len(pages)][:n] for i, n in enumerate(options.tokens)]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    return prompts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    peer: Annotated[str | None, Help("Python of the environment with transformers and kvpress")] = (
        None
    )
    model: Annotated[str, Help("name or folder of a Llama checkpoint")] = "smollm2"
    tokens: Annotated[tuple[int, ...], Help("prompt lengths, multiples of 4 above 64")] = (
        200,
        400,
        600,
    )
    seed: Annotated[int, Help("seed of the random filters")] = 0
    out: Annotated[Path, Help("file of the report")] = RESULTS / "against_kvpress.json"
    serve: Annotated[Path | None, Help(None)] = None


def check(options: Options) -> None:
    """Raises SystemExit for options that cannot be compared."""
    if not options.peer:
        raise SystemExit("--peer is needed: the Python of an environment as described in --help")
    wrong = [n for n in options.tokens if n % 4 or n <= 64]
    if wrong:
        raise SystemExit(f"--tokens {wrong[0]}: give multiples of 4 above 64, so that parts of it "
                         "are whole and longer prompts than SnapKV's window")  # fmt: skip


def main() -> None:
    options = parse(Options, __doc__)
    if options.serve:
        peer(options.serve)
        return
    check(options)
    import jax

    import lookahead_jax as lk

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prompts = exchange(options, folder)
        subprocess.run([options.peer, __file__, "--serve", folder], check=True)
        model = lk.load(folder / "model", dtype="float32")
        rows = []
        for place, row in enumerate(ROWS):
            rows.append(compare(place, row, model, prompts, folder))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
        versions = read(folder / "versions.json") | {"jax": jax.__version__}
    arguments = ["--model", Path(options.model).name, "--tokens", *map(str, options.tokens)]
    report = ran(Path(__file__).name, *arguments, "--seed", str(options.seed))
    save(options.out, report | {"ratio": RATIO, "versions": versions, "rows": rows})
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
