"""The comparison of policies: forced answers on masked caches are what real eviction decodes."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lookahead_jax as lk
from lookahead_jax import EMBEDDED_MODULES
from lookahead_jax.decoding.step import decode
from lookahead_jax.eval.compare import compare, methods
from lookahead_jax.eval.compare.config import CompareConfig
from lookahead_jax.eval.compare.masked import RESPONSE, keep_masks, outcome, read_full
from lookahead_jax.eval.compare.measure import Comparison, Measured
from lookahead_jax.eval.compare.summary import best_settings, duel, summarise, verdicts
from lookahead_jax.host.files import save_arrays
from lookahead_jax.modules.definition import LookaheadConfig, init_modules
from lookahead_jax.policies.base import WithModules
from lookahead_jax.policies.registry import make_policy
from lookahead_jax.prompts.read import read_prompt
from tests import tiny

MODEL = tiny.config()
MODULES = LookaheadConfig(tokens=3, rank=2, alpha=4.0, targets=("q", "up"), init="normal")
EOS = (5,)
BUDGETS = (6, 20)
ANSWER = 8
POLICIES = [
    make_policy("snapkv", window=8),  # at a budget of 6 the window is cut
    make_policy("ada", window=4),
    make_policy("critical:chunkkv:snapkv", window=4, chunk_size=3),
    make_policy("lagkv", lag_size=4),  # what is protected depends on the budget
    make_policy("oracle", response_tokens=RESPONSE),
    make_policy("laq", draft_tokens=4, draft_window=4),
    make_policy("h2o", window=4),
    make_policy("lookaheadkv"),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)
def test_masks_keep_what_real_eviction_keeps_and_choose_what_it_decodes(policy):
    params, tokens = tiny.params(MODEL), tiny.batch((40, 40), MODEL)
    modules = None
    if isinstance(policy.reading, WithModules):
        modules = init_modules(jax.random.key(0), MODULES, MODEL)
    shared = dict(config=MODEL, eos_ids=EOS)
    evicted, answers = [], []
    for budget in BUDGETS:
        read = read_prompt(
            params, tokens,
            policy=policy, budget=budget, new_tokens=RESPONSE, modules=modules, **shared,
        )  # fmt: skip
        evicted.append(np.asarray(read.cache.pos))
        answers.append(
            decode(params, read.cache, read.logits, max_new_tokens=ANSWER, **shared).tokens
        )
    for u, answer in enumerate(answers):
        reference = read_full(params, tokens, answer, **shared)
        if u == 0:
            keep = keep_masks(params, reference, policy, BUDGETS, modules=modules, **shared)
            for mask, pos in zip(keep, evicted, strict=True):
                kept = np.where(mask, np.asarray(reference.cache.pos), -1)
                for ours, real in zip(
                    kept.reshape(-1, kept.shape[-1]), pos.reshape(-1, pos.shape[-1]), strict=True
                ):
                    assert ours[ours >= 0].tolist() == real[real >= 0].tolist()
        choice = np.asarray(outcome(params, reference, keep, config=MODEL).choice[u])
        there = np.asarray(answer) >= 0
        np.testing.assert_array_equal(choice[there], np.asarray(answer)[there])


def test_divergence_is_zero_where_nothing_is_evicted_and_grows_with_eviction():
    params, tokens = tiny.params(MODEL), tiny.batch((40, 40), MODEL)
    reference = read_full(params, tokens, None, config=MODEL, eos_ids=EOS)
    np.testing.assert_array_equal(reference.forced, reference.response)
    keep = jnp.stack([jnp.ones_like(reference.cache.pos, bool), reference.cache.pos % 3 == 0])
    result = outcome(params, reference, keep, config=MODEL)
    assert float(result.kl[0].max()) < 1e-5
    assert float(result.kl[1].mean()) > 1e-2
    there = np.asarray(reference.forced) >= 0
    choice = np.asarray(result.choice[0])
    np.testing.assert_array_equal(choice[there], np.asarray(reference.forced)[there])


def test_every_setting_of_every_method_builds_a_policy_of_its_own():
    for name, settings in methods.METHODS.items():
        built = [methods.build(name, setting) for setting in settings]
        assert len(set(built)) == len(settings), name


def test_best_settings_takes_the_most_exact_and_then_the_least_divergent(tmp_path):
    cells = {  # number -> exact and kl at two budgets
        0: ([0.0, 1.0], [0.1, 0.3]),
        1: ([1.0, 1.0], [0.9, 0.2]),
        2: ([0.0, 0.0], [0.0, 0.0]),
    }
    for number, (exact, kl) in cells.items():
        (tmp_path / "records").mkdir(exist_ok=True)
        save_arrays(
            tmp_path / "records" / f"snapkv.{number}.npz",
            exact=np.array(exact)[:, None], kl=np.array(kl)[:, None], budgets=np.array([4, 8]),
        )  # fmt: skip
    assert best_settings(tmp_path) == {"records": {"snapkv": [1, 1]}}


def test_chosen_settings_come_back_for_their_length_and_budgets(tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "CHOSEN", tmp_path / "chosen.json")
    methods.write_chosen({"records": {"snapkv": [3, 0]}}, 512, (4, 8))
    methods.write_chosen({"records": {"h2o": [1, 2]}, "code": {"h2o": [0, 0]}}, 512, (4, 8))
    snapkv, h2o = methods.METHODS["snapkv"], methods.METHODS["h2o"]
    assert methods.read_chosen("records", "h2o", 512, (4, 8)) == [h2o[1], h2o[2]]
    assert methods.read_chosen("code", "h2o", 512, (4, 8)) == [h2o[0], h2o[0]]
    assert methods.read_chosen("records", "snapkv", 512, (4, 8)) == [snapkv[3], snapkv[0]]
    assert methods.read_chosen("records", "tova", 512, (4, 8)) == [(), ()]
    for task, length, budgets in [("tagged", 512, (4, 8)), ("records", 99, (4, 8))]:
        with pytest.raises(ValueError, match=r"snapkv.*run --tune"):
            methods.read_chosen(task, "snapkv", length, budgets)


load_once = functools.cache(lk.load)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A run of two cells that takes no time to measure; all such runs share one loaded model."""

    def measured(comparison, task, *args):
        shape = (len(comparison.budgets), comparison.config.count)
        return Measured(*np.zeros((4, *shape), np.float32))

    monkeypatch.setattr(lk, "load", load_once)
    monkeypatch.setattr(Comparison, "cell", measured)
    monkeypatch.setattr(Comparison, "full", measured)
    monkeypatch.setattr(methods, "CHOSEN", tmp_path / "chosen.json")
    return CompareConfig(
        out=tmp_path / "run", tasks=("records",), methods=("random",), length=100, count=2
    )


