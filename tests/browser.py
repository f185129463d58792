"""A headless Chromium for tests of pages, spoken to over pipes in the DevTools protocol: no package is needed."""

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# The protocol wants its pipes at 3 and 4, which in this process may be taken.
PIPES_AT_3_AND_4 = (
    "import os, sys; [os.dup2(int(sys.argv[i]), i + 2) for i in (1, 2)]; os.execvp(sys.argv[3], sys.argv[3:])"
)


class Page:
    """A tab."""

    def __init__(self, to: int, out: int) -> None:
        self.to, self.out, self.held, self.number = to, out, b"", 0
        self.session: str | None = None
        self.problems: list[str] = []
        """What the console was told, uncaught errors, and every address that was asked for beside the page's own."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command and its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self.number:
            self._note(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def open(self, page: Path, width: int, *, dark: bool = False, height: int = 900) -> None:
        """Load a file at a width, and wait until it is drawn."""
        self.problems = []
        mobile = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page.as_uri())
        while (event := self._next()).get("method") != "Page.loadEventFired":
            self._note(event)
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def run(self, script: str) -> Any:
        """The value of an expression, of a promise what it resolves to."""
        got = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in got:
            raise RuntimeError(got["exceptionDetails"].get("exception", {}).get("description", "error in the page"))
        return got["result"].get("value")

    def hover(self, x: float, y: float) -> None:
        """Move the pointer there (pixels of the window)."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key: str) -> None:
        """A key, down and up."""
        for kind in ("rawKeyDown", "keyUp"):
            codes = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9, "Enter": 13}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key])

    def picture(self, path: Path) -> None:
        """The whole page as a PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.held:
            if not (more := os.read(self.out, 1 << 16)):
                raise RuntimeError("the browser is gone")
            self.held += more
        message, self.held = self.held.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        found = event.get("params", {})
        match event.get("method"):
            case "Runtime.consoleAPICalled":
                self.problems.append(f"console: {found['args']}")
            case "Runtime.exceptionThrown":
                self.problems.append(f"uncaught: {found['exceptionDetails']}")
            case "Log.entryAdded":
                self.problems.append(f"log: {found['entry']['text']}")
            case "Network.requestWillBeSent" if found["type"] != "Document":
                self.problems.append(f"asked for {found['request']['url']}")


@contextmanager
def browser() -> Iterator[Page]:
    """A page in a fresh browser, gone afterwards."""
    assert CHROMIUM is not None
    (to_read, to), (out, out_write) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        flags += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run", "--disable-extensions"]
        command = [sys.executable, "-c", PIPES_AT_3_AND_4, str(to_read), str(out_write), CHROMIUM, *flags]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        running = subprocess.Popen(command, pass_fds=(to_read, out_write), start_new_session=True, **quiet)
        for end in (to_read, out_write):
            os.close(end)
        try:
            yield Page(to, out)
        finally:
            for end in (to, out):
                os.close(end)  # the browser ends when its pipe does
            try:
                running.wait(10)
            except subprocess.TimeoutExpired:
                running.kill()
                running.wait()
