"""The policies of the comparison, and the candidate settings of each.

A baseline gets its best setting per task and budget, chosen on the validation split. The learned
policy always uses its default setting.
"""

import json
from itertools import product
from pathlib import Path
from typing import Any

from lookahead_jax import EMBEDDED_MODEL
from lookahead_jax.host.files import atomic_write
from lookahead_jax.policies.base import Policy
from lookahead_jax.policies.registry import make_policy

CHOSEN = Path(__file__).parent / "chosen_settings.json"
ORACLE = "oracle"
LOOKAHEAD = "lookaheadkv"

# Modules that are tested on a task as unseen were trained on the other folds only.
FOLDS = {
    "records": "a",
    "tagged": "a",
    "spans": "b",
    "chains": "b",
    "lookup": "c",
    "multi_lookup": "c",
    "code": "c",
}
_ASSETS = EMBEDDED_MODEL.parent
SHIPPED = (
    *(
        f"{LOOKAHEAD}={_ASSETS / folder}"
        for folder in ("lookahead", "comparison/all-1", "comparison/all-2")
    ),
    f"{LOOKAHEAD}-unseen={_ASSETS}/comparison/unseen-{{fold}}",
)
"""The modules that ship, for `--modules`: three seeds, and one per fold, trained without it."""

Setting = tuple[tuple[str, str], ...]
"""Arguments of make_policy, as pairs of strings."""


def _grid(**choices: tuple) -> tuple[Setting, ...]:
    return tuple(
        tuple((name, str(value)) for name, value in zip(choices, values, strict=True))
        for values in product(*choices.values())
    )


def _pooled(prefix: str, settings: tuple[Setting, ...], kinds: tuple[tuple[str, int], ...]):
    """Every setting with every kind of pooling, whose fields start with `prefix`."""
    return tuple(
        (*setting, (f"{prefix}pool", pool), (f"{prefix}kernel", str(kernel)))
        for setting in settings
        for pool, kernel in kinds
    )


_POOLS = (("none", 1), ("max", 3), ("max", 7), ("avg", 5))
_FEW = (("none", 1), ("max", 7))
_SNAP = _pooled("", _grid(window=(1, 4, 8, 16, 32)), _POOLS)
_SNAP_FEW = _pooled("", _grid(window=(4, 8)), _FEW)
_DRAFT = (
    ("draft_tokens", "16"),
    ("draft_pool", "none"),
)  # as long as the answers, cut at their end
_LONG_DRAFT = (("draft_tokens", "32"), ("draft_pool", "none"))  # as long as continued code
_LAQ = (
    (),  # the defaults of its public code
    (*_DRAFT, ("draft_window", "4"), ("pool", "none")),
    (*_DRAFT, ("draft_window", "8"), ("pool", "none")),
    (*_DRAFT, ("draft_window", "8"), ("pool", "max")),
    (*_LONG_DRAFT, ("draft_window", "4"), ("pool", "none")),
    (*_LONG_DRAFT, ("draft_window", "8"), ("pool", "none")),
)

METHODS: dict[str, tuple[Setting, ...]] = {
    "random": ((),),
    "streaming_llm": ((),),
    "keydiff": ((),),
    "expected_attention": ((),),
    "tova": ((),),
    "h2o": _grid(window=(0, 8, 32)),
    "snapkv": _SNAP,
    "pyramidkv": _SNAP_FEW,
    "ada": tuple((("inner", "snapkv"), *setting) for setting in _SNAP_FEW),
    "laq": _LAQ,
    "laq++": _LAQ,
    LOOKAHEAD: ((),),
    ORACLE: ((),),
}
DRAFT_FREE = tuple(name for name in METHODS if name not in ("laq", "laq++", LOOKAHEAD, ORACLE))


def build(method: str, setting: Setting) -> Policy:
    """The policy with this setting."""
    return make_policy(method, **dict(setting))


def setting_of(fields: tuple[str, ...]) -> Setting:
    """A setting from NAME=VALUE strings; ValueError for any other form."""
    pairs = [field.partition("=") for field in fields]
    if not all(name and value for name, _, value in pairs):
        raise ValueError(f"settings {' '.join(fields)}: expected NAME=VALUE")
    return tuple((name, value) for name, _, value in pairs)


def write_chosen(
    chosen: dict[str, dict[str, list[int]]], length: int, budgets: tuple[int, ...]
) -> None:
    """Stores task -> method -> the number of its best setting at each budget, for one length.

    Choices for other tasks and methods at these budgets are kept.
    """
    content = json.loads(CHOSEN.read_text()) if CHOSEN.is_file() else {}
    known = content.get(str(length), {})
    settings = known.get("settings", {}) if known.get("budgets") == list(budgets) else {}
    for task, methods in chosen.items():
        texts = {m: [_text(METHODS[m][i]) for i in best] for m, best in methods.items()}
        settings[task] = settings.get(task, {}) | texts
    content[str(length)] = {"budgets": budgets, "settings": settings}
    atomic_write(CHOSEN, json.dumps(content, indent=1) + "\n")


def chosen_at(length: int) -> dict[str, Any]:
    """All choices for one length: the `budgets`, and the `settings` as text."""
    content = json.loads(CHOSEN.read_text()) if CHOSEN.is_file() else {}
    return content.get(str(length), {"budgets": [], "settings": {}})


def read_chosen(task: str, method: str, length: int, budgets: tuple[int, ...]) -> list[Setting]:
    """The setting of a method at each budget. Methods with a single setting need no file.

    Raises:
      ValueError: nothing was chosen for this length, task or method; `--tune` does that.
    """
    if len(METHODS[method]) == 1:
        return [METHODS[method][0]] * len(budgets)
    content = chosen_at(length)
    texts = content["settings"].get(task, {}).get(method)
    known = {_text(setting): setting for setting in METHODS[method]}
    fits = tuple(content["budgets"]) == budgets
    if texts is None or not fits or not known.keys() >= set(texts):
        raise ValueError(
            f"no setting of {method} was chosen for {task} at {length} tokens; run --tune first"
        )
    return [known[text] for text in texts]


def _text(setting: Setting) -> str:
    return " ".join(f"{name}={value}" for name, value in setting)
