"""Headless Chromium for tests, driven through a pipe by its DevTools protocol."""

import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
_OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
_SECONDS = 60.0


class Tab:
    """One page; `events` are those of its console, network and scripts."""

    def __init__(self, to_browser: int, from_browser: int):
        self._to, self._from = to_browser, from_browser
        self._id, self._received, self._session = 0, b"", None
        self.events: list[dict[str, Any]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Calls a method of the protocol; returns its result."""
        self._id += 1
        message = {"id": self._id, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._id:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, url: str) -> None:
        """Loads a page."""
        self.send("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, condition: str) -> None:
        """Waits for a JavaScript expression to be true."""
        end = time.monotonic() + _SECONDS
        while not self.run(condition):
            assert time.monotonic() < end, f"{condition}: {self.run('document.body.innerText')}"
            time.sleep(0.02)

    def type(self, text: str) -> None:
        """Types into what has the focus."""
        self.send("Input.insertText", text=text)

    def press(self, key: str, **more: Any) -> None:
        """Presses and releases a key such as "Enter"."""
        given = {"key": key, "code": key} | ({"text": "\r"} if key == "Enter" else {}) | more
        self.send("Input.dispatchKeyEvent", type="keyDown", **given)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, code=key)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            assert select.select([self._from], [], [], _SECONDS)[0], "the browser does not answer"
            chunk = os.read(self._from, 2**16)
            assert chunk, "the browser has ended"
            self._received += chunk
        message, _, self._received = self._received.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def browsing(folder: Path) -> Iterator[Tab]:
    """A tab of a browser whose files are in `folder`; the browser ends with the block."""
    assert CHROMIUM is not None
    its_in, to_browser = os.pipe()
    from_browser, its_out = os.pipe()
    command = [CHROMIUM, *_OPTIONS, f"--user-data-dir={folder}", "--remote-debugging-pipe"]
    redirected = ["bash", "-c", f'exec "$0" "$@" 3<&{its_in} 4>&{its_out}', *command]
    env = {**os.environ, "HOME": str(folder), "TMPDIR": str(folder)}
    log = (folder / "log").open("wb")
    process = subprocess.Popen(
        redirected, pass_fds=(its_in, its_out), env=env, stdout=log, stderr=log
    )
    log.close()
    os.close(its_in)
    os.close(its_out)
    try:
        yield Tab(to_browser, from_browser)
    finally:
        os.close(to_browser)  # which ends the browser
        try:
            process.wait(20)
        finally:
            process.kill()
            process.wait()
            os.close(from_browser)
