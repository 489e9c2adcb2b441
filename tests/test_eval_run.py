"""The runner: a grid end to end on the embedded model, its protocols, and what a kill leaves."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lookahead_jax as lk
from lookahead_jax.checkpoints.load import first_layers
from lookahead_jax.eval.__main__ import main
from lookahead_jax.eval.grid import run as runner
from lookahead_jax.eval.grid.config import PROG, RunConfig, cells, method_of, parse_run
from lookahead_jax.eval.grid.prompts import assemble
from lookahead_jax.eval.grid.rows import (
    MEASURED,
    ROWS,
    VIEWED,
    VIEWS,
    RowFile,
    key_of,
    read_rows,
)
from lookahead_jax.eval.report import report
from lookahead_jax.eval.tasks.base import Source
from lookahead_jax.host.lock import folder_lock
from lookahead_jax.model.sharding import make_mesh
from lookahead_jax.prompts.speculation import select_tokens, speculate

GRID = dict(
    policies=("full", "snapkv:window=8"), budgets=(24,), tasks=("own/needle",), lengths=(120,),
    protocols=("seen", "hidden"), count=3, batch=2, views=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return lk.load(lk.EMBEDDED_MODEL)


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """The runner spreads over all devices; here it has one, like most machines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = RunConfig(out=tmp_path_factory.mktemp("eval") / "run", **GRID)
    runner.run(config)
    return config


def answers(out):
    return {
        key_of(row): (row["predicted_answer"], row["score"])
        for row in read_rows(out / ROWS, MEASURED)
    }


def test_every_cell_has_its_rows(finished):
    rows = list(read_rows(finished.out / ROWS, MEASURED))
    expected = {
        (cell, str(i)) for cell in cells(finished, "embedded", "own/needle", 120) for i in range(3)
    }
    assert {key_of(row) for row in rows} == expected
    assert len(rows) == len(expected)
    for row in rows:
        assert row["ttft_s"] > 0
        assert row["full_ttft_s"] is None
        assert row["peak_bytes"] > 0
        assert row["prompt_tokens"] == 120
        assert row["full_bytes"] > 0
        if row["policy"] == "full":  # what is allocated has padding, what is needed has none
            assert row["cache_bytes"] > row["full_bytes"]
        assert row["score"] == float(row["predicted_answer"].strip() == row["answer"][0].strip())
    full = [row["predicted_answer"] for row in rows if row["policy"] == "full"]
    assert full[:3] == full[3:], "with everything kept, both protocols read the same text"


def test_views_hold_the_shares_that_were_kept(finished):
    views = list(read_rows(finished.out / VIEWS, VIEWED))
    assert {view["id"] for view in views} == {"0"}
    for view in views:
        hidden = view["protocol"] == "hidden"
        tokens = len(view["pieces"])
        assert len(view["kept"]) == tokens
        assert tokens == (115 if hidden else 120)
        assert sum(view["kept"]) == pytest.approx(24, abs=0.05 * tokens)
        row = next(r for r in read_rows(finished.out / ROWS, MEASURED) if key_of(r) == key_of(view))
        assert (row["question"] in "".join(view["pieces"])) != hidden


def test_a_killed_run_goes_on_where_it_was(finished, tmp_path, monkeypatch):
    whole = (finished.out / ROWS).read_bytes()
    lines = whole.splitlines(keepends=True)
    left = tmp_path / "left"
    left.mkdir()
    (left / "settings.json").write_bytes((finished.out / "settings.json").read_bytes())
    (left / ROWS).write_bytes(b"".join(lines[:5]) + lines[5][:40])  # torn in the middle of a line
    calls = []
    generate = lk.generate
    monkeypatch.setattr(lk, "generate", lambda *a, **k: calls.append(1) or generate(*a, **k))
    runner.run(dataclasses.replace(finished, out=left))
    assert answers(left) == answers(finished.out)
    assert sum(1 for _ in read_rows(left / ROWS, MEASURED)) == len(lines)
    first = len(calls)
    runner.run(dataclasses.replace(finished, out=left))
    assert len(calls) == first, "what is done is not done again"
    with pytest.raises(ValueError, match=r"other settings \(seed: 0, now 1\); choose"):
        runner.run(dataclasses.replace(finished, out=left, seed=1))
    (left / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"no settings.json, .*; choose another folder"):
        runner.run(dataclasses.replace(finished, out=left))


