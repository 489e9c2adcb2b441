"""Renders chat templates in a process of its own, where they cannot exhaust time or memory.

A chat template is a program that comes with a checkpoint. Jinja's sandbox keeps it from the
machine, but does not bound its time and memory. This file is also the program that the
process runs, so it imports nothing of this package.
"""

import atexit
import contextlib
import datetime
import functools
import json
import os
import subprocess
import sys
import threading
from typing import IO, Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SECONDS = 10.0  # for one chat; usual ones take a millisecond
MAX_MEMORY = 2**30  # address space of the process, in bytes
MAX_TEXT = 2**26  # characters of a rendered chat


class TemplateWorker:
    """A process that renders templates, started when it is first needed."""

    def __init__(self, seconds: float = MAX_SECONDS):
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._owner = 0
        atexit.register(self.close)

    def render(self, source: str, context: dict[str, Any]) -> str:
        """The text of a template; `context` holds what JSON can say.

        Raises:
          ValueError: when the template fails, or needs more than its time or memory.
        """
        request = json.dumps({"source": source, "context": context}).encode() + b"\n"
        with self._lock:
            process = self._running()
            overdue = threading.Event()

            def end() -> None:
                overdue.set()
                process.kill()

            timer = threading.Timer(self._seconds, end)
            timer.start()
            answer = None
            try:
                answer = self._exchange(process, request)
            finally:
                timer.cancel()
                # After an interrupt its answer is still to come: the next chat must not get it.
                if answer is None or overdue.is_set():
                    self.close()
        if answer is None:
            raise ValueError(
                f"it took longer than {self._seconds:g} s" if overdue.is_set() else _MEMORY
            )
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["text"]

    def close(self) -> None:
        """Ends the process; the next template starts another."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        with contextlib.suppress(OSError, ValueError):  # what was not sent cannot be sent
            process.communicate()

    def _running(self) -> subprocess.Popen:
        # After a fork the pipes belong to the parent.
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            # -P: the folder of this file holds modules of other names than their importers expect.
            command = [sys.executable or "python3", "-P", __file__]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            self._owner = os.getpid()
            self._exchange(self._process, b"")  # its imports do not count as the template's time
        return self._process

    @staticmethod
    def _exchange(process: subprocess.Popen, request: bytes) -> dict[str, Any] | None:
        """What the process answers, or None if it ended."""
        requests, answers = process.stdin, process.stdout
        if requests is None or answers is None:
            return None
        try:
            requests.write(request)
            requests.flush()
            return json.loads(answers.readline())
        except (OSError, ValueError):
            return None


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks the assistant's part for training; here it only renders its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


@functools.cache
def environment() -> jinja2.Environment:
    """The sandbox that chat templates are written for, as transformers has it."""
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        # Jinja's own filter escapes HTML characters, which models were not trained on.
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    sandbox.filters["tojson"] = tojson
    sandbox.globals["raise_exception"] = raise_exception
    sandbox.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return sandbox


@functools.lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    return environment().from_string(source)


_MEMORY = f"it needs more than {MAX_MEMORY >> 20} MiB of memory, or ended its process"


def _answer(line: bytes) -> dict[str, str]:
    # A template is a program: besides its own errors it can raise any of Python's.
    try:
        request = json.loads(line)
        text = _compile(request["source"]).render(request["context"])
        if len(text) > MAX_TEXT:
            return {"error": f"the chat has {len(text)} characters, more than {MAX_TEXT}"}
        return {"text": text}
    except MemoryError:
        return {"error": _MEMORY}
    except Exception as error:
        return {"error": str(error)[:10_000]}


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    answers.write(b"{}\n")
    answers.flush()
    for line in requests:
        answers.write(json.dumps(_answer(line)).encode() + b"\n")
        answers.flush()


def _limit_memory() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):  # Windows has none, macOS refuses
        pass


if __name__ == "__main__":
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    _limit_memory()
    _serve(sys.stdin.buffer, sys.stdout.buffer)
