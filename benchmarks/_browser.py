"""Headless Chromium, driven through a pipe: no port is opened, nothing is installed for it.

The protocol is Chromium's own (DevTools, NUL-terminated JSON on file descriptors 3 and 4). Real time, real painting.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def chromium() -> str | None:
    """The browser's path, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """A browser with one page. ``events`` holds what the page's network, console and runtime reported since the last ``open``."""

    def __init__(self, *, width: int = 1360, height: int = 900) -> None:
        self._profile = tempfile.mkdtemp(prefix="report-browser-")
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--hide-scrollbars",
                 f"--user-data-dir={self._profile}", f"--window-size={width},{height}", "--remote-debugging-pipe", "about:blank"]  # fmt: skip

        def place_pipes() -> None:
            os.dup2(to_browser, 13)  # out of the way first: the pipe's ends may be 3 and 4 themselves
            os.dup2(from_browser, 14)
            os.dup2(13, 3)
            os.dup2(14, 4)

        self._process = subprocess.Popen(
            [chromium(), *flags],
            preexec_fn=place_pipes,
            close_fds=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer, self._number, self._session = b"", 0, None
        self.events: list[dict[str, Any]] = []
        page = next(target for target in self.call("Target.getTargets")["targetInfos"] if target["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters} | ({"sessionId": self._session} if self._session else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def _receive(self, timeout: float = 60.0) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], timeout)[0]:
                raise TimeoutError("the browser does not answer")
            data = os.read(self._in, 1 << 20)
            if not data:
                raise RuntimeError("the browser has ended")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(line)

    def open(self, page: Path, fragment: str = "", *, seconds: float = 30.0) -> float:
        """Loads a file and waits until it says that it is ready; returns its performance.now() at that moment, in seconds."""
        self.call("Page.navigate", url="about:blank")
        self.events.clear()
        self.call("Page.navigate", url=f"{page.absolute().as_uri()}#{fragment}")
        self.wait("document.documentElement?.dataset.ready !== undefined", seconds)
        return int(self.run("document.documentElement.dataset.ready")) / 1000

    def run(self, script: str) -> Any:
        """The value of an expression, awaited if it is a promise."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = 10.0) -> None:
        """Until the expression is true."""
        end = time.monotonic() + seconds
        while not self.run(condition):
            if time.monotonic() > end:
                raise TimeoutError(f"not within {seconds:g} s: {condition}; errors: {self.run('document.getElementById(`errors`)?.textContent')}")
            time.sleep(0.02)

    def key(self, key: str) -> None:
        """Presses a key that writes a character."""
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, text=key)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def resize(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def screenshot(self, path: Path) -> None:
        """A PNG of what is in view."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def requests(self) -> list[str]:
        """Addresses that the page asked for since ``open``."""
        return [event["params"]["request"]["url"] for event in self.events if event["method"] == "Network.requestWillBeSent"]

    def complaints(self) -> list[Any]:
        """Exceptions and console errors since ``open``."""
        kinds = ("Runtime.exceptionThrown", "Log.entryAdded")
        found = [event["params"] for event in self.events if event["method"] in kinds]
        return found + [
            event["params"] for event in self.events if event["method"] == "Runtime.consoleAPICalled" and event["params"]["type"] == "error"
        ]

    def close(self) -> None:
        with contextlib.suppress(RuntimeError, TimeoutError, OSError):
            self._session = None
            self.call("Browser.close")
        os.close(self._out)
        os.close(self._in)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._profile, ignore_errors=True)


@contextlib.contextmanager
def browser(**size: int) -> Iterator[Browser]:
    """A browser that is closed in the end."""
    opened = Browser(**size)
    try:
        yield opened
    finally:
        opened.close()
