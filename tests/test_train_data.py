"""Training data: rows become tokens once, responses are the model's, batches a pure function."""

import json

import jax
import numpy as np
import pytest

from lookahead_jax.checkpoints.load import load, save_params
from lookahead_jax.generation.generate import generate
from lookahead_jax.model.fingerprint import fingerprint
from lookahead_jax.model.sharding import make_mesh
from lookahead_jax.policies.full import Full
from lookahead_jax.train import data, training_data
from lookahead_jax.train.batches import microbatch_sharding
from lookahead_jax.train.training_data import open_data
from tests import tiny


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps({**tiny.LLAMA, "num_hidden_layers": 1}))
    config = tiny.config(num_hidden_layers=1)
    save_params(folder, tiny.params(config), config)
    return folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def open_rows(folder, model_folder, **arguments):
    print_of_model = fingerprint(load(model_folder).params)
    arguments = {"batch": 4, "seed": 0} | arguments
    return open_data([folder], base_fingerprint=print_of_model, **arguments)


def test_rows_become_tokens_once_and_a_restart_skips_finished_shards(
    tmp_path, model_folder, monkeypatch
):
    prompts = tiny.prompts((30, 12, 25, 60, 9, 20))
    given = [[3, 1, 4, 1, 5], None, None, [9, 2], [6, 5], [3, 5]]
    rows = [{"prompt": p, "response": r} for p, r in zip(prompts, given, strict=True)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    config = data.DataConfig(
        model=model_folder, source=(source,), out=tmp_path / "data",
        max_prompt=40, max_response=4, batch=2, shard_rows=3,
    )  # fmt: skip
    calls = []

    def interrupted(rows, *rest):
        calls.append(len(rows))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return prepare_rows(rows, *rest)

    prepare_rows = data.prepare_rows
    monkeypatch.setattr(data, "prepare_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.prepare(config)
    with pytest.raises(ValueError, match="run `lookahead train data` again"):
        open_rows(config.out, model_folder)
    data.prepare(config)
    assert len(calls) == 3  # the first shard was not made again
    with pytest.raises(ValueError, match=r"other settings \(max_response: 4, now 8\)"):
        data.prepare(data.dataclasses.replace(config, max_response=8))

    opened = open_rows(config.out, model_folder)
    stored = [(row["prompt"].tolist(), row["response"].tolist()) for row in opened.dataset]
    model = load(model_folder)
    own = generate(model, prompts[1:3], policy=Full(), max_new_tokens=4).tokens
    expected = [(prompts[0], given[0][:4]), (prompts[1], own[0]), (prompts[2], own[1])]
    assert stored == expected + [(prompts[i], given[i]) for i in (4, 5)]  # 60 tokens: left out
    with pytest.raises(ValueError, match="usable rows are fewer than a batch of 6"):
        open_rows(config.out, model_folder, batch=6)


def test_sources_are_streamed_in_order_up_to_a_limit(tmp_path, model_folder, monkeypatch):
    """JSON lines, parquet, and what the hub is asked for (here a folder in its layout)."""
    prompts = tiny.prompts((5,) * 9)
    rows = [{"prompt": p, "response": [i]} for i, p in enumerate(prompts)]
    lines = write_rows(tmp_path / "rows.jsonl", rows[:3])
    table = tmp_path / "rows.parquet"
    data.datasets.Dataset.from_list(rows[3:5]).to_parquet(table)
    (tmp_path / "hub" / "test").mkdir(parents=True)
    write_rows(tmp_path / "hub" / "test" / "part.jsonl", rows[5:])
    sources = (str(lines), str(table), f"hf:{tmp_path / 'hub'}@test")
    assert list(data.read_sources(sources)) == rows
    streams = []

    def load_dataset(*args, **options):
        streams.append((args, options))
        return opened(*args, **options)

    opened = data.datasets.load_dataset
    monkeypatch.setattr(data.datasets, "load_dataset", load_dataset)
    config = data.DataConfig(
        model=model_folder, source=sources, out=tmp_path / "data", limit=6, shard_rows=4
    )
    data.prepare(config)
    data.prepare(config)  # nothing is left to do
    stored = [row["prompt"].tolist() for row in open_rows(config.out, model_folder).dataset]
    assert stored == prompts[:6]
    assert all(options["streaming"] for _, options in streams)
    with pytest.raises(ValueError, match=r"other settings \(limit: 6, now 7\)"):
        data.prepare(data.dataclasses.replace(config, limit=7))
    monkeypatch.setattr(
        data.datasets, "load_dataset", lambda *names, **how: [how | {"names": names}]
    )
    (asked,) = data.read_sources(("hf:some/chats:small@test",))
    assert asked == dict(names=("some/chats", "small"), split="test", streaming=True)
    with pytest.raises(ValueError, match="or hf:owner/name"):
        list(data.read_sources(("some/chats",)))
    with pytest.raises(ValueError, match="--limit must be at least 1, not 0"):
        data.prepare(data.dataclasses.replace(config, limit=0))


def test_chats_go_through_the_template(model_folder):
    class Words:
        """As much of a tokenizer as the chats need."""

        def render_chat(self, messages):
            return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"

        def encode(self, text, *, special=True):
            return [ord(c) % 97 for c in ("^" if special else "") + text]

        def encode_behind(self, text):
            return self.encode(text, special=False)

    model = data.dataclasses.replace(load(model_folder), tokenizer=Words())
    ask, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}

    def ids(text):
        return Words().encode(text, special=False)

    prompt = ids("<user>hi<assistant>")
    assert data.tokenize({"messages": [ask, answer]}, model) == (prompt, ids("yes"), 0)
    assert data.tokenize({"messages": [ask]}, model) == (prompt, [], 0)
    assert data.tokenize({"prompt": "ab", "response": "c"}, model) == (ids("^ab"), ids("c"), 0)
    asked = data.tokenize({"messages": [ask, answer], "question": " hi "}, model)
    assert asked == (prompt, ids("yes"), len("hi<assistant>"))
    assert data.tokenize({"prompt": "abab", "question": "ab"}, model) == (ids("^abab"), [], 2)
    for row in ({"prompt": "ab", "question": "c"}, {"prompt": [3, 1], "question": "c"}):
        with pytest.raises(ValueError, match="the question 'c' does not occur in the prompt"):
            data.tokenize(row, model)
    with pytest.raises(ValueError, match="neither messages nor a prompt, only text"):
        data.tokenize({"text": "ab"}, model)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        data.tokenize({"prompt": [3, 97]}, model)


def test_a_question_whose_letters_merge_with_those_before_begins_at_the_merged_token(model_folder):
    class Pairs:
        """Tokens of two letters."""

        def encode(self, text, *, special=True):
            return [sum(map(ord, text[i : i + 2])) % 97 for i in range(0, len(text), 2)]

    model = data.dataclasses.replace(load(model_folder), tokenizer=Pairs())
    row = data.tokenize({"prompt": "abcdef", "question": "def"}, model)
    assert (len(row.prompt), row.question) == (3, 2)


def test_hidden_questions_stand_in_the_response(tmp_path, model_folder):
    """For a share of the rows that have one; which ones, later rows do not change."""
    rng = np.random.default_rng(0)
    count = 400
    rows = [
        {
            "prompt": rng.integers(0, 97, 9).tolist(),
            "response": rng.integers(0, 97, 3).tolist() if i % 10 else [],
            "question": (0, 4, 5)[i % 3],
        }
        for i in range(count)
    ]
    for folder, number in (("few", 40), ("many", count)):
        shard = training_data.shard_path(tmp_path / folder, 0)
        made = data.datasets.Dataset.from_list(rows[:number], features=training_data.FEATURES)
        made.save_to_disk(str(shard))
        about = {"base_fingerprint": fingerprint(load(model_folder).params), "shards": 1}
        (tmp_path / folder / training_data.COMPLETE).write_text(json.dumps(about))
    seen = open_rows(tmp_path / "many", model_folder)
    some, few = (
        open_rows(tmp_path / name, model_folder, hide_question=0.5) for name in ("many", "few")
    )
    every = open_rows(tmp_path / "many", model_folder, hide_question=1.0)
    assert seen.lengths.tolist() == [[9, len(row["response"])] for row in rows]
    moved = [row["question"] if row["response"] else 0 for row in rows]
    np.testing.assert_array_equal(every.lengths - seen.lengths, [[-n, n] for n in moved])
    hidden = (some.lengths == every.lengths).all(1)[np.array(moved) > 0]
    assert abs(hidden.mean() - 0.5) < 0.1
    np.testing.assert_array_equal(few.lengths, some.lengths[:40])

    batch = some.batch_of(0, 1, microbatch_sharding(make_mesh()))
    for row, prompt, response in zip(
        some.rows_of(0), np.asarray(batch.prompts[0]), np.asarray(batch.responses[0]), strict=True
    ):
        ids = rows[row]["prompt"] + rows[row]["response"]
        at = some.lengths[row, 0]
        assert (prompt[prompt >= 0].tolist(), response[response >= 0].tolist()) == (
            ids[:at],
            ids[at:],
        )
    with pytest.raises(ValueError, match=r"hide_question 1\.5 must be a share from 0 to 1"):
        open_rows(tmp_path / "many", model_folder, hide_question=1.5)


def test_old_rows_have_no_questions_to_hide(tmp_path, model_folder):
    shard = training_data.shard_path(tmp_path, 0)
    data.datasets.Dataset.from_list([{"prompt": [1, 2], "response": [3]}] * 4).save_to_disk(shard)
    about = {"base_fingerprint": fingerprint(load(model_folder).params), "shards": 1}
    (tmp_path / training_data.COMPLETE).write_text(json.dumps(about))
    assert len(open_rows(tmp_path, model_folder).rows) == 4
    with pytest.raises(ValueError, match="no row says where its question begins: leave hide"):
        open_rows(tmp_path, model_folder, hide_question=0.5)


def test_order_is_a_function_of_seed_and_step_and_batches_follow_it(tmp_path, model_folder):
    prompts = tiny.prompts(tuple(range(5, 27)))
    rows = [{"prompt": p, "response": p[:2]} for p in prompts]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    config = data.DataConfig(model=model_folder, source=(source,), out=tmp_path / "data")
    data.prepare(config)
    opened, again = (open_rows(config.out, model_folder) for _ in range(2))
    epoch = np.concatenate([opened.rows_of(step) for step in range(5)])
    assert len(set(epoch)) == 20  # 22 rows, batches of 4: two are left for another epoch
    np.testing.assert_array_equal(again.rows_of(3), opened.rows_of(3))  # asked first, not last
    assert (opened.rows_of(5) != opened.rows_of(0)).any()
    other = open_rows(config.out, model_folder, seed=1)
    assert (other.rows_of(0) != opened.rows_of(0)).any()

    mesh = make_mesh(data=2, tensor=2)
    batch = opened.batch_of(3, 2, microbatch_sharding(mesh))
    grid = np.asarray(batch.prompts).reshape(4, -1)
    for row, ids in zip(opened.rows_of(3), grid, strict=True):
        np.testing.assert_array_equal(ids[ids >= 0], prompts[row])
    assert {s.data.shape[1] for s in batch.prompts.addressable_shards} == {1}
    assert batch.responses.shape == (2, 2, 16)
    assert jax.tree.leaves(batch)[0].sharding == microbatch_sharding(mesh)


def test_batches_are_of_similar_length_and_bounded_in_tokens():
    lengths = {row: n for row, n in enumerate((500, 20, 900, 1000, 16, 3000, 30, 40, 450, 480))}
    made = list(data.batches(lengths, batch=4, tokens=2048))
    # Padded to 3072, 1024 and 512 tokens: one row (too long, yet alone), two and four of them.
    assert made == [([5], 1), ([3, 2], 2), ([0, 9, 8, 7], 4), ([6, 1, 4], 4)]
    assert list(data.batches({3: 7}, batch=16, tokens=2048)) == [([3], 1)]
    assert list(data.batches({}, batch=16, tokens=2048)) == []
