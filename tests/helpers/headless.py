"""Debian's chromium, driven through its DevTools pipe: no server, no port, nothing to install beside it."""

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from fcntl import F_DUPFD, fcntl
from pathlib import Path
from select import select
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# chromium reads commands from descriptor 3 and answers on 4. A child of its own puts them there: in this process
# they may be anything's.
LAUNCH = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
SECONDS = 60.0


class Browser:
    """One tab of a headless chromium, as a `with` block. `events` holds all events of the browser."""

    def __init__(self, home: Path):
        assert CHROMIUM is not None
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        # High numbers, so that neither is overwritten by the other on its way to 3 and 4.
        high = [fcntl(fd, F_DUPFD, 10) for fd in (theirs_in, theirs_out)]
        words = [sys.executable, "-c", LAUNCH, *map(str, high), CHROMIUM, *OPTIONS, f"--user-data-dir={home}"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "stdin": subprocess.DEVNULL}
        self.process = subprocess.Popen([*words, "about:blank"], pass_fds=high, **quiet)  # type: ignore[call-overload]
        for fd in (theirs_in, theirs_out, *high):
            os.close(fd)
        self.input, self.output = ours_in, ours_out
        self.buffer, self.number, self.session = b"", 0, None
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> "Browser":
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.input)
        os.close(self.output)

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer of a DevTools method."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.output, json.dumps(message).encode() + b"\0")
        number = self.number
        answer = self._until(lambda found: found.get("id") == number)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _until(self, holds) -> dict[str, Any]:
        end = time.monotonic() + SECONDS
        while True:
            while b"\0" not in self.buffer:
                assert select([self.input], [], [], max(0.0, end - time.monotonic()))[0], "chromium does not answer"
                part = os.read(self.input, 1 << 20)
                assert part, "chromium ended"
                self.buffer += part
            text, self.buffer = self.buffer.split(b"\0", 1)
            found = json.loads(text)
            if "id" not in found:
                self.events.append(found)
            if holds(found):
                return found

    def open(self, page: Path, *, width: int, height: int = 844, dark: bool = False) -> None:
        """Load a page on a screen of `width` CSS pixels."""
        phone = width < 600
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = "dark" if dark else "light"
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self("Page.navigate", url=page.resolve().as_uri())
        if not any(e["method"] == "Page.loadEventFired" for e in self.events):
            self._until(lambda found: found.get("method") == "Page.loadEventFired")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def events_of(self, method: str) -> list[dict[str, Any]]:
        """The parameters of each such event since the page was opened."""
        return [e["params"] for e in self.events if e["method"] == method]

    def picture(self, file: Path) -> None:
        """The whole page as PNG."""
        data = self("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(data))

    def print(self, file: Path) -> None:
        """The page as PDF."""
        data = self("Page.printToPDF", printBackground=True, preferCSSPageSize=True)["data"]
        file.write_bytes(base64.b64decode(data))
