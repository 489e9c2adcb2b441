"""The training recipe: its prompts, and runs that stop, go on, and serve as far as they got."""

import collections
import dataclasses
import json
import os
import random
import shutil
import signal

import numpy as np
import pytest
import tokenizers

from lookahead_jax.checkpoints.load import load
from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.eval.tasks.own.code import HELDOUT
from lookahead_jax.model.fingerprint import fingerprint
from lookahead_jax.modules.definition import LookaheadConfig
from lookahead_jax.modules.files import load_modules
from lookahead_jax.train import data, training_data
from lookahead_jax.train.checkpoints import digests
from lookahead_jax.train.loss import LossConfig
from lookahead_jax.train.optimizer import OptimizerConfig
from lookahead_jax.train.recipe import estimate, material, package, recipe
from lookahead_jax.train.recipe.facts import RELATIONS
from lookahead_jax.train.recipe.prompts import KINDS, Maker, length, prompt
from lookahead_jax.train.recipe.turns import ChatDraft
from tests import tiny

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
EVALUATED = (  # of RULER, in the words of eval/tasks/ruler.py
    "special magic", "needle", "memorize", "quiz you", "VAR ", "grass is green", "chain(s)",
    "coded text", "most frequently appeared", "numbered list of words",
)  # fmt: skip


@pytest.fixture(scope="module")
def texts():
    """The material of this machine, a small part of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(material, "PACKAGES", ("tqdm", "packaging"))
        patch.setattr(material, "LIBRARY_BYTES", 300_000)
        yield material.read_material([{"text": "A source of one's own. " * 60}])


@pytest.fixture(scope="module")
def maker(texts):
    """Words and signs are tokens."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer = Tokenizer(backend, {}, {"default": TEMPLATE})
    return Maker(material=texts, tokenizer=tokenizer, seed=3, lengths=(256, 2048))


@pytest.fixture(scope="module")
def rows(maker):
    return [prompt(maker, number) for number in range(120)]


def test_prompts_are_a_function_of_seed_and_number(maker, rows):
    assert [prompt(maker, number) for number in (5, 77)] == [rows[5], rows[77]]
    other = dataclasses.replace(maker, seed=4)
    assert prompt(other, 5) != rows[5]
    assert len({json.dumps(row["messages"]) for row in rows}) == len(rows)


def test_lengths_are_spread_log_uniformly_over_their_range(maker, rows):
    tokens = np.array([row["tokens"] for row in rows])
    draft = ChatDraft(rows[9]["messages"], [])
    assert tokens[9] == length(draft, maker.tokenizer)
    assert tokens.min() >= 256
    assert tokens.max() <= 2048
    # Three octaves, a third of the prompts each: 40 of 120, three standard deviations are 15.
    octaves = np.bincount(np.floor(np.log2(tokens / 256)).astype(int).clip(0, 2))
    assert (abs(octaves - 40) <= 15).all(), octaves


