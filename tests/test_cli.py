"""The command line: its results are those of the functions, its faults are one line."""

import importlib.util
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import lookahead_jax as lk
from lookahead_jax.checkpoints.tokenizer import Tokenizer
from lookahead_jax.cli.main import GROUPS, main
from lookahead_jax.cli.options import (
    DraftingOptions,
    EvictionOptions,
    ModelOptions,
    PromptOptions,
    SamplingOptions,
)
from lookahead_jax.cli.summaries import policy_summaries
from lookahead_jax.drafters.registry import DRAFTERS
from lookahead_jax.host import activity
from lookahead_jax.host.config_files import UsageError
from lookahead_jax.host.files import atomic_path, atomic_write
from lookahead_jax.host.memory import free_bytes
from lookahead_jax.policies.registry import POLICIES
from lookahead_jax.prompts.speculation import speculate
from tests import tiny

VOCABULARY = 256
TEXT = "def add(a, b):\n    return a + b\n" * 6
# One cut for most tests: they share the program that reads TEXT.
CUT = (
    "--budget", 32, "--policy", "snapkv", "--policy-arg", "window=8", "--policy-arg", "pool=none",
)  # fmt: skip
SAME_CUT = dict(budget=32, policy=lk.make_policy("snapkv", window=8, pool="none"))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A tiny Llama with one token per byte."""
    folder = tmp_path_factory.mktemp("model")
    tiny.save_bytes_model(folder, vocab_size=VOCABULARY)
    return folder


@pytest.fixture(scope="module")
def model(model_dir):
    return lk.load(model_dir)


@pytest.fixture(scope="module")
def answer(model):
    """What follows TEXT after that cut."""
    return lk.generate(model, [TEXT], max_new_tokens=8, **SAME_CUT)


@pytest.fixture
def token_file(tmp_path):
    tokens = np.full((2, 40), -1, np.int32)
    for row, length in zip(tokens, (40, 23), strict=True):
        row[:length] = np.arange(length) * 7 % VOCABULARY
    path = tmp_path / "tokens.npy"
    np.save(path, tokens)
    return path


def fault(capsys, *args: object) -> tuple[int, str]:
    """Exit status and message of a command that fails in one line."""
    status = main([str(arg) for arg in args])
    out = capsys.readouterr()
    assert out.err.startswith("lookahead: error: "), out.err
    assert out.err.count("\n") == 1
    assert "Traceback" not in out.err
    return status, out.err.removeprefix("lookahead: error: ")


def run(*args: object) -> None:
    assert main([str(arg) for arg in args]) == 0


def test_the_policy_left_out_is_lookaheadkv_where_there_are_modules(tmp_path):
    embedded, other = ModelOptions(), ModelOptions(model=tmp_path)
    own = EvictionOptions().resolve(embedded)
    assert (own.name, own.folder) == ("lookaheadkv", lk.EMBEDDED_MODULES)
    assert EvictionOptions().resolve(other)[::2] == ("snapkv", None)
    named = EvictionOptions(lookahead=tmp_path).resolve(other)
    assert (named.name, named.folder) == ("lookaheadkv", tmp_path)
    assert EvictionOptions(policy="h2o").resolve(embedded)[::2] == ("h2o", None)
    smollm2 = ModelOptions(model=Path("smollm2"))
    assert EvictionOptions().resolve(smollm2).policy == lk.make_policy(
        "lookaheadkv", reduce="max", group="max", pool="avg", kernel=5, window=8
    )
    plain = EvictionOptions(policy_arg=("pool=none", "window=0"))
    assert plain.resolve(smollm2).policy == lk.make_policy(
        "lookaheadkv", reduce="max", group="max", kernel=5
    )


def test_generate_names_what_may_take_long(model_dir, monkeypatch, capsys):
    named, begin = {}, activity._Reporter.begin

    def record(self, what, progress):
        named[what] = progress
        begin(self, what, progress)

    monkeypatch.setattr(activity._Reporter, "begin", record)
    run("generate", "--model", model_dir, "--prompt", TEXT, "--max-new-tokens", 8, *CUT)
    assert f"loading {model_dir}" in named
    assert named[f"reading {len(TEXT):,} tokens"] is not None  # tells the layer


def test_sampling_options_are_those_of_generate():
    options = SamplingOptions(
        temperature=0.5,
        presence_penalty=0.3,
        frequency_penalty=-0.2,
        logit_bias=("7=-100", "8=1.5"),
    )
    assert options.make() == lk.Sampling(
        temperature=0.5, presence_penalty=0.3, frequency_penalty=-0.2, logit_bias={7: -100, 8: 1.5}
    )
    for wrong in ("7", "a=1", "7=b", "1.5=1"):
        with pytest.raises(UsageError, match="--logit-bias takes ID=BIAS"):
            SamplingOptions(logit_bias=(wrong,)).make()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_embedded_modules_fit_the_embedded_model_in_every_type(dtype):
    model = lk.load(lk.EMBEDDED_MODEL, dtype=dtype)
    modules = lk.load_modules(lk.EMBEDDED_MODULES, params=model.params, config=model.config)
    assert modules.embeddings.dtype == dtype


def test_generate_streams_the_text_of_the_function(model_dir, answer, tmp_path, capsys):
    out = tmp_path / "result.json"
    run(
        "generate", "--model", model_dir, "--prompt", TEXT, *CUT, "--max-new-tokens", 8,
        "--json", out,
    )  # fmt: skip
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert printed == found["text"][0] + "\n" == answer.text[0] + "\n"
    assert found["tokens"] == answer.tokens
    assert found["prompt_tokens"] == [len(TEXT)]
    assert np.shape(found["cache"]["kept_per_head"]) == (3, 1, 2)
    assert np.unique(found["cache"]["kept_per_head"]).tolist() == [32]
    assert 0 < found["cache"]["bytes"] < found["cache"]["full_bytes"]
    assert set(found["timing"]) == {"ttft_s", "eviction_overhead_s", "decode_tokens_per_s"}


def test_generate_follows_a_json_schema(tmp_path, capsys):
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "array", "items": {"enum": [1, 2]}, "maxItems": 3}))
    run("generate", "--prompt", TEXT, "--json-schema", schema, *CUT)
    assert set(json.loads(capsys.readouterr().out)) <= {1, 2}
    assert main(["generate", "--prompt", "a", "--json-schema", str(schema), "--strategy", "beam"])
    assert "exclude each other" in capsys.readouterr().err
    schema.write_text('{"not": {}}')
    assert main(["generate", "--prompt", "a", "--json-schema", str(schema)])
    assert "Unimplemented keys" in capsys.readouterr().err


def test_generate_samples_by_seed_and_reads_files(model_dir, tmp_path, capsys):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(TEXT)
    texts = []
    for seed in (0, 0, 1):
        run(
            "generate", "--model", model_dir, "--prompt-file", prompt, *CUT, "--temperature", 9.0,
            "--top-k", 50, "--max-new-tokens", 8, "--seed", seed,
        )  # fmt: skip
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_generate_continues_every_row_of_a_token_file(model_dir, model, token_file, capsys):
    run("generate", "--model", model_dir, "--tokens", token_file, "--max-new-tokens", 4)
    rows = [row[row >= 0].tolist() for row in np.load(token_file)]
    expected = lk.generate(model, rows, max_new_tokens=4).text
    assert capsys.readouterr().out == "".join(f"[{i}] {t}\n" for i, t in enumerate(expected))


def test_a_window_that_eats_the_budget_is_announced(model_dir, capsys):
    run(
        "generate", "--model", model_dir, "--prompt", TEXT, "--budget", 8, "--max-new-tokens", 1,
        "--policy-arg", "window=32",
    )  # fmt: skip
    assert re.fullmatch(r"lookahead: notice: .*window 32.*reduced to 4\n", capsys.readouterr().err)


def test_score_writes_what_the_function_returns(model_dir, model, token_file, tmp_path):
    out = tmp_path / "scores.npz"
    run(
        "score", "--model", model_dir, "--tokens", token_file, "--policy", "snapkv",
        "--policy-arg", "window=4", "--budget", 16, "--out", out,
    )  # fmt: skip
    expected = lk.score(
        model, np.load(token_file), policy=lk.make_policy("snapkv", window=4), budget=16
    )
    found = np.load(out)
    assert found["scores"].shape == (3, 2, 2, 40)
    assert found["logits"].shape == (2, VOCABULARY)
    for name in ("scores", "kept", "logits"):
        np.testing.assert_array_equal(found[name], np.asarray(getattr(expected, name)))
    assert (np.diff(found["kept"]) > 0).all()  # every row is longer than the budget: no padding
    assert (found["kept"] >= 0).sum() == 3 * 2 * 2 * 16


def test_logits_writes_every_position(model_dir, model, token_file, tmp_path):
    out = tmp_path / "logits.npz"
    run("logits", "--model", model_dir, "--tokens", token_file, "--out", out)
    found = np.load(out)["logits"]
    tokens = np.load(token_file)
    expected = np.asarray(lk.token_logits(model.params, jnp.asarray(tokens), config=model.config))
    assert found.dtype == np.float32
    read = tokens >= 0
    # Rows are run one by one: float32 sums may be grouped differently than in a batch.
    near = 1e-5 * np.abs(expected).max()  # as for the parity with other implementations
    np.testing.assert_allclose(found[read], expected[read], rtol=0, atol=near)
    assert (found[~read] == 0).all()


def test_inspect_shows_the_kept_positions(model_dir, answer, tmp_path, capsys):
    out = tmp_path / "page.html"
    run(
        "inspect", "--model", model_dir, "--prompt", TEXT, *CUT, "--max-new-tokens", 8,
        "--mark", "return a", "--out", out,
    )  # fmt: skip
    assert capsys.readouterr().out == f"{out}\n"
    data = json.loads(re.search(r'id="data">(.*?)</script>', out.read_text(), re.S)[1])
    assert data["tokens"] == len(TEXT)
    assert "".join(segment[0] for segment in data["segments"]) == TEXT
    assert [[sum(runs[1::2]) for runs in layer] for layer in data["kept"]] == [[32, 32]] * 3
    assert len(data["marks"]) == TEXT.count("return a")
    assert data["generated"] == answer.text[0]


def test_inspect_shows_tokens_without_text(model_dir, tmp_path):
    tokens = tmp_path / "one.npy"
    np.save(tokens, np.arange(len(TEXT), dtype=np.int32)[None] + 60)
    out = tmp_path / "page.html"
    run(
        "inspect", "--model", model_dir, "--tokens", tokens, *CUT, "--max-new-tokens", 1,
        "--out", out,
    )  # fmt: skip
    assert f'"tokens":{len(TEXT)}' in out.read_text()


def test_inspect_lists_the_steps(model_dir, model, tmp_path):
    out, steps = tmp_path / "page.html", []
    drafting = {"drafter": "prompt_lookup", "draft_nodes": 8}
    run(
        "inspect", "--model", model_dir, "--prompt", TEXT, *CUT, "--max-new-tokens", 12,
        "--drafter", "prompt_lookup", "--draft-nodes", 8, "--out", out,
    )  # fmt: skip
    result = lk.generate(
        model, [TEXT], max_new_tokens=12, on_step=steps.append, **SAME_CUT, **drafting
    )
    data = json.loads(re.search(r'id="data">(.*?)</script>', out.read_text(), re.S)[1])["steps"]
    emitted = result.tokens[0][:1]
    for drawn, step in zip(data["list"], steps, strict=True):
        assert drawn["path"] == step.path[0, : step.count[0]].tolist()
        path = [data["names"][drawn["tokens"][node]] for node in drawn["path"]]
        assert path[0] == model.tokenizer.decode(emitted[-1:])
        emitted = result.tokens[0][: len(emitted) + int(step.count[0])]
        assert data["names"][drawn["own"]] == model.tokenizer.decode(emitted[-1:])
    assert emitted == result.tokens[0]


def test_demo_prints_the_table(model_dir, tmp_path, capsys):
    file = tmp_path / "long.py"
    file.write_text(TEXT * 4)
    run(
        "demo", file, "--model", model_dir, "--policy", "full", "--budget", 64,
        "--max-new-tokens", 4,
    )  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    # More text than the model reads, and a policy that evicts nothing: nothing may differ.
    assert lines[0].startswith(f"long.py: 508 tokens, of {len(TEXT) * 4}: the model reads 512")
    cells = {row[1].strip(): row[2:5] for line in lines if len(row := line.split("|")) > 4}
    assert {"cache", "time to first token", "decoding, tokens/s"} <= set(cells)
    assert cells["same next token"][1].strip() == "100% of 4"
    assert cells["first difference"][1].strip() == "none"
    status, line = fault(capsys, "demo", file, "--model", model_dir, "--max-new-tokens", 512)
    assert status == 1
    assert "--max-new-tokens 512 leaves no room for a prompt" in line
    assert "at most 511" in line


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "Expected one of"),
        (["demo", "--bogus", "1"], "--bogus"),
        (["generate", "--prompt", "a", "--top-k", "2.5"], "--top-k"),
        (["demo", "--max-new-tokens", "many"], "--max-new-tokens"),
        (["demo", "--dtype", "int8"], "--dtype"),
        (["score", "--out", "x.npz"], "--tokens"),
        (["fly"], "fly"),
        (["generate"], "--prompt, --prompt-file, --tokens"),
        (["generate", "--prompt", "a", "--tokens", "b.npy"], "--prompt and --tokens"),
        (["generate", "--prompt", "a", "--policy-arg", "window"], "NAME=VALUE"),
    ],
)
def test_misuse_is_one_line_and_status_2(args, message, capsys):
    status, line = fault(capsys, *args)
    assert status == 2
    assert message in line


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt", ""], "empty"),
        (["--prompt-file", "absent.txt"], "absent.txt"),
        (["--prompt-file", "latin.txt"], "not UTF-8 text: .* at byte 1"),
        (["--prompt", "a", "--policy", "magic"], "magic.*snapkv"),
        (["--prompt", "a", "--policy-arg", "colour=red"], "colour.*window"),
        (["--prompt", "a", "--budget", "0"], "budget"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens"),
        (["--prompt", "a", "--top-p", "1.5"], "top_p"),
        (["--prompt", "a", "--lookahead", "absent"], "absent"),
        (["--prompt", "a", "--model", "nowhere"], "nowhere"),
        (["--prompt", "a", "--drafter", "magic"], r"magic.*suffix, .*trie\+suffix"),
        (["--prompt", "a", "--drafter", "trie+magic"], r"magic.*trie\+suffix"),
        (
            ["--prompt", "a", "--drafter", "trie+recycling"],
            r"trie\+recycling.*such as trie\+suffix",
        ),
    ],
)
def test_failures_are_one_line_and_write_nothing(
    args, message, model_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"a\xff")
    status, line = fault(capsys, "generate", "--model", model_dir, "--json", "out.json", *args)
    assert status == 1
    assert re.search(message, line), line
    assert [path.name for path in tmp_path.iterdir()] == ["latin.txt"]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (b"not an array", "not a .npy array"),
        (b"", "not a .npy array"),
        (np.asarray([{}], object), "not a .npy array"),
        (np.zeros((1, 3), np.int64), "int64"),
        (np.zeros(3, np.int32), r"\(3,\)"),
        (np.zeros((0, 3), np.int32), "no prompt"),
        (np.zeros((2, 0), np.int32), "no prompt"),
        (np.full((1, 2), VOCABULARY, np.int32), str(VOCABULARY)),
        (np.asarray([[1, -2]], np.int32), "-2"),
        (np.asarray([[1, 2], [-1, -1]], np.int32), "row 1 holds no token"),
        (np.asarray([[1, -1, 2]], np.int32), "right only"),
    ],
)
def test_token_files_are_checked(tokens, message, model_dir, tmp_path, capsys):
    path, out = tmp_path / "bad.npy", tmp_path / "out.npz"
    if isinstance(tokens, bytes):
        path.write_bytes(tokens)
    else:
        np.save(path, tokens)
    args = ("--model", model_dir, "--tokens", path, "--out", out)
    for command in ("logits", "score"):
        status, line = fault(capsys, command, *args)
        assert status == 1
        assert re.search(f"bad.npy.*{message}", line), line
    assert not out.exists()


def test_an_output_folder_that_is_missing_is_found_before_the_work(tmp_path, capsys):
    out = tmp_path / "absent" / "out.npz"
    status, line = fault(capsys, "logits", "--tokens", "unread.npy", "--out", out)
    assert status == 1
    assert "there is no folder" in line


def test_the_traceback_is_there_when_asked_for(monkeypatch, capsys):
    monkeypatch.setenv("LOOKAHEAD_DEBUG", "1")
    assert main(["generate", "--model", "nowhere", "--prompt", "a"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_atomic_writes_leave_the_old_file_on_failure(tmp_path):
    path = tmp_path / "file.txt"
    atomic_write(path, "old")
    with pytest.raises(KeyError), atomic_path(path) as temporary:
        temporary.write_text("half")
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".txt"
        raise KeyError
    with pytest.raises(FileNotFoundError), atomic_path(path):
        pass
    assert path.read_text() == "old"
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_atomic_folder_is_there_whole_and_stays(tmp_path):
    path = tmp_path / "folder"

    def write(content):
        with atomic_path(path) as temporary:
            (temporary / "inner").mkdir(parents=True)
            (temporary / "inner" / content).touch()
            assert not (path / "inner" / content).exists()

    write("first")
    with pytest.raises(OSError, match="not empty"):
        write("second")
    assert [p.name for p in (path / "inner").iterdir()] == ["first"]
    with pytest.raises(KeyError), atomic_path(path) as temporary:
        temporary.mkdir()
        raise KeyError
    assert list(tmp_path.iterdir()) == [path]


def test_sizes_beyond_the_free_memory_are_refused_before_the_work(model_dir, capsys):
    args = ("--model", model_dir, "--prompt", TEXT)
    status, line = fault(capsys, "generate", *args, "--max-new-tokens", 10**12)
    assert status == 1
    assert re.match(r"the cache needs [\d,.]+ GB \(1 rows of 1,000,000,000,\d+ .*max_new_tok", line)
    size = ("--max-tokens", 10**12, "--max-prompt-tokens", 64, "--port", 0)
    assert fault(capsys, "serve", "--model", model_dir, *size)[1].startswith("the cache needs")


def test_the_memory_of_accelerators_adds_up():
    class Device:
        platform = "gpu"

        def memory_stats(self):
            return {"bytes_limit": 1000, "bytes_in_use": 300}

    assert free_bytes(Device()) == 700
    assert 0 < free_bytes() < 2**60


def test_eos_names_further_end_tokens(model_dir, model, answer, tmp_path, capsys):
    out = tmp_path / "out.json"
    args = ("--model", model_dir, "--prompt", TEXT, *CUT, "--max-new-tokens", 8, "--json", "-")
    tokens = answer.tokens[0]
    end = tokens[3]
    for named in (str(end), model.tokenizer.backend.id_to_token(end)):
        run("generate", *args, "--eos", named)
        found = json.loads(capsys.readouterr().out)  # with --json - there is nothing else
        assert found["tokens"] == [tokens[: tokens.index(end) + 1]]
        assert found["finish"] == ["eos"]
    for wrong in ("<absent>", "99999"):
        status, line = fault(capsys, "generate", *args, "--eos", wrong)
        assert (status, f"--eos {wrong}" in line) == (1, True)
    assert not out.exists()


def test_speckv_observes_with_the_answer_of_a_draft_model(model_dir, model, capsys):
    args = ("generate", "--model", model_dir, "--prompt", TEXT, "--max-new-tokens", 8)
    speckv = (*args, "--policy", "speckv", "--policy-arg", "draft_tokens=4", "--budget", 32)
    run(*speckv, "--draft-model", model_dir)
    policy = lk.make_policy("speckv", draft_tokens=4)
    row = model.tokenizer.encode(TEXT)
    drafts = speculate(model, [row], tokens=4, eos_ids=model.generation.eos_ids).answers
    expected = lk.generate(
        model, [row], policy=policy, budget=32, drafts=drafts, max_new_tokens=8
    ).text[0]
    assert capsys.readouterr().out == expected + "\n"
    assert fault(capsys, *speckv) == (
        2,
        "--policy speckv needs --draft-model DIR, a smaller checkpoint "
        "(see lookahead generate --help)\n",
    )
    status, line = fault(capsys, *args, "--draft-model", model_dir)
    assert (status, line.startswith("--draft-model needs --drafter")) == (2, True)


def test_a_draft_model_with_another_tokenizer(model_dir, answer, capsys):
    named = DraftingOptions(drafter="other_vocabulary", draft_model=Path("embedded"))
    assert named.load(None).path == lk.EMBEDDED_MODEL
    run(
        "generate", "--model", model_dir, "--prompt", TEXT, "--max-new-tokens", 8, *CUT,
        "--drafter", "other_vocabulary", "--draft-model", model_dir, "--draft-nodes", 8,
    )  # fmt: skip
    assert capsys.readouterr().out == answer.text[0] + "\n"


@pytest.mark.skipif(
    "plain" not in inspect.signature(Tokenizer.encode).parameters, reason="no plain text yet"
)
def test_control_tokens_in_a_prompt_are_plain_text_unless_asked_for(model_dir):
    model = lk.load(lk.EMBEDDED_MODEL)
    token = model.tokenizer.special_tokens["bos_token"]
    bos = model.tokenizer.token_id(token)
    for acts in (False, True):
        (prompt,) = PromptOptions(prompt=f"a {token} b", special_tokens=acts).read(model)
        assert (bos in prompt.ids[1:]) == acts


def test_version_is_that_of_the_package(capsys):
    run("--version")
    assert capsys.readouterr().out == f"lookahead {lk.__version__}\n"


@pytest.mark.parametrize("group", ["train", "eval"])
def test_groups_list_their_commands(group, capsys):
    run(group, "--help")
    listed = capsys.readouterr().out
    for name, (module, sentence) in GROUPS[group].items():
        assert f"{name} " in listed
        assert sentence in listed
        assert importlib.util.find_spec(f"lookahead_jax.{module}") is not None
    for args in ([group], [group, "fly"]):
        assert main(args) == 2
        assert "expected one of" in capsys.readouterr().err


def test_help_lists_policies_drafters_and_commands_and_python_m_is_the_command():
    """In one process: it also shows that help does not wait for JAX."""
    code = """
import runpy, sys
from lookahead_jax.cli.main import main
try:
    main(["generate", "--help"])
finally:
    print("jax" in sys.modules, file=sys.stderr)
    print("commands", flush=True)
    sys.argv = ["lookahead", "--help"]
    runpy.run_module("lookahead_jax", run_name="__main__")  # as python -m does
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "False\n")
    of_generate, of_all = process.stdout.split("\ncommands\n")
    commands = ("generate", "score", "logits", "inspect", "demo", "serve", "train", "eval")
    assert all(name in of_all for name in commands)
    for names in (POLICIES, DRAFTERS):
        for name in names:
            assert re.search(rf"^  {re.escape(name)} +[A-Z`].*[a-z]", of_generate, re.M), name
    summaries = policy_summaries()
    assert list(summaries) == list(POLICIES)
    assert len(set(summaries.values())) == len(POLICIES)
    assert max(map(len, summaries.values())) <= 100
