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
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from against_transformers import packaged_model
from common import RESULTS, ROOT, Help, parse, save
from turns import ran

RATIO, LAYER_RATIOS, LEAST = 0.5, (0.25, 0.75), -0.5
PAGES = ("method.md", "architecture.md", "evaluation.md")
TEMPLATE = "{{ messages[0]['content'] }}\n\nAnswer: "
SNAPKV = dict(window=64, pool="avg", kernel=5)
SAME = "computes the same"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One policy and the press that is its counterpart."""

    policy: str
    press: str
    build: Callable[[Any, Path], Any]  # (kvpress, exchange folder) -> press
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    how: str = SAME  # how the two differ
    first: int = 0  # entries at the prompt's begin whose scores are not compared: protected
    last: int = 0  # and at its end
    scored: bool = True

    @property
    def name(self) -> str:
        given = ",".join(
            f"{k}={v}" for k, v in self.settings.items() if k not in ("file", "shares")
        )
        return f"{self.policy}:{given}" if given else self.policy


def _snap(k):
    return k.SnapKVPress(RATIO, window_size=64, kernel_size=5)


ROWS = (
    Row(policy="knorm", press="KnormPress", build=lambda k, _: k.KnormPress(RATIO)),
    Row(policy="keydiff", press="KeyDiffPress", build=lambda k, _: k.KeyDiffPress(RATIO)),
    Row(
        policy="lagkv", press="LagKVPress", build=lambda k, _: k.LagKVPress(RATIO),
        first=4, last=255,
    ),
    Row(
        policy="snapkv", press="SnapKVPress", build=lambda k, _: _snap(k), settings=SNAPKV,
        last=64,
    ),
    Row(policy="tova", press="TOVAPress", build=lambda k, _: k.TOVAPress(RATIO), last=1),
    Row(
        policy="streaming_llm", press="StreamingLLMPress",
        build=lambda k, _: k.StreamingLLMPress(RATIO), scored=False,
    ),
    Row(
        policy="expected_attention", press="ExpectedAttentionPress",
        build=lambda k, _: k.ExpectedAttentionPress(RATIO), first=4,
    ),
    Row(
        policy="pyramidkv", press="PyramidKVPress", build=lambda k, _: k.PyramidKVPress(RATIO),
        settings=SNAPKV, last=64,
        how="kvpress adds the window to the budget before it shares it among layers",
    ),
    Row(
        policy="qfilter", press="QFilterPress, random filters",
        build=lambda k, folder: _filtered(k, folder), settings={"file": "filters"},
    ),
    Row(
        policy="h2o", press="ObservedAttentionPress",
        build=lambda k, _: k.ObservedAttentionPress(RATIO),
        how="kvpress divides the sum by the number of queries that see the entry and protects none "
        "(scores compared after that division)",
    ),
    Row(policy="kvzip", press="KVzipPress", build=lambda k, _: k.KVzipPress(RATIO), first=4),
    Row(
        policy="kvzip", press="KVzipPress, layerwise", settings={"allocate": "layer"},
        build=lambda k, _: k.KVzipPress(RATIO, layerwise=True), first=4,
    ),
    Row(
        policy="kvzip+", press="KVzipPress, plus", first=4,
        build=lambda k, _: k.KVzipPress(RATIO, kvzip_plus_normalization=True),
        how="kvpress divides by the norm of the layer's input after its RMS norm, not of the "
        "residual stream (arXiv 2601.07891)",
    ),
    Row(
        policy="critical:snapkv", press="CriticalKVPress(SnapKVPress)", settings=SNAPKV, last=64,
        build=lambda k, _: k.CriticalKVPress(_snap(k)),
    ),
    Row(
        policy="ada:snapkv", press="AdaKVPress(SnapKVPress), safeguard 0", last=64,
        settings=SNAPKV | {"alpha": 0}, build=lambda k, _: k.AdaKVPress(_snap(k), 0.0),
    ),
    Row(
        policy="ada:snapkv", press="AdaKVPress(SnapKVPress)", settings=SNAPKV, last=64,
        build=lambda k, _: k.AdaKVPress(_snap(k)),
        how="kvpress pins the best fifth of each head's budget instead of mixing shares",
    ),
    Row(
        policy="critical:ada:snapkv", press="CriticalAdaKVPress(SnapKVPress), safeguard 0",
        settings=SNAPKV | {"alpha": 0}, last=64,
        build=lambda k, _: k.CriticalAdaKVPress(_snap(k), 0.0),
    ),
    Row(
        policy="chunkkv:snapkv", press="ChunkKVPress(SnapKVPress)", settings=SNAPKV, last=64,
        build=lambda k, _: k.ChunkKVPress(_snap(k)),
        how="kvpress sums scores over heads, protects whole chunks and keeps a number of chunks",
    ),
    Row(
        policy="blockwise:keydiff", press="BlockPress(KeyDiffPress)", scored=False,
        build=lambda k, _: k.BlockPress(k.KeyDiffPress(RATIO)),
    ),
    Row(
        policy="layers:knorm", press="PerLayerCompressionPress(KnormPress)",
        settings={"shares": "shares"},
        build=lambda k, folder: k.PerLayerCompressionPress(
            k.KnormPress(RATIO), [1 - share for share in _read(folder / "shares.json")]
        ),
    ),
    Row(
        policy="threshold:keydiff", press="DMSPress(KeyDiffPress), window 0",
        settings={"least": LEAST},
        build=lambda k, _: k.DMSPress(k.KeyDiffPress(), threshold=LEAST, sliding_window_size=0),
    ),
    Row(
        policy="rerotate:knorm", press="KeyRerotationPress(KnormPress)", scored=False,
        build=lambda k, _: k.KeyRerotationPress(k.KnormPress(RATIO)),
    ),
)  # fmt: skip


def _read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def _filtered(k: Any, folder: Path) -> Any:
    """A QFilterPress with the filters of the exchange folder instead of published ones."""
    from safetensors.torch import load_file

    press = k.QFilterPress(RATIO)
    press.q_filters = load_file(folder / "filters.safetensors")["q_filters"]
    press.post_init_from_model = lambda model: None
    return press


def peer(folder: Path) -> None:
    """The peer's process: writes what every press keeps and scores to peer.npz, and versions."""
    from importlib.metadata import version

    import kvpress
    import numpy as np
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    transformers.logging.disable_progress_bar()
    kinds = {
        kind: transformers.AutoModelForCausalLM.from_pretrained(
            folder / "model", dtype=torch.float32, attn_implementation=kind
        ).eval()
        for kind in ("sdpa", "eager")
    }
    found = {}
    for number, prompt in enumerate(_read(folder / "prompts.json")):
        tokens = torch.tensor([prompt])
        for place, row in enumerate(ROWS):
            model = kinds["eager" if row.policy == "h2o" else "sdpa"]
            # Without a press the entries are those that any press is given.
            whole = transformers.DynamicCache()
            cache, press = transformers.DynamicCache(), row.build(kvpress, folder)
            scores = _recorded(press)
            with torch.inference_mode():
                model.model(input_ids=tokens, past_key_values=whole)
                with press(model):
                    model.model(input_ids=tokens, past_key_values=cache)
            kept = np.stack([
                _kept(whole.layers[i].keys[0], cache.layers[i].keys[0], layer.self_attn)
                for i, layer in enumerate(model.model.layers)
            ])  # fmt: skip
            found[f"{place}/{number}/kept"] = kept
            if row.scored:
                found[f"{place}/{number}/scores"] = np.stack(scores)
            if row.policy.startswith("rerotate"):
                keys = [layer.keys[0].numpy() for layer in cache.layers]
                found[f"{place}/{number}/keys"] = np.stack(keys)
    np.savez(folder / "peer.npz", **found)
    names = ("torch", "transformers", "kvpress")
    (folder / "versions.json").write_text(json.dumps({name: version(name) for name in names}))


