"""Grids whose prompts are read once for all cells: the rows are those of reading them anew."""

import itertools

import jax
import pytest

import lookahead_jax as lk
from lookahead_jax.eval.grid import answering
from lookahead_jax.eval.grid import run as runner
from lookahead_jax.eval.grid.config import RunConfig
from lookahead_jax.eval.grid.rows import MEASURED, ROWS, VIEWED, VIEWS, key_of, read_rows
from lookahead_jax.modules.definition import LookaheadConfig, init_modules
from lookahead_jax.modules.files import save_modules

# The window observes; modules do; a draft on a cut copy; the whole prompt is replayed.
POLICIES = "full", "snapkv:window=8", "lookaheadkv", "laq", "kvzip"
GRID = dict(
    policies=POLICIES, budgets=(16, 40), tasks=("own/needle",), lengths=(120,),
    protocols=("seen", "hidden"), count=3, batch=3, views=1,
)  # fmt: skip
TIMES = ("ttft_s", "full_ttft_s", "decode_tokens_per_s", "peak_bytes", "peak_is_bound")
LAYOUT = ("cache_bytes", "full_bytes")  # whole prompts have slots for a response as well


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def rows(out, leave_out=()):
    return {
        key_of(row): {name: value for name, value in row.items() if name not in leave_out}
        for row in read_rows(out / ROWS, MEASURED)
    }


@pytest.mark.slow
def test_rows_and_views_are_those_of_separate_readings(tmp_path, monkeypatch):
    alone, shared = (RunConfig(out=tmp_path / name, **GRID) for name in ("alone", "shared"))
    runner.run(alone)
    shared = RunConfig(out=shared.out, share_reading=True, **GRID)
    read = []
    made = answering.SharedPrompts
    monkeypatch.setattr(
        answering, "SharedPrompts", lambda *args: read.append(args[-1]) or made(*args)
    )
    runner.run(shared)
    assert rows(shared.out, TIMES + LAYOUT) == rows(alone.out, TIMES + LAYOUT)
    views = [
        sorted(read_rows(config.out / VIEWS, VIEWED), key=key_of) for config in (alone, shared)
    ]
    assert views[0] == views[1]
    cells = len(POLICIES) * 2 - 1  # the budget of `full` is 0
    assert [len(batches) for batches in read] == [cells] * len(read)
    assert all(row["ttft_s"] is None for row in rows(shared.out).values())
    readings = len(read)
    runner.run(shared)
    assert len(read) == readings  # there is nothing left to read


def test_a_run_goes_on_with_the_cells_that_a_batch_lacks(tmp_path, monkeypatch):
    few = dict(GRID, policies=("full", "snapkv:window=8"), tasks=("own/needle",), budgets=(16,))
    whole = RunConfig(out=tmp_path / "whole", share_reading=True, **few)
    runner.run(whole)
    lines = (whole.out / ROWS).read_text().splitlines()
    torn = RunConfig(out=tmp_path / "torn", share_reading=True, **few)
    torn.out.mkdir()
    for path in whole.out.iterdir():
        if path.name not in (ROWS, VIEWS):
            (torn.out / path.name).write_bytes(path.read_bytes())
    (torn.out / ROWS).write_text("".join(f"{line}\n" for line in lines[:3]))
    read = []
    made = answering.SharedPrompts
    monkeypatch.setattr(
        answering, "SharedPrompts", lambda *args: read.append(args[-1]) or made(*args)
    )
    runner.run(torn)
    assert rows(torn.out) == rows(whole.out)
    told = [batch.cell for batch in itertools.chain(*read)]
    assert len(told) == 3  # of four cells with one batch each, one was there


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (dict(drafters=("trie",)), "leave out drafters"),
        (dict(strategies=("best_of_n:n=2",), pair_times=True), "leave out strategies, pair_times"),
        (dict(cache_dtype="int8"), "leave out cache_dtype"),
        (dict(evict_every=16, policies=("snapkv",)), "leave out evict_every"),
        (dict(policies=("speckv",)), "policies=speckv reads with a small model"),
        (dict(policies=("laq:draft=trie",)), "policies=laq:draft=trie needs a draft"),
        (dict(policies=("incremental:keydiff:every=32",)), "needs cuts while a prompt is read"),
    ],
    ids=lambda value: None,
)
def test_what_needs_a_reading_of_its_own_is_refused(tmp_path, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        RunConfig(out=tmp_path, share_reading=True, **options)


def test_modules_with_a_memory_are_refused(tmp_path):
    model = lk.load(lk.EMBEDDED_MODEL)
    sizes = LookaheadConfig(
        tokens=3, rank=2, alpha=4.0, targets=("q", "v"), init="table", memory=True
    )
    modules = init_modules(jax.random.key(0), sizes, model.config, params=model.params)
    save_modules(tmp_path / "modules", modules, params=model.params)
    config = RunConfig(
        out=tmp_path / "run", lookahead=tmp_path / "modules", share_reading=True,
        **GRID | dict(policies=("lookaheadkv",), tasks=("own/needle",)),
    )  # fmt: skip
    with pytest.raises(ValueError, match="modules with a memory need a reading for each budget"):
        runner.run(config)
