"""`lookahead serve` as a user starts and ends it."""

import re
import signal
import subprocess
import sys
import warnings

import openai
import pytest

from lookahead_jax.cli.main import main
from lookahead_jax.cli.serve import read_keys
from lookahead_jax.server.limits import ServerLimits
from lookahead_jax.server.run import bind
from tests import tiny


@pytest.mark.slow
def test_it_answers_as_generate_does_and_ends_on_ctrl_c(tmp_path, capsys):
    tiny.save_bytes_model(tmp_path)
    key = tmp_path / "key"
    key.write_text("sesame\n")
    shared = ["--model", str(tmp_path), "--policy", "snapkv", "--policy-arg", "window=4"]
    shared += ["--budget", "12", "--drafter", "prompt_lookup", "--draft-nodes", "8"]
    sizes = ["--rows", "2", "--max-tokens", "12", "--max-prompt-tokens", "32", "--port", "0"]
    command = [sys.executable, "-m", "lookahead_jax", "serve", *shared, *sizes]
    command += ["--api-key-file", str(key), "--shutdown-seconds", "20"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            lines = []
            for line in process.stderr:
                lines.append(line)
                if found := re.search(r"serving (\S+) at (http://127.0.0.1:\d+/v1)", line):
                    break
            assert found, lines
            client = openai.OpenAI(base_url=found[2], api_key="sesame", max_retries=0)
            prompt = "one two one two one two"
            answer = client.completions.create(
                model=found[1], prompt=prompt, max_tokens=12, temperature=0.7, seed=5
            )
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        finally:
            process.kill()
        assert process.stderr.read().endswith("lookahead: stopped\n")
    assert found[1] == tmp_path.name
    settings = ["--prompt", prompt, "--max-new-tokens", "12", "--temperature", "0.7", "--seed", "5"]
    assert main(["generate", *shared, *settings]) == 0
    assert capsys.readouterr().out == answer.choices[0].text + "\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--max-queue", "-1"], "max_queue must be at least 0, not -1"),
        (
            ["--max-queue", "8", "--max-queue-per-client", "9"],
            "max_queue_per_client must be at most max_queue = 8, not 9: lower it, or raise",
        ),
        (["--max-connections-per-client", "0"], "max_connections_per_client must be at least 1"),
        (["--rows", "0"], "rows must be at least 1, not 0"),
        (["--max-tokens", "4000"], "max_prompt_tokens must be at least 1"),
        (["--prompt-store-mb", "-1"], "-1000000 bytes"),
        (["--api-key-file", "empty"], "empty must hold keys"),
        (["--max-stall-ms", "0"], "--max-stall-ms must be above 0, not 0"),
        (["--host", "no host", "--model", "absent"], "cannot listen on no host"),
        (["--port", "99999", "--model", "absent"], "port must be 0 to 65535, not 99999"),
        (["--port", "-1", "--model", "absent"], "port must be 0 to 65535, not -1"),
    ],
)
def test_misuse_is_one_line(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_text(" \n")
    assert main(["serve", *args]) in (1, 2)
    out = capsys.readouterr().err
    assert message in out
    assert out.count("\n") == 1


@pytest.mark.parametrize("given_flags", [False, True])
def test_options_reach_the_server(given_flags, tmp_path, monkeypatch, capsys):
    given, logging = {}, []

    def server(service, model, **keywords):
        given.update(keywords, limits=service.limits, policies=service.engine.policies)
        raise ValueError("enough")

    tiny.save_bytes_model(tmp_path, num_hidden_layers=1)
    monkeypatch.setattr("lookahead_jax.server.run.Server", server)
    log = "lookahead_jax.server.request_log.log_requests"
    monkeypatch.setattr(log, lambda: logging.append("requests"))
    options = ["--allow-special-tokens", "--no-page", "--no-request-log"] if given_flags else []
    options += ["--max-connections", "7", "--idle-seconds", "2.5", "--port", "0"]
    policy = ["--policy", "snapkv", "--policy-arg", "window=4", "--drafter", "trie"]
    policy += ["--request-policy", "full"]
    sizes = ["--budget", "12", "--max-tokens", "8", "--rows", "2"]
    assert main(["serve", "--model", str(tmp_path), *policy, *sizes, *options]) == 1
    assert "enough" in capsys.readouterr().err
    assert given["allow_special_tokens"] == given_flags
    assert given["with_page"] != given_flags
    assert given["policies"] == ("full", "snapkv")
    assert given["drafter"] == "trie"
    assert logging == ([] if given_flags else ["requests"])
    assert (given["limits"].max_connections, given["limits"].idle_seconds) == (7, 2.5)


def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("lookahead_jax.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve"]) == 1
    assert "pip install 'lookahead-jax[serve]'" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b" \n", b"two words", b"two\nbad lines", "é".encode()])
def test_a_key_is_a_line_of_ascii(tmp_path, content):
    path = tmp_path / "key"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="one in a line, of printable ASCII"):
        read_keys(path)
    path.write_bytes(b"  sk-4471\n\nsk-4472\r\n")
    assert read_keys(path) == ["sk-4471", "sk-4472"]
    path.write_bytes(b"sk-4471\nsk-4471\n")
    with pytest.raises(ValueError, match="holds a key twice"):
        read_keys(path)


def test_others_are_let_in_without_a_key_only_with_a_warning():
    with pytest.warns(UserWarning, match="without a key"):
        bind("0.0.0.0", 0, has_key=False).close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bind("0.0.0.0", 0, has_key=True).close()
        bind("127.0.0.1", 0, has_key=False).close()
        bind("localhost", 0, has_key=False).close()


def test_a_port_in_use_is_an_error():
    with (
        bind("127.0.0.1", 0, has_key=True) as taken,
        pytest.raises(OSError, match="in use"),
    ):
        taken.listen()
        bind("127.0.0.1", taken.getsockname()[1], has_key=True)


def test_limits_are_finite_and_have_a_least_value():
    assert ServerLimits(max_queue=0, shutdown_seconds=0.0).max_queue == 0
    with pytest.raises(ValueError, match="queue_seconds must be at least 1, not nan"):
        ServerLimits(queue_seconds=float("nan"))
    with pytest.raises(ValueError, match="shutdown_seconds must be finite, not inf"):
        ServerLimits(shutdown_seconds=float("inf"))
