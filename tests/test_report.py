"""The report: its numbers from made-up rows, its links, and what it does with foreign text."""

import dataclasses
import json
import re
import sys

import numpy as np
import pytest

from lookahead_jax.eval.grid.rows import ROWS, VIEWS, GridCell, RowFile
from lookahead_jax.eval.intervals import of_mean, of_share
from lookahead_jax.eval.report import drawing, figures, report, smollm2, stats
from lookahead_jax.eval.report.cells import Report
from lookahead_jax.eval.report.charts import Chart, Heat

SEEN = "model: question seen during compression"
NASTY = '</script><b onclick="x">&'


def row(cell, i, score, *, binary=True, ttft=0.1, **more):
    return {
        **cell._asdict(), "id": str(i), "score": score, "binary": binary,
        "predicted_answer": NASTY, "answer": ["right"], "question": "what?", "answer_prefix": "",
        "max_new_tokens": 4, "prompt_tokens": 100, "new_tokens": 4, "finish": "eos",
        "first_of_batch": f"{cell.policy}/{i // 2 * 2}", "batch": 2, "ttft_s": ttft,
        "decode_tokens_per_s": 9.0, "peak_bytes": 10**8, "peak_is_bound": False,
        "cache_bytes": 1000, "full_bytes": 2000, "draft_lengths": [3, 1], **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    rows = []
    for task in ("own/a", "longbench/b"):
        for length in (100, 200):
            for policy, budget in (("full", 0), ("snapkv", 16), ("snapkv", 32), ("h2o", 16)):
                cell = GridCell("some/model", policy, budget, task, length, "none", "seen")
                for i in range(6):
                    graded = task == "longbench/b"
                    score = float(rng.random()) if graded else float(rng.integers(0, 2))
                    ttft = 0.1 * (1 + 0.01 * budget) * (1 + i // 2)
                    more = {"measures": {"part": i / 6}} if graded else {"depth": 10 * (i % 3)}
                    more["full_ttft_s"] = 0.1 * (1 + i // 2)
                    rows.append(row(cell, i, score, binary=not graded, ttft=ttft, **more))
    drafted = GridCell("some/model", "snapkv", 16, "own/a", 100, "trie", "seen")
    rows += [row(drafted, i, 1.0) for i in range(4)]
    judged = GridCell("some/model", "snapkv", 16, "mt_bench", 100, "trie", "seen")
    rows += [row(judged, 0, None, binary=False)]
    file = RowFile(folder / ROWS)
    file.append(rows)
    file.close()
    views = RowFile(folder / VIEWS)
    cell = GridCell("some/model", "snapkv", 16, "own/a", 100, "none", "seen")
    view = {"id": "0", "pieces": ["a", NASTY], "kept": [1.0, 0.0]}
    views.append([{**cell._asdict(), **view, "predicted_answer": "x", "answer": ["y"]}])
    views.close()
    return folder


def test_the_published_table_has_a_column_for_each_task_and_budget(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    rights = {("full", 0): (1, 1, 1, 1), ("snapkv", 16): (0, 1, 0, 1), ("snapkv", 32): (1, 1, 0, 1)}
    file = RowFile(folder / ROWS)
    for (policy, budget), right in rights.items():
        cell = GridCell("m", policy, budget, "own/a", 100, "none", "seen")
        file.append([row(cell, i, float(score)) for i, score in enumerate(right)])
    file.close()
    lines = [line.strip("| ").split(" | ") for line in smollm2.table(Report([folder])).splitlines()]
    heads = [f"100, seen, {n} kept: {name}" for n in (16, 32) for name in ("mean", "own/a")]
    assert lines[0] == ["policy", *heads]
    assert [[cell[:4] for cell in line] for line in lines[2:]] == [
        ["full", "1.00", "1.00", "1.00", "1.00"], ["snap", "0.50", "0.50", "0.75", "0.75"]
    ]  # fmt: skip
    low, high = of_share(0.5, 4)
    assert lines[3][2] == f"0.50 ({low:.2f} to {high:.2f})"


def test_the_published_run_keeps_its_rows_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    config = smollm2.parse(["--count", "3"])
    assert (str(config.out), config.count) == ("/cache/lookahead_jax/eval/smollm2", 3)
    assert config.models == ("smollm2",)
    assert smollm2.parse(["--out", str(tmp_path)]).out == tmp_path
    assert config.find_tasks()


def test_intervals_against_published_ones():
    # Newcombe 1998, table I: 81 of 263 and 0 of 20.
    np.testing.assert_allclose(of_share(81 / 263, 263), (0.2553, 0.3662), atol=5e-4)
    np.testing.assert_allclose(of_share(0.0, 20), (0.0, 0.1611), atol=5e-4)
    # Student 1908: three values have t = 4.3027, not 1.96.
    np.testing.assert_allclose(
        of_mean([1.0, 2.0, 3.0]), 2 + np.array([-1, 1]) * 4.3027 / 3**0.5, rtol=1e-4
    )
    assert of_mean([2.0]) == (-np.inf, np.inf)
    assert of_mean([2.0, 2.0]) == (2.0, 2.0)


def test_intervals_of_few_values_cover_their_mean():
    """95 of 100 intervals of three values hold the true mean; with z = 1.96 it would be 81."""
    rng = np.random.default_rng(0)
    covered = [low < 0 < high for low, high in map(of_mean, rng.standard_normal((2000, 3)))]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


def test_means_have_their_intervals(run):
    cells = stats.read_runs([run])
    for cell, rows in cells.items():
        stat = stats.accuracy(rows)
        if cell.task == "mt_bench":
            assert stat is None
            continue
        values = np.array([r["score"] for r in rows])
        assert stat.mean == pytest.approx(values.mean())
        assert stat.n == len(values)
        if cell.task == "own/a":
            assert (stat.low, stat.high) == pytest.approx(of_share(values.mean(), len(values)))
        else:
            half = 2.5706 * values.std(ddof=1) / np.sqrt(len(values))  # t of 5 degrees of freedom
            assert stat.high - stat.mean == pytest.approx(min(half, 1 - stat.mean), rel=1e-4)
    both = stats.average([stats.Stat(0.5, 0.2, 0.8, 6), stats.Stat(1.0, 0.6, 1.0, 6)])
    assert both[:3] == pytest.approx((0.75, 0.75 - 0.25, 0.9))


def test_time_is_compared_on_the_same_batches(run):
    cells = stats.read_runs([run])
    cell = GridCell("some/model", "snapkv", 32, "own/a", 200, "none", "seen")
    full = cells[cell._replace(policy="full", budget=0)]
    assert stats.overhead(cells[cell], []) == pytest.approx([0.32] * 3)
    drifted = [r | {"ttft_s": 9.0} for r in full]
    assert stats.overhead(cells[cell], drifted) == pytest.approx([0.32] * 3)
    alone = [r | {"full_ttft_s": None} for r in cells[cell]]
    assert stats.overhead(alone, full) == pytest.approx([0.32] * 3)
    assert stats.overhead(alone, []) == []
    sections = dict(figures.sections(Report([run])))[SEEN]
    pareto = next(s for s in sections if s.title.startswith("Accuracy over time"))
    points = {s.label: s.points[0] for s in pareto.charts[-1].series}  # 200 tokens, 32 kept
    assert points["full"].x == pytest.approx(0)
    assert (points["snapkv"].x, points["snapkv"].x_low) == pytest.approx((32, 32))


def test_of_rows_that_occur_twice_the_last_counts(run, tmp_path):
    cell = GridCell("some/model", "full", 0, "own/a", 100, "none", "seen")
    file = RowFile(tmp_path / ROWS)
    file.append([row(cell, 0, 0.25)])
    file.close()
    rows = stats.read_runs([run, tmp_path])[cell]
    assert [r["score"] for r in rows if r["id"] == "0"] == [0.25]
    assert rows[0]["line"] == 1
    with pytest.raises(ValueError, match="no rows in"):
        stats.read_runs([tmp_path / "absent"])


def test_charts_hold_the_numbers_of_their_cells(run):
    made = Report([run])
    sections = dict(figures.sections(made))[SEEN]
    first = sections[0].charts[0]
    assert isinstance(first, Chart)
    lines = {series.label: series for series in first.series}
    assert lines["full"].across
    point = lines["snapkv"].points[1]
    cells = [
        GridCell("some/model", "snapkv", 32, task, 100, "none", "seen")
        for task in ("own/a", "longbench/b")
    ]
    expected = stats.average([made.stats[cell] for cell in cells])
    assert (point.x, point.y, point.low, point.high) == pytest.approx((32, *expected[:3]))
    assert point.href == made.href(cells)
    needles = next(s for s in sections if s.title.startswith("Needles")).charts[0]
    assert isinstance(needles, Heat)
    field = needles.fields[1][0]
    rows = [r for r in made.cells[cells[0]._replace(policy="full", budget=0)] if r["depth"] == 10]
    assert field.value == pytest.approx(np.mean([r["score"] for r in rows]))
    (drafting,) = dict(figures.sections(made))["some/model: drafting"]
    assert drafting.charts[0].shares == pytest.approx([0.75, 0.25])


def test_the_page_is_whole_and_its_links_open_rows(run, tmp_path):
    paths = report.write(report.ReportConfig(runs=(run,), out=tmp_path, rows=5))
    page = paths[0].read_text("utf-8")
    assert NASTY not in page
    assert not re.search(r"(src|href)=\"(?!#)", page), "the page asks nobody for anything"
    data = json.loads(re.search(r"^const DATA = (.*);$", page, re.M)[1])
    links = set(re.findall(r'href="#r=([0-9,]+)', page))
    assert {int(n) for link in links for n in link.split(",")} == set(range(len(data["cells"])))
    for cell in data["cells"]:
        assert len(cell["rows"]) == min(cell["total"], 5)
        assert all(r[2] == NASTY for r in cell["rows"])
    assert data["views"][0]["pieces"] == ["a", NASTY]
    assert "part 0.417 (" in page
    numbers = json.loads(paths[1].read_text("utf-8"))
    for cell in numbers:
        half = 2.5706 * np.std(np.arange(6) / 6, ddof=1) / 6**0.5
        part = pytest.approx([2.5 / 6, 2.5 / 6 - half, 2.5 / 6 + half], abs=1e-4)
        assert cell.get("measures", {}) == ({"part": part} if cell["task"] == "longbench/b" else {})
    assert [cell["n"] for cell in numbers] == [cell["total"] for cell in data["cells"]]
    pictures = paths[2:]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert len(pictures) == page.count('<section class="card">')


def test_points_are_links_with_their_numbers(run):
    section = dict(figures.sections(Report([run])))[SEEN][0]
    chart = section.charts[0]
    drawn = drawing.svg(chart)
    assert drawn == drawing.svg(chart), "the same chart is the same text"
    links = re.findall(r'<a xlink:href="([^"]*)">\s*<title>([^<]*)</title>', drawn)
    points = {(p.href, p.note) for series in chart.series for p in series.points}
    assert set(links) == points
    assert "<metadata" not in drawn
    nasty = dataclasses.replace(chart, x_label=NASTY + " $x$")
    assert "&lt;/script&gt;" in drawing.svg(nasty)
    assert NASTY not in drawing.svg(nasty)


def test_without_matplotlib_one_line_says_what_to_install(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.main([str(run), "--out", str(tmp_path)]) == 1
    assert "pip install 'lookahead-jax[report]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_without_rows_is_one_line_on_stderr(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 1
    assert "eval report: error: no rows in" in capsys.readouterr().err
    assert report.main(["--nonsense"]) == 2
    assert "error: " in (said := capsys.readouterr().err)
    assert said.count("\n") == 1