def test_a_run_that_another_process_writes_is_an_error(finished, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    with folder_lock(out), pytest.raises(BlockingIOError, match="run is being written by process"):
        runner.run(dataclasses.replace(finished, out=out))


def test_a_torn_line_is_cut_off_and_a_broken_one_is_an_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a"')
    assert list(read_rows(path, {})) == [{"a": 1}]
    file = RowFile(path)
    file.append([{"a": 2}])
    file.close()
    assert [row["a"] for row in read_rows(path, {})] == [1, 2]
    path.write_bytes(b'{"a"\n{"a": 1}\n')
    with pytest.raises(ValueError, match="line 1"):
        list(read_rows(path, {}))


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("[1, 2]", "expected a JSON object, got list"),
        ('{"prompt": "x"}', "it has no field 'model'"),
        ('{"budget": "24"}', "'budget' must be int, got \"24\""),
        ('{"id": 3}', "'id' must be str, got 3"),
        ('{"score": "right"}', "'score' must be int or float or null, got \"right\""),
        ('{"cache_bytes": null}', "'cache_bytes' must be int, got null"),
    ],
)
def test_foreign_rows_are_one_clear_line(finished, tmp_path, line, complaint, capsys):
    """Both where a run goes on and where a report is made of it."""
    own, changes = next(read_rows(finished.out / ROWS, MEASURED)), json.loads(line)
    if "prompt" not in line and isinstance(changes, dict):
        line = json.dumps(own | changes)
    (tmp_path / ROWS).write_text(f"{json.dumps(own)}\n{line}\n")
    assert report.main([str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.endswith(f"rows.jsonl, line 2: not a row of an evaluation ({complaint})\n")
    if complaint.startswith(("'score'", "'cache_bytes'")):
        return  # not needed to go on
    (tmp_path / "settings.json").write_bytes((finished.out / "settings.json").read_bytes())
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: not a row"):
        runner.open_run(dataclasses.replace(finished, out=tmp_path))


def test_a_second_turn_is_asked_behind_the_model_s_own_first_answer(tmp_path, monkeypatch):
    folder = tmp_path / "data" / "mt_bench"
    folder.mkdir(parents=True)
    turns = [["import os", "def main():"], ["x = 1"]]
    lines = [json.dumps({"question_id": 80 + i, "turns": t}) for i, t in enumerate(turns)]
    (folder / "question.jsonl").write_text("\n".join(lines) + "\n")
    config = RunConfig(
        out=tmp_path / "run", tasks=("mt_bench",), policies=("snapkv:window=4",), budgets=(16,),
        lengths=(100,), protocols=("seen", "hidden"), data=tmp_path / "data", count=2, batch=2,
        max_new_tokens=6, chat=False,
    )  # fmt: skip
    asked = []
    generate = lk.generate
    monkeypatch.setattr(
        lk, "generate", lambda m, rows, **k: asked.append(rows) or generate(m, rows, **k)
    )
    runner.run(config)
    rows = {row["id"]: row for row in read_rows(config.out / ROWS, MEASURED)}
    assert set(rows) == {"80", "81", "80:2"}
    model = lk.load(lk.EMBEDDED_MODEL)
    first = rows["80"]["predicted_answer"]
    dialogue = model.tokenizer.encode(f"import os\n\n{first.strip()}\n\ndef main():")
    assert asked[-1] == [dialogue] * 2
    assert all(row["score"] is None for row in rows.values())

    # Killed between the turns: the second one is asked after the answer in the file.
    lines = (config.out / ROWS).read_bytes().splitlines(keepends=True)
    (config.out / ROWS).write_bytes(b"".join(lines[:2]))
    asked.clear()
    runner.run(config)
    assert {
        row["id"]: row["predicted_answer"] for row in read_rows(config.out / ROWS, MEASURED)
    } == {id: row["predicted_answer"] for id, row in rows.items()}
    assert asked
    assert all(rows == [dialogue] * 2 for rows in asked)


def test_hidden_questions_are_extend_behind_the_cut_cache(model):
    context, question = list(range(5, 105)), [202, 439, 2012, 2973, 436]
    policy = lk.make_policy("snapkv", window=8)
    result = lk.generate(
        model, [context, context[:70]], questions=[question, question[:3]], policy=policy,
        budget=24, max_new_tokens=6, eos_ids=(),
    )  # fmt: skip
    tokens = jnp.asarray(lk.pad_batch([context, context[:70]], config=model.config))
    read = lk.read_prompt(
        model.params, tokens, config=model.config, policy=policy, budget=24, new_tokens=22
    )
    kept = np.asarray(read.cache.pos)[..., :24]
    asked = jnp.asarray(lk.pad_batch([question, question[:3]], config=model.config))
    cache, logits = lk.extend(model.params, asked, read.cache, config=model.config)
    answer = lk.decode(model.params, cache, logits, config=model.config, max_new_tokens=6)
    assert result.tokens == np.asarray(answer.tokens).tolist()
    np.testing.assert_array_equal(result.kept, kept)
    assert (result.kept[:, 1] < 70).all()
    with pytest.raises(ValueError, match="1 questions for 2 prompts"):
        lk.generate(model, [[1], [2]], questions=[[3]], policy=policy)


@pytest.mark.slow
def test_rows_over_a_mesh_answer_as_on_one_device(model):
    mesh = make_mesh(data=2, tensor=2)
    spread = lk.load(lk.EMBEDDED_MODEL, mesh=mesh)
    prompts = np.random.default_rng(0).integers(5, 4000, (2, 60)).tolist()
    settings = dict(
        questions=[[202, 439]] * 2, policy=lk.make_policy("snapkv", window=8), budget=24,
        max_new_tokens=6, eos_ids=(),
    )  # fmt: skip
    alone = lk.generate(model, prompts, **settings)
    together = lk.generate(spread, prompts, **settings)
    assert together.tokens == alone.tokens
    np.testing.assert_array_equal(together.kept, alone.kept)


@pytest.mark.slow
def test_a_run_over_four_devices_answers_the_same(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    runner.run(dataclasses.replace(finished, out=tmp_path / "run", tensor=2))
    assert answers(tmp_path / "run") == answers(finished.out)


@pytest.mark.slow
def test_parts_of_a_run_are_together_the_whole(finished, tmp_path):
    found = {}
    for part in (0, 1):
        out = tmp_path / str(part)
        runner.run(dataclasses.replace(finished, out=out, part=part, parts=2))
        assert not found.keys() & answers(out).keys()
        found |= answers(out)
    assert found == answers(finished.out)
    with pytest.raises(ValueError, match="counted from 0"):
        dataclasses.replace(finished, part=2, parts=2)


@pytest.mark.slow
def test_methods_with_a_small_model_are_its_answer_and_its_selection(model, tmp_path):
    config = RunConfig(
        out=tmp_path / "run", draft_model="embedded", draft_layers=2, pair_times=True,
        **{**GRID, "protocols": ("seen",), "views": 0, "count": 2, "budgets": (64,)}
        | {"policies": (
            "speckv:window=8,draft_tokens=4", "specpc:select_neighbours=8",
            "speckv_pc:prune=96,window=8,draft_tokens=4",
        )},
    )  # fmt: skip
    runner.run(config)
    rows = list(read_rows(config.out / ROWS, MEASURED))
    assert len(rows) == 6
    assert {row["policy"] for row in rows} == set(config.policies)
    assert all(row["full_ttft_s"] > 0 for row in rows)
    assert {(row["draft_model"], row["draft_layers"]) for row in rows} == {("embedded", 2)}

    task = config.find_tasks()[0]
    source = Source(tokenizer=model.tokenizer, length=120, count=2, seed=0, data=None)
    examples = task.make(source)
    prompts = [
        assemble(e, model.tokenizer, limit=120, chat=bool(model.tokenizer.chat_templates)).whole
        for e in examples
    ]
    found = speculate(
        first_layers(model, 2), prompts, tokens=4, eos_ids=model.generation.eos_ids, attention=True
    )
    left = [
        [prompt[i] for i in select_tokens(attention, 96, pool=32, neighbours=32)]
        for prompt, attention in zip(prompts, found.attention, strict=True)
    ]
    assert [len(row) for row in left] == [96, 96]
    policy = lk.make_policy("speckv", window=8, draft_tokens=4)
    expected = lk.generate(
        model, left, policy=policy, budget=64, max_new_tokens=examples[0].max_new_tokens,
        drafts=found.answers, stop=examples[0].stop,
    )  # fmt: skip
    answers = {row["id"]: row for row in rows if row["policy"] == config.policies[2]}
    for example, text in zip(examples, expected.text, strict=True):
        row = answers[example.id]
        assert row["predicted_answer"] == text
        assert row["full_bytes"] is None
    with pytest.raises(ValueError, match="--draft-model"):
        runner.run(dataclasses.replace(config, out=tmp_path / "other", draft_model=None))


def test_names_of_methods():
    method = method_of("speckv_pc:prune=512,window=8,select_pool=16")
    assert (method.prune, method.policy.window) == (512, 8)
    assert method.select == {"pool": 16, "neighbours": 32}
    assert method_of("specpc").prune == 0
    assert not method_of("kv_prediction").budgeted
    assert method_of("specpc").budgeted
    with pytest.raises(ValueError, match="name=value"):
        method_of("snapkv:window")


def test_the_command_line_refuses_what_it_does_not_know(tmp_path, capsys):
    path = tmp_path / "grid.json"
    path.write_text(json.dumps({"out": "run", "budgets": [8, 16], "policies": ["snapkv"]}))
    config = parse_run([str(path), "--count", "4", "--chat", "False", "--allow-exec"], PROG)
    assert (config.chat, config.allow_exec) == (False, True)
    assert (config.budgets, config.count) == ((8, 16), 4)
    assert main([str(path), "--tasks", "nothing"]) == 1
    assert main([str(path), "--tasks", "longproc/pseudo_to_code_2k"]) == 1
    assert main(["absent"]) == 1
    path.write_text(json.dumps({"out": "run", "tasks": ["own", "--allow-exec"]}))
    assert not parse_run([str(path)], PROG).allow_exec
    for name in ("allow_exec", "allow-exec"):
        path.write_text(json.dumps({"out": "run", name: True}))
        with pytest.raises(ValueError, match="only be set by --allow-exec, not in a file"):
            parse_run([str(path)], PROG)
    assert main([str(path)]) == 1
    path.write_text(json.dumps({"out": "run"}))
    assert main([str(path), "--nonsense"]) == 2
    assert main([str(path), "--count", "0"]) == 2
    assert main([str(path), "--batch", "0"]) == 2
    said = capsys.readouterr().err
    assert "--count must be at least 1" in said
    assert "--batch must be at least 1" in said
    assert "unknown task 'nothing'" in said
    assert "--allow-exec permits it" in said
    assert "only be set by --allow-exec" in said
    assert "embedded" in said