def _recorded(press: Any) -> list:
    """A list that fills with the scores [K, T] of each layer while the press runs."""
    scores: list = []
    if hasattr(press, "compress_post"):
        cut = press.compress_post

        def record_all(model):
            scores.extend(press.score_val[:, 0].numpy().copy())
            cut(model)

        press.compress_post = record_all
        return scores
    while hasattr(press, "press"):
        press = press.press
    score = press.score

    def record(*args, **kwargs):
        given = score(*args, **kwargs)
        scores.append(given[0].numpy().copy())
        return given

    press.score = record
    return scores


def _kept(whole: Any, kept: Any, attention: Any) -> Any:
    """Which entries of a layer a press keeps, bool [K, T]: those it neither drops nor masks."""
    import numpy as np

    mask = np.zeros(whole.shape[:2], bool)
    for head, rows in enumerate(whole.numpy()):
        place = {row.tobytes(): i for i, row in enumerate(rows)}  # rotated keys are all different
        at = [place.get(row.tobytes()) for row in kept[head].numpy()]
        mask[head, [i for i in at if i is not None]] = True
    masked = getattr(attention, "masked_key_indices", None)
    if masked is not None:
        mask[masked[1].numpy(), masked[2].numpy()] = False
    return mask


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
            read = read_prompt(
                model.params, jnp.asarray(tokens), config=model.config, policy=policy,
                budget=budget, new_tokens=0,
            )  # fmt: skip
            peer_keys = theirs[f"{name}/keys"]
            keys = np.asarray(read.cache.k)[:, 0, :, : peer_keys.shape[2]]
            off = np.abs(keys - peer_keys).max(-1) / np.abs(peer_keys).max((-2, -1))[..., None]
            parts.append((off < 1e-3).mean(-1))
            differences.append(float(off.max()))
            entry.setdefault("next_positions", []).append(
                {"here": int(read.cache.next_pos[0]), "kvpress": peer_keys.shape[2]}
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

    packaged_model(folder / "model", options.model)
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    hf = _read(folder / "model" / "config.json")
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
        versions = _read(folder / "versions.json") | {"jax": jax.__version__}
    arguments = ["--model", Path(options.model).name, "--tokens", *map(str, options.tokens)]
    report = ran(Path(__file__).name, *arguments, "--seed", str(options.seed))
    save(options.out, report | {"ratio": RATIO, "versions": versions, "rows": rows})
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
