"""`lookahead eval frontier`: bytes of entries, differences at equal bytes, and a run end to end."""

import itertools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lookahead_jax as lk
from lookahead_jax.eval.__main__ import main
from lookahead_jax.eval.frontier.config import FrontierConfig, parse
from lookahead_jax.eval.frontier.frontier import write
from lookahead_jax.eval.frontier.results import Frontier
from lookahead_jax.eval.frontier.sizes import CacheSizes, entry_bytes
from lookahead_jax.eval.grid.rows import ROWS, GridCell, RowFile
from lookahead_jax.eval.tasks.base import Example, Task
from lookahead_jax.eval.tasks.registry import TASKS
from lookahead_jax.model.cache import empty_cache
from lookahead_jax.modules.definition import LookaheadConfig, init_modules
from lookahead_jax.modules.files import save_modules
from tests import tiny

SIZES = CacheSizes(6, {"float": 36, "int8": 28})  # two heads of three layers, head dim 4, bfloat16


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """The grids spread over all devices; here they have one, like most machines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        yield


@pytest.mark.parametrize("head_dim", [8, 24])
@pytest.mark.parametrize(
    ("dtype", "expected"),  # 2 H values, the position, and two scales
    [
        (jnp.float32, lambda h: 8 * h + 4),
        (jnp.bfloat16, lambda h: 4 * h + 4),
        (jnp.int8, lambda h: 2 * h + 4 + 8),
    ],
)
def test_bytes_of_an_entry_are_those_of_a_real_cache(head_dim, dtype, expected):
    config = tiny.config(head_dim=head_dim)
    cache = empty_cache(config, 3, 200, dtype, jnp.zeros(3, jnp.int32))
    arrays = [cache.k, cache.v, cache.pos, cache.k_scale, cache.v_scale]
    allocated = sum(np.asarray(a).nbytes for a in arrays if a is not None)
    entries = 3 * cache.slots * config.num_layers * config.num_kv_heads
    assert entry_bytes(config, dtype) * entries == allocated == cache.bytes
    assert entry_bytes(config, dtype) == expected(head_dim)


@pytest.mark.parametrize("wide", [132, 260, 516])
def test_the_most_entries_that_fit_are_kept(wide):
    sizes = CacheSizes(1, {"float": wide, "int8": 140})
    for entries in (1, 7, 64):
        assert sizes.kept(entries, "float") == entries
        kept = sizes.kept(entries, "int8")
        assert kept * 140 <= entries * wide < (kept + 1) * 140


def config(out, **changes) -> FrontierConfig:
    given = dict(
        out=out, policies=("full", "snapkv", "tova"), entries=(7, 14), tasks=("own/a", "own/b"),
        lengths=(100,), against="tova", model="m",
    )  # fmt: skip
    return FrontierConfig(**{**given, **changes})


def row(cell, i, score, *, cache_bytes, ttft=0.1):
    return {
        **cell._asdict(), "id": str(i), "score": score, "binary": True, "predicted_answer": "x",
        "answer": ["y"], "question": "?", "prompt_tokens": 100, "new_tokens": 4,
        "first_of_batch": f"{cell.policy}/{i // 2}", "batch": 2, "ttft_s": ttft,
        "peak_bytes": None, "peak_is_bound": True, "cache_bytes": cache_bytes, "draft_lengths": [],
    }  # fmt: skip


RIGHT = {  # (cache, policy, entries kept) -> right answers to the four examples of a and of b
    ("float", "full", 0): ("1111", "1111"),
    ("int8", "full", 0): ("1111", "1110"),
    ("float", "snapkv", 7): ("0000", "0001"),
    ("float", "snapkv", 14): ("1100", "0011"),
    ("float", "tova", 7): ("1000", "1100"),
    ("float", "tova", 14): ("0000", "0000"),
    ("int8", "snapkv", 9): ("0011", "0110"),
    ("int8", "snapkv", 18): ("1111", "0111"),
    ("int8", "tova", 9): ("1000", "1100"),
    ("int8", "tova", 18): ("0000", "0100"),
}


@pytest.fixture
def grids(tmp_path, monkeypatch):
    """Made-up rows in the folders of two grids."""
    for name in ("own/a", "own/b"):
        monkeypatch.setitem(TASKS, name, Task(name=name, make=lambda source: [], score=None))
    folders = {}
    for cache in ("float", "int8"):
        folder = folders[cache, None] = tmp_path / cache
        folder.mkdir()
        file = RowFile(folder / ROWS)
        for (of, policy, kept), tasks in RIGHT.items():
            if of != cache:
                continue
            for task, right in zip(("own/a", "own/b"), tasks, strict=True):
                cell = GridCell("m", policy, kept, task, 100, "none", "hidden")
                size, ttft = 2 * 6 * SIZES.entry[cache] * 128, 0.1 * (1 + kept / 100)
                file.append(
                    row(cell, i, float(r), cache_bytes=size, ttft=ttft) for i, r in enumerate(right)
                )
        for other in ("snapkv:window=8", "snapkv"):  # neither the policy nor the budget is asked
            cell = GridCell("m", other, 99, "own/a", 100, "none", "hidden")
            file.append([row(cell, 0, 1.0, cache_bytes=1)])
        for other in ("model", "drafter", "strategy"):
            cell = GridCell("m", "snapkv", SIZES.kept(7, cache), "own/a", 100, "none", "hidden")
            cell = cell._replace(**{other: "other"})
            file.append(row(cell, i, 1.0, cache_bytes=1) for i in range(4))
        file.close()
    return folders


def pairs_by_hand(first: str, second: str) -> tuple[float, float, float]:
    """Mean, low and high of a paired difference of four answers (Agresti and Min 2005)."""
    gained = sum(a > b for a, b in zip(first, second, strict=True))
    lost = sum(a < b for a, b in zip(first, second, strict=True))
    center = (gained - lost) / 6
    half = 1.959964 * math.sqrt(gained + lost + 1 - (gained - lost) ** 2 / 6) / 6
    return (gained - lost) / 4, max(center - half, -1), min(center + half, 1)


def over_tasks(parts) -> tuple[float, float, float]:
    mean = sum(m for m, _, _ in parts) / len(parts)
    below = math.sqrt(sum((m - low) ** 2 for m, low, _ in parts)) / len(parts)
    above = math.sqrt(sum((high - m) ** 2 for m, _, high in parts)) / len(parts)
    return mean, max(mean - below, -1), min(mean + above, 1)


def test_differences_are_paired_at_equal_bytes(grids, tmp_path):
    frontier = Frontier(config(tmp_path), SIZES, grids)
    (setting,) = frontier.settings
    assert frontier.tasks(setting) == ["own/a", "own/b"]
    # Of the float caches tova is best with the fewer entries, snapkv with the more.
    best = {7: "tova", 14: "snapkv"}
    labels = ["snapkv", "snapkv int8", "tova", "tova int8"]
    expected = {("int8 minus float", f"{p} int8", p, n) for p in ("snapkv", "tova") for n in best}
    expected |= {
        ("minus the best single policy", a, b, n) for a in labels for n, b in best.items() if a != b
    }
    expected |= {("minus tova", a, "tova", n) for a in labels for n in best if a != "tova"}
    found = list(frontier.differences(setting))
    assert {
        (d.kind, d.first.method.label, d.second.method.label, d.first.entries) for d in found
    } == expected
    assert len(found) == len(expected)
    for d in found:
        assert d.first.entries == d.second.entries
        sides = [
            RIGHT[p.method.cache, p.method.policy, SIZES.kept(p.entries, p.method.cache)]
            for p in (d.first, d.second)
        ]
        parts = [pairs_by_hand(a, b) for a, b in zip(*sides, strict=True)]
        for task, part in zip(("own/a", "own/b"), parts, strict=True):
            assert d.tasks[task] == pytest.approx((*part, 4), abs=1e-6)
        assert d.mean == pytest.approx((*over_tasks(parts), 8), abs=1e-6)


def test_tables_and_numbers_hold_the_same_scores(grids, tmp_path):
    text = write(config(tmp_path), SIZES, grids)
    assert (tmp_path / "frontier.md").read_text() == text
    assert "| method | 252 bytes (7 float, 9 int8) | 504 bytes (14 float, 18 int8) |" in text
    mean = text.split("mean of the tasks:")[1].split("own/a:")[0]
    shown = {
        line.split(" | ")[0].strip("| "): [c.split(" (")[0] for c in line.split(" | ")[1:]]
        for line in mean.splitlines()
        if line.startswith("| ") and "bytes" not in line
    }
    assert shown["full"] == ["1.00", "1.00"]
    assert shown["full int8"] == ["0.88", "0.88"]
    assert shown["snapkv int8"] == ["0.50", "0.88"]
    assert "| tova int8 | +9% (+9% to +9%); 128 slots | +18% (+18% to +18%); 128 slots |" in text
    numbers = json.loads((tmp_path / "frontier.json").read_text())
    assert numbers["entry_bytes"] == {"float": 36, "int8": 28}
    assert numbers["budgets"][1] == {"entries": 14, "bytes": 504, "kept": {"float": 14, "int8": 18}}
    (setting,) = numbers["settings"]
    for point in setting["points"]:
        kept = point["kept"] or 0
        right = RIGHT[point["cache"], point["policy"], kept]
        assert point["mean"][0] == pytest.approx("".join(right).count("1") / 8)
        assert point["tasks"]["own/b"][0] == pytest.approx(right[1].count("1") / 4)
        assert (point["slots"], point["n"]["own/a"]) == (128, 4)
        added = None if kept == 0 else [pytest.approx(kept / 100, abs=1e-3)] * 3
        assert point["added_time"] == added
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {
        "frontier-mean-of-the-tasks.png", "frontier-own-a.png", "frontier-own-b.png"
    }  # fmt: skip
    page = (tmp_path / "frontier.html").read_text()
    assert "snapkv int8, 18 entries: 0.875 (95 %: " in page
    assert "<td>minus" not in page
    assert page.count("<svg") == 3


def test_examples_that_a_method_lacks_are_left_out(grids, tmp_path):
    """As in a run that was resumed with another policy and a smaller --count."""
    lines = (grids["float", None] / ROWS).read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
    kept = [r["policy"] != "tova" or r["task"] != "own/a" or r["id"] in "12" for r in rows]
    (grids["float", None] / ROWS).write_text("".join(itertools.compress(lines, kept)))
    frontier = Frontier(config(tmp_path), SIZES, grids)
    (setting,) = frontier.settings
    for place in frontier.places(setting):
        method, entries = place.method, SIZES.kept(place.entries, place.method.cache)
        right, other = RIGHT[method.cache, method.policy, entries if method.budgeted else 0]
        for task, said in (("own/a", right[1:3]), ("own/b", other)):
            stat = frontier.score(place, task)
            assert (stat.mean, stat.n) == (said.count("1") / len(said), len(said))


def test_settings_without_answers_are_left_out(grids, tmp_path, capsys):
    text = write(config(tmp_path, protocols=("seen", "hidden")), SIZES, grids)
    said = capsys.readouterr().err
    assert said.count("notice: no answers for 100 tokens, ") == 1
    assert text.count("\n## ") == 1
    (legend, *_) = re.findall(
        r'<ul class="legend">.*?</ul>', (tmp_path / "frontier.html").read_text(), re.DOTALL
    )
    assert "tova int8" in legend
    with pytest.raises(ValueError, match="has no answers for these --tasks, --lengths and --pro"):
        Frontier(config(tmp_path, protocols=("seen",)), SIZES, grids)


def test_a_cache_of_other_entries_is_an_error(grids, tmp_path):
    other = CacheSizes(6, {"float": 36, "int8": 36 * 128 - 1})
    frontier = Frontier(config(tmp_path, entries=(7, 14)), other, grids)
    (place, *_) = frontier.places(frontier.settings[0])
    assert frontier.slots(place) == 128
    shifted = place._replace(method=place.method._replace(cache="int8"))
    frontier._rows[shifted, "own/a"] = frontier._rows[place, "own/a"]
    frontier._rows[shifted, "own/b"] = frontier._rows[place, "own/b"]
    with pytest.raises(ValueError, match="line 1: a cache of 55296 bytes is none of entries of 46"):
        frontier.slots(shifted)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"entries": (64, 0)}, "--entries 0: such a budget is below one entry; give numbers of"),
        ({"entries": ()}, "--entries names nothing"),
        ({"caches": ("int8", "int8")}, "--caches names one value twice"),
        (
            {"against": "kvzip"},
            "--against 'kvzip' is no label of a method with a budget; there are",
        ),
        ({"policies": ("full",)}, "--policies keep everything: name one that a budget changes"),
        ({"policies": ("specpc",)}, "--policies specpc needs a small model: use `lookahead eval"),
        ({"policies": ("snapkv@x",)}, "--policies snapkv@x: snapkv reads no lookahead modules"),
        ({"policies": ("lookaheadkv@nowhere",)}, "nowhere has no lookahead_config.json, so it"),
        ({"model": "m", "policies": ("lookaheadkv",)}, "no modules ship for m; give lookaheadkv@"),
        ({"policies": ("unknown",)}, "unknown policy 'unknown'"),
        ({"policies": ("lookaheadkv:pool=max@nowhere",)}, "nowhere has no lookahead_config.json"),
        ({"count": 0}, "--count must be at least 1"),
        ({"batch": 0}, "--batch must be at least 1"),
        ({"lengths": (512, 0)}, "--lengths must be at least 1"),
        ({"max_new_tokens": 0}, "--max-new-tokens must be at least 1"),
        ({"tasks": ("nothing",)}, "unknown task 'nothing'"),
        ({"tasks": ("reasoning/programs",)}, "--tasks: reasoning/programs runs programs that the"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path, changes, complaint):
    with pytest.raises(ValueError, match=complaint.replace("(", r"\(")):
        config(tmp_path, **{"tasks": ("own",), "against": None, **changes})


def test_an_at_sign_in_a_setting_begins_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^a@b/F\.st does not exist"):
        FrontierConfig(out=tmp_path, policies=("kvzap:file=a@b/F.st",))


def test_two_folders_of_one_name_are_an_error(tmp_path):
    specs = []
    for parent in ("x", "y"):
        folder = tmp_path / parent / "modules"
        folder.mkdir(parents=True)
        (folder / "lookahead_config.json").write_text("{}")
        specs.append(f"lookaheadkv@{folder}")
    with pytest.raises(ValueError, match=r"name two folders 'modules'.*so rename one"):
        config(tmp_path, tasks=("own",), against=None, policies=tuple(specs))


def test_labels_are_short_where_they_are_distinct(tmp_path):
    made = config(
        tmp_path, tasks=("own",), against="snapkv:window=8 int8", model="smollm2",
        policies=("snapkv", "snapkv:window=8", "critical:ada:snapkv:alpha=0.3"),
    )  # fmt: skip
    assert [m.label for m in made.methods if m.cache == "float"] == [
        "snapkv", "snapkv:window=8", "critical:ada:snapkv"
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["embedded", "smollm2"])
def test_the_configurations_that_ship_are_valid(name, tmp_path):
    made = parse([name, "--out", str(tmp_path), "--against", "kvzip+"])
    assert made.model == name
    assert {m.cache for m in made.methods} == {"float", "int8"}
    assert any(not m.budgeted for m in made.methods)


def test_a_run_end_to_end_and_again(tmp_path, monkeypatch, capsys):
    """A tiny random model: one task, modules of its own, both types of cache."""
    (tmp_path / "model").mkdir()
    tiny.save_bytes_model(tmp_path / "model", num_hidden_layers=1)
    model = lk.load(tmp_path / "model")
    sizes = LookaheadConfig(tokens=4, rank=0, alpha=1.0, targets=(), init="normal")
    modules = init_modules(jax.random.key(0), sizes, model.config)
    save_modules(tmp_path / "mine", modules, params=model.params)
    example = Example(id="0", context="ab" * 20, question="?", answers=("a",), max_new_tokens=2)
    task = Task(
        name="own/t", make=lambda source: [example], score=lambda text, asked: 1.0, binary=True
    )
    monkeypatch.setitem(TASKS, "own/t", task)
    args = [
        "frontier", "--out", str(tmp_path / "run"), "--model", str(tmp_path / "model"),
        "--policies", f"lookaheadkv@{tmp_path / 'mine'}", "--entries", "16", "--tasks", "own/t",
        "--lengths", "100", "--protocols", "seen", "--count", "1", "--batch", "1",
    ]  # fmt: skip
    calls = []
    generate = lk.generate
    monkeypatch.setattr(lk, "generate", lambda *a, **k: calls.append(k) or generate(*a, **k))
    assert main(args) == 0
    said = capsys.readouterr().out
    assert "| method | 1,088 bytes (16 float, 38 int8) |" in said  # 68 and 28 bytes an entry
    assert "| lookaheadkv@mine int8 | 1.00 (0.21 to 1.00) |" in said
    # Twice, since the first batch of a shape also compiles.
    assert [(k["budget"], k["cache_dtype"]) for k in calls] == [(16, None)] * 2 + [(38, "int8")] * 2
    folders = sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir())
    assert folders == ["float-mine", "int8-mine"]
    numbers = json.loads((tmp_path / "run" / "frontier.json").read_text())
    points = {p["method"]: p for p in numbers["settings"][0]["points"]}
    assert {name: p["slots"] for name, p in points.items()} == {
        "lookaheadkv@mine": 128, "lookaheadkv@mine int8": 128
    }  # fmt: skip

    before = len(calls)
    assert main([*args, "--against", "lookaheadkv@mine"]) == 0
    assert len(calls) == before, "what is done is not done again"
    assert "minus lookaheadkv@mine, at equal bytes on the same examples:" in capsys.readouterr().out
    assert main([*args, "--seed", "1"]) == 1
    assert "other settings (seed: 0, now 1)" in capsys.readouterr().err
    assert main([*args, "--entries", "0"]) in (1, 2)
    assert "such a budget is below one entry" in capsys.readouterr().err
