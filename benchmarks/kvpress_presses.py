"""The presses of kvpress beside the policies, and the process that runs them (against_kvpress.py).

The peer's environment has neither JAX nor this package, so this module imports the standard library
until a press is built.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

RATIO, LAYER_RATIOS, LEAST = 0.5, (0.25, 0.75), -0.5
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
            k.KnormPress(RATIO), [1 - share for share in read(folder / "shares.json")]
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


def read(path: Path) -> Any:
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
    for number, prompt in enumerate(read(folder / "prompts.json")):
        tokens = torch.tensor([prompt])
        wholes = {}  # without a press: the entries that any press is given
        for kind, model in kinds.items():
            wholes[kind] = transformers.DynamicCache()
            with torch.inference_mode():
                model.model(input_ids=tokens, past_key_values=wholes[kind])
        for place, row in enumerate(ROWS):
            kind = "eager" if row.policy == "h2o" else "sdpa"
            model, whole = kinds[kind], wholes[kind]
            cache, press = transformers.DynamicCache(), row.build(kvpress, folder)
            scores = _recorded(press)
            with torch.inference_mode(), press(model):
                model.model(input_ids=tokens, past_key_values=cache)
            if row.policy.startswith("rerotate"):  # keeps no key as it was
                keys = [layer.keys[0].numpy() for layer in cache.layers]
                found[f"{place}/{number}/keys"] = np.stack(keys)
                continue
            kept = [
                _kept(whole.layers[i].keys[0], cache.layers[i].keys[0], layer.self_attn)
                for i, layer in enumerate(model.model.layers)
            ]
            found[f"{place}/{number}/kept"] = np.stack(kept)
            if row.scored:
                found[f"{place}/{number}/scores"] = np.stack(scores)
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
        mask[head, [place[row.tobytes()] for row in kept[head].numpy()]] = True
    masked = getattr(attention, "masked_key_indices", None)
    if masked is not None:
        mask[masked[1].numpy(), masked[2].numpy()] = False
    return mask
