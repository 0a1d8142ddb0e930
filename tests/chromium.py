"""Chromium without a window, spoken to through its DevTools protocol: by a pipe, which needs no package and no port."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from select import select
from tempfile import TemporaryDirectory
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
TIMEOUT = 60  # seconds for one answer


def find_chromium() -> str | None:
    """The browser's path, if there is one that starts; COFITUNE_CHROMIUM names another."""
    named = os.environ.get("COFITUNE_CHROMIUM")
    results = [named] if named else [path for name in NAMES if (path := shutil.which(name))]
    return next((path for path in results if _starts(path)), None)


def _starts(path: str) -> bool:
    """Whether there is a browser behind the name: some packages install a script that only says how to get one."""
    try:
        return subprocess.run([path, "--version"], check=False, capture_output=True, timeout=TIMEOUT).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


class Tab:
    """One page of the browser.

    Attributes:
        complaints: what the console said as an error or a warning, exceptions, and what the page's policy forbade.
        requests: addresses that were asked for.
    """

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from, self._rest = to_browser, from_browser, b""
        self._number, self._session = 0, ""
        self.complaints: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def open(self, page: Path, width: int, scheme: str, height: int = 900) -> None:
        """Show a file in a window of this many CSS pixels, in light or dark, and wait until it is loaded."""
        self.complaints.clear()
        self.requests.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=page.resolve().as_uri())
        self._wait_for("Page.loadEventFired")
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        message = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in message:
            raise RuntimeError(f"{script}: {message['exceptionDetails']}")
        return message["result"].get("value")

    def screenshot(self, whole: bool = False) -> bytes:
        """A PNG of the window, or of the whole page."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"])

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and give its result; what happens meanwhile is noted."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result

    def _wait_for(self, event: str) -> None:
        while self._read().get("method") != event:
            pass

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            if not select([self._from], [], [], TIMEOUT)[0]:
                raise TimeoutError("chromium does not answer")
            chunk = os.read(self._from, 1 << 20)
            if not chunk:
                raise RuntimeError("chromium has ended")
            self._rest += chunk
        line, self._rest = self._rest.split(b"\0", 1)
        message: dict[str, Any] = json.loads(line)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, event: str, message: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(message["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(str(message["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and message["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(message["args"]))
        elif event == "Log.entryAdded" and message["entry"]["level"] in ("error", "warning"):
            self.complaints.append(message["entry"]["text"])


@contextmanager
def browser(path: str) -> Iterator[Tab]:
    """Start the browser with a fresh profile and give its page; it is ended afterwards."""
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    options = (
        "--headless=new", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu", "--disable-dev-shm-usage",
        "--no-sandbox", "--hide-scrollbars", "--disable-background-networking", "--disable-component-update",
        "--disable-extensions", "--force-color-profile=srgb",
    )  # fmt: skip
    with TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        hand_over = f'exec "$0" "$@" 3<&{to_read} 4>&{from_write}'  # the protocol's pipe is file descriptors 3 and 4
        process = subprocess.Popen(
            ["bash", "-c", hand_over, path, *options, f"--user-data-dir={profile}"],
            pass_fds=(to_read, from_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": profile},
        )  # fmt: skip
        try:
            yield Tab(to_write, from_read)
        finally:
            process.terminate()
            process.wait(TIMEOUT)
            for end in (to_read, to_write, from_read, from_write):
                os.close(end)