def test_answers_stand_in_prompts_and_end_with_a_user(rows):
    kinds = collections.Counter(row["kind"] for row in rows)
    assert kinds.keys() == KINDS.keys()
    for row in rows:
        contents = "\n".join(message["content"] for message in row["messages"])
        assert all(answer in contents for answer in row["answers"]), row["kind"]
        assert row["messages"][-1]["role"] == "user"
        said = [m["role"] for m in row["messages"] if m["role"] != "system"]
        assert said == ["user", "assistant"] * (len(said) // 2) + ["user"]
    asked = [row for row in rows if row["kind"] in ("facts", "register", "table", "chat")]
    assert all(row["answers"] for row in asked)


def test_questions_end_the_last_message_unless_they_come_first(rows):
    for row in rows:
        assert row["messages"][-1]["content"].endswith(row["question"])
    with_question = [row for row in rows if row["question"]]
    assert 0.7 < len(with_question) / len(rows) < 0.9
    turns = [row for row in rows if "assistant" in [m["role"] for m in row["messages"]]]
    assert all(row["question"] == row["messages"][-1]["content"] for row in turns)


def test_nothing_that_is_evaluated_is_trained_on(texts, rows):
    """Wordings of our templates, and files of the held-out code."""
    own = json.dumps([(r.noun, r.statements, r.questions) for r in RELATIONS])
    for words in EVALUATED:
        assert words.lower() not in own.lower()
    questions = "\n".join(row["messages"][-1]["content"][-200:] for row in rows)
    assert not any(words.lower() in questions.lower() for words in EVALUATED[:4])

    held_out = json.loads(HELDOUT.read_text("utf-8").splitlines()[0])["text"]
    copied = material._held_out_lines()
    edited = "# another first line\n" + held_out.replace("    return", "    # so\n    return")
    assert material._is_copy(edited, copied)
    names = [document.name for document in (*texts.prose, *texts.code)]
    assert not any(material._is_copy(d.text, copied) for d in (*texts.prose, *texts.code))
    assert any(name.startswith("source/") for name in names) or len(names) > 20
    with pytest.raises(ValueError, match="source row 0: expected text, prompt or messages, got a"):
        material.read_material([{"a": 1}])


def test_an_excerpt_is_of_about_the_size_asked_for(texts):
    for size in (100, 3000, 20000):
        for kind in ("prose", "code"):
            text = texts.excerpt(random.Random(size), size, kind)
            assert 0.9 * size <= len(text) <= 2.5 * size


@pytest.fixture
def config(tmp_path, monkeypatch, texts):
    """A recipe of two shards and eight steps, for a model of one layer."""
    (tmp_path / "model").mkdir()
    tiny.save_chat_model(tmp_path / "model", num_hidden_layers=1)
    monkeypatch.setattr(recipe, "read_material", lambda sources: texts)
    monkeypatch.setattr(recipe, "GROUP", 2)
    monkeypatch.setattr(training_data, "GROUP", 2)
    return recipe.RecipeConfig(
        model=tmp_path / "model", folder=tmp_path / "folder", prompts=16, shard_rows=8, epochs=2,
        batch=4, shortest=300, longest=450, max_response=8, save_every=2,
        modules=LookaheadConfig(tokens=2, rank=1, alpha=2.0, targets=("q",), init="table"),
        optimizer=OptimizerConfig(rate=1e-2, warmup=2),
    )  # fmt: skip


def exported(config):
    model = load(config.model)
    return digests(
        load_modules(
            config.folder / config.run / "modules", params=model.params, config=model.config
        )
    )


def losses(config):
    lines = (config.folder / config.run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.slow
def test_a_stopped_recipe_goes_on_as_if_it_had_not_been(config, tmp_path, monkeypatch, capsys):
    recipe.run_recipe(config)
    said = capsys.readouterr().err
    assert "at most" in said
    assert f"done: the modules are in {config.folder / 'run' / 'modules'}" in said
    straight = losses(config)
    assert len(straight) == 8
    model = load(config.model)
    base = fingerprint(model.params)
    rows = training_data.open_data([config.folder / "data"], batch=4, seed=0, base_fingerprint=base)
    assert len(rows.rows) == config.prompts  # a study can use them too

    given = ["x.json", "--folder", "/a", "--run=/b", "--out", "/c"]
    package.write_package(package.PackageConfig(**vars(config), out=tmp_path / "out"), given)
    model = load(config.model)
    packed = load_modules(tmp_path / "out", params=model.params, config=model.config)
    whole = load_modules(
        config.folder / config.run / "modules", params=model.params, config=model.config
    )
    np.testing.assert_allclose(packed.embeddings, whole.embeddings, rtol=1e-3)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "lookahead train recipe x.json\n" in card
    assert "8 of 8 steps of 4 rows: each prompt was learned from about 2.0 times." in card

    made = data.prepare_rows
    other = dataclasses.replace(config, folder=tmp_path / "other")
    other.folder.mkdir()
    shutil.copy(config.folder / "rates.json", other.folder)  # measured once is enough

    def interrupted(rows, model, settings, first):
        if first == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return made(rows, model, settings, first)

    monkeypatch.setattr(data, "prepare_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recipe.run_recipe(other)
    assert losses(other) == straight[:2]  # the steps of one shard
    early = exported(other)
    monkeypatch.setattr(data, "prepare_rows", made)
    recipe.run_recipe(other)
    assert losses(other) == straight
    assert exported(other) == exported(config) != early

    # Another run shares prompts and responses, and needs none of the work done again.
    monkeypatch.setattr(data, "prepare_rows", None)
    again = dataclasses.replace(config, run="again", prompts=8, seed=1)
    recipe.run_recipe(again)
    assert len(losses(again)) == 4
    with pytest.raises(ValueError, match="belongs to another run"):
        recipe.run_recipe(dataclasses.replace(again, epochs=3))
    with pytest.raises(ValueError, match=r"other settings \(longest: 450, now 400\)"):
        recipe.run_recipe(dataclasses.replace(config, longest=400))


@pytest.mark.slow
def test_a_run_can_hide_the_questions(config):
    """On the same responses; prompts that had no question keep their forward."""
    recipe.run_recipe(config)
    kept = len(list((config.folder / "forwards").glob("*.npz")))
    hidden = dataclasses.replace(config, run="hidden", hide_question=1.0)
    recipe.run_recipe(hidden)
    prompts = [
        json.loads(line)
        for shard in range(config.shards)
        for line in recipe.prompt_file(config.folder, shard).read_text().splitlines()
    ]
    asked = sum(bool(row["question"]) for row in prompts)
    assert 0 < asked < len(prompts)
    assert len(list((config.folder / "forwards").glob("*.npz"))) == kept + asked
    assert losses(hidden) != losses(config)


def test_a_card_names_the_modules_that_a_run_began_with(tmp_path):
    given = ["x.json", "--start", "/home/me/modules", "--run", "b", "--seed=2", "--out=o"]
    assert package._without_places(given) == ["x.json", "--start", "MODULES", "--seed=2"]
    assert package._without_places(["x.json", "--start=m"]) == ["x.json", "--start", "MODULES"]
    assert package._started(None) == ""
    assert "which have no card" in package._started(tmp_path)
    (tmp_path / "README.md").write_text("# Modules\n\n## Data\n\nRows.\n\n## Licence\n\nFree.\n")
    assert package._started(tmp_path).endswith("### Modules\n\n#### Data\n\nRows.\n\n")


@pytest.mark.slow
def test_steps_of_a_memory_are_measured_for_themselves(config):
    """They run the response as well, so the rates of other steps are not theirs."""
    model = load(config.model)
    prompts = [[1 + i % 40 for i in range(300)]] * 2
    config.folder.mkdir()

    def measured(modules, loss):
        return estimate.rates(
            config.folder / estimate.file_name(loss, None), model, prompts, modules, loss=loss,
            prompt_s=0.0,
        )  # fmt: skip

    plain = measured(config.modules, LossConfig())
    remembering = dataclasses.replace(config.modules, memory=True)
    memory = measured(remembering, LossConfig(memory=1.0, budgets=(64,)))
    assert memory != plain
    assert measured(config.modules, LossConfig()) == plain  # both are kept
    assert measured(remembering, LossConfig(memory=1.0, budgets=(64,))) == memory


def test_the_command_names_what_goes_on(monkeypatch, capsys):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "run_recipe", interrupted)
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    shipped = recipe.parse_config(recipe.RecipeConfig, ["smollm2", "--batch", "4"], "prog")
    assert (shipped.batch, shipped.model.name) == (4, "smollm2")
    assert str(shipped.folder) == "/cache/lookahead_jax/recipes/smollm2"
    assert recipe.main(["smollm2", "--run", "a b"]) == 130
    assert capsys.readouterr().err == (
        "lookahead train recipe: error: interrupted; to go on: "
        "lookahead train recipe smollm2 --run 'a b'\n"
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompts": 30}, "--prompts 30 must be a multiple of --shard-rows 8"),
        ({"shortest": 500}, "expected 64 or more, in this order"),
        ({"epochs": 0}, "must be at least 1"),
        ({"batch": 6}, "a batch of 6 cannot be split"),
        ({"hide_question": 50.0}, r"hide_question 50\.0 must be a share from 0 to 1"),
        (
            {"optimizer": OptimizerConfig(rate=1e-2, warmup=16)},
            "a warm-up of 16 steps does not fit",
        ),
    ],
)
def test_sizes_that_cannot_be_are_refused_first(config, changed, message):
    with pytest.raises(ValueError, match=message):
        recipe.run_recipe(dataclasses.replace(config, **changed))
    assert not config.folder.exists()
