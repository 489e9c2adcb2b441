"""What takes long is told once, and nothing else is."""

import sys
import threading
import time

import jax
import jax.numpy as jnp

from lookahead_jax.host.activity import activity, printed, telling
from lookahead_jax.kernels.layer_count_cpu import counted_layers
from lookahead_jax.model.decoder import scan_layers
from lookahead_jax.model.jit import program

AFTER_S = 0.2


def test_only_what_takes_long_is_told_and_once():
    told = []
    with telling(told.append, after_s=AFTER_S):
        with activity("short"):
            pass
        with activity("long"):
            time.sleep(4 * AFTER_S)
        time.sleep(2 * AFTER_S)
    assert told == ["long"]


def test_how_far_it_is_is_told_again():
    told, steps = [], iter(range(100))
    with (
        telling(told.append, after_s=AFTER_S, again_s=AFTER_S),
        activity("reading", lambda: f", layer {next(steps)}"),
    ):
        time.sleep(5 * AFTER_S)
    assert told[:2] == ["reading, layer 0", "reading, layer 1"]


def test_programs_note_the_layers_of_a_pass(monkeypatch):
    def run(x):
        def step(x, inputs):
            return x * inputs[0]["w"], None

        return scan_layers(step, x, {"w": jnp.full(3, 2.0)}, None, None)[0]

    with counted_layers() as layer:
        assert "lookahead_layer_count" not in jax.jit(run).lower(jnp.float32(1)).as_text()
        monkeypatch.setattr(jax, "device_count", lambda: 1)  # the tests have several
        assert jax.jit(lambda x: run(x))(jnp.float32(1)) == 8
        assert layer() == 2
    assert "lookahead_layer_count" not in jax.jit(lambda x: run(x)).lower(jnp.float32(1)).as_text()


def test_the_time_of_an_inner_activity_is_not_the_outer_one_s():
    told = []
    with telling(told.append, after_s=AFTER_S), activity("outer"):
        with activity("inner"):
            time.sleep(2 * AFTER_S)
        time.sleep(0.4 * AFTER_S)
    assert told == ["inner"]
    with telling(told.append, after_s=AFTER_S), activity("outer"):
        with activity("inner"):
            pass
        time.sleep(2 * AFTER_S)
    assert told == ["inner", "outer"]


def test_an_activity_that_fails_is_over():
    told = []
    with telling(told.append, after_s=AFTER_S):
        try:
            with activity("fails"):
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            time.sleep(2 * AFTER_S)
    assert told == []


def test_nothing_is_told_outside_of_commands_and_of_other_threads():
    told, threads = [], threading.active_count()
    with activity("library"):
        assert threading.active_count() == threads
    with telling(told.append, after_s=AFTER_S):

        def work():
            with activity("in a thread"):
                time.sleep(2 * AFTER_S)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert told == []
    assert threading.active_count() == threads


def test_a_line_of_text_is_ended_first(monkeypatch, capsys):
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)

    def say(what):
        print(what, file=sys.stderr)

    for text, expected in (("half a line", "\nslow\n"), ("a line\n", "slow\n")):
        with telling(say, after_s=AFTER_S):
            printed(text)
            with activity("slow"):
                time.sleep(2 * AFTER_S)
        assert capsys.readouterr().err == expected


def test_compiling_is_told():
    told = []

    @program()
    def slow_to_trace(x):
        time.sleep(2 * AFTER_S)
        return x + 1

    with telling(told.append, after_s=AFTER_S):
        assert slow_to_trace(jnp.float32(1)) == 2
        assert told == ["compiling"]
        assert slow_to_trace(jnp.float32(2)) == 3
    assert told == ["compiling"]