def test_a_run_is_not_resumed_with_other_settings(small, tmp_path):
    compare.compare(small)
    wider = dataclasses.replace(small, tasks=("records", "code"), methods=("tova",))
    compare.compare(wider)
    table = (small.out / "table.md").read_text()
    assert {path.name for path in small.out.glob("*/*.npz")} == {
        "full.npz", "random.npz", "tova.npz",
    }  # fmt: skip
    settings = json.loads((small.out / "settings.json").read_text())
    assert (settings["length"], settings["count"], settings["split"]) == (100, 2, "test")

    folder = shutil.copytree(EMBEDDED_MODULES, tmp_path / "modules")
    others = [
        ({"length": 120}, "length: 100, now 120"),
        ({"count": 3, "split": "validation"}, "count: 2, now 3, split: 'test', now 'validation'"),
        ({"settings": ("pool=max",)}, r"settings: \[\], now \['pool=max'\]"),
        ({"modules": (f"lookaheadkv={folder}",)}, r"modules: .*"),
    ]
    for changes, named in others:
        with pytest.raises(ValueError, match=rf"other settings \({named}\); choose"):
            compare.compare(dataclasses.replace(small, **changes))
    with pytest.raises(ValueError, match=r"\(split: .*, tune: .*, chosen_settings: .*\); choose"):
        compare.tune(dataclasses.replace(small, tune=True))
    methods.write_chosen({"records": {"h2o": [0]}}, 100, (4,))
    with pytest.raises(ValueError, match=r"settings \(chosen_settings: .*\)"):
        compare.compare(small)
    assert (small.out / "table.md").read_text() == table

    (small.out / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"no settings.json, .*; choose another folder"):
        compare.compare(small)


def test_modules_are_told_apart_by_their_content(small, tmp_path):
    folder = shutil.copytree(EMBEDDED_MODULES, tmp_path / "modules")
    config = dataclasses.replace(small, modules=(f"lookaheadkv={folder}",))
    compare.compare(config)
    moved = folder.rename(tmp_path / "moved")
    compare.compare(dataclasses.replace(config, modules=(f"lookaheadkv={moved}",)))
    about = moved / "lookahead_config.json"  # as of modules that were trained on
    about.write_text(about.read_text().replace('"tensors_sha256": "', '"tensors_sha256": "0'))
    with pytest.raises(ValueError, match=r"\(modules: .*\)"):
        compare.compare(dataclasses.replace(config, modules=(f"lookaheadkv={moved}",)))


def test_tuning_is_resumed_after_it_has_chosen(small):
    config = dataclasses.replace(small, tune=True, methods=("h2o",))
    compare.tune(config)
    assert methods.chosen_at(100)["settings"]["records"]["h2o"]
    compare.tune(config)
    with pytest.raises(ValueError, match=r"\(split: .*, tune: .*, chosen_settings: .*\)"):
        compare.compare(dataclasses.replace(config, tune=False))


def test_settings_of_the_learned_policy_come_as_text():
    policy = methods.build(methods.LOOKAHEAD, methods.setting_of(("pool=max", "window=8")))
    assert (policy.pool, policy.window) == ("max", 8)
    with pytest.raises(ValueError, match="settings pool: expected NAME=VALUE"):
        methods.setting_of(("pool",))


def test_foreign_files_and_unknown_names_are_one_clear_line(small, tmp_path, capsys):
    compare.compare(small)
    foreign = small.out / "records" / "random.npz"
    save_arrays(foreign, weights=np.zeros(3))
    with pytest.raises(ValueError, match=r"random.npz: not a cell of .* no array 'budgets'"):
        compare.compare(small)
    with pytest.raises(ValueError, match=r"npz: not a setting of a comparison"):
        best_settings(small.out)
    assert compare.main(["--out", str(small.out), "--tasks", "poems"]) != 0
    assert "unknown task 'poems'; known: records" in capsys.readouterr().err


def test_verdicts_name_the_best_rival_and_the_share_of_the_gap():
    def row(*values):
        return np.array([values], np.float32)

    scores = {
        "snapkv": row(0, 0, 0, 1),
        "random": row(0, 0, 0, 0),
        "oracle": row(1, 1, 1, 1),
        "laq": row(1, 1, 0, 1),
        "lookaheadkv": row(1, 1, 0, 1),
    }
    cells = {name: {"score": s, "kl": s, "recall": s} for name, s in scores.items()}
    (line,) = verdicts(cells, np.array([8]))
    assert (line["rival"], line["budget"]) == ("snapkv", 8)
    assert line["over_rival"]["mean"] == 0.5
    assert line["over_laq"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    np.testing.assert_allclose(line["gap_closed"], 0.5 / 0.75)
    assert summarise(cells, "records", dict.fromkeys(cells, 1))["laq"]["score"][0]["mean"] == 0.75
    wide = duel(np.array([1.0, 0.0] * 50), np.array([0.0, 1.0] * 50))
    assert wide["low"] < 0 < wide["high"]
