"""A headless Chromium, spoken to in its DevTools protocol through two pipes: nothing to install but the browser.

`python -m tests.diagnostics.browser page.html picture.png "#token=300"` takes a picture.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
LAUNCH = (
    "import os, sys; r, w = map(int, sys.argv[1:3]); os.dup2(r, 3); os.dup2(w, 4); os.execvp(sys.argv[3], sys.argv[3:])"
)
KEYS = {"ArrowRight": 39, "ArrowLeft": 37, "ArrowDown": 40, "Escape": 27, "Tab": 9, "Enter": 13}


def found() -> str | None:
    """The browser's command."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page. Everything waits for its answer, at most `patience` seconds."""

    def __init__(self, command: str, patience: float = 60) -> None:
        self.patience, self.number, self.buffer = patience, 0, b""
        self.failed: list[str] = []  # what the page's scripts threw
        self.profile = tempfile.TemporaryDirectory()
        ours, theirs = self._pipes()
        # No sandbox: root, which tests in a container are, cannot have one. The page is ours.
        options = [
            "--headless=new",
            "--remote-debugging-pipe",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
        ]
        options += ["--no-first-run", "--disable-extensions", "--disable-background-networking", "--mute-audio"]
        options += [f"--user-data-dir={self.profile.name}", "about:blank"]
        launch = [sys.executable, "-c", LAUNCH, *map(str, theirs), command]
        self.process = subprocess.Popen(
            [*launch, *options], pass_fds=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for end in theirs:
            os.close(end)
        self.reads, self.writes = ours
        target = self._call("Target.createTarget", {"url": "about:blank"})["targetId"]
        self.session = self._call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        for domain in ("Page", "Runtime"):
            self.call(f"{domain}.enable")

    def _pipes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        (their_read, our_write), (our_read, their_write) = os.pipe(), os.pipe()
        high = []
        for end in (their_read, their_write):  # above 3 and 4, which are to be theirs
            high.append(fcntl.fcntl(end, fcntl.F_DUPFD, 10))
            os.close(end)
        return (our_read, our_write), (high[0], high[1])

    def call(self, method: str, **params: object) -> dict:
        return self._call(method, params, self.session)

    def _call(self, method: str, params: dict, session: str | None = None) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        os.write(self.writes, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while (answer := self._next()).get("id") != self.number:
            if answer.get("method") == "Runtime.exceptionThrown":
                self.failed.append(json.dumps(answer["params"])[:500])
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _next(self) -> dict:
        until = time.monotonic() + self.patience
        while b"\0" not in self.buffer:
            if not select.select([self.reads], [], [], max(0, until - time.monotonic()))[0]:
                raise TimeoutError(f"the browser said nothing for {self.patience} s")
            if not (more := os.read(self.reads, 2**16)):
                raise RuntimeError(f"the browser ended with {self.process.wait()}")
            self.buffer += more
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def open(self, file: Path, fragment: str = "", *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Shows a file and waits until its scripts have run."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url="about:blank")  # or another fragment would not load the page anew
        self.call("Page.navigate", url=file.absolute().as_uri() + fragment)
        until = time.monotonic() + self.patience
        while not self.ask("location.href.startsWith('file:') && document.readyState === 'complete'"):
            if time.monotonic() > until:
                raise TimeoutError(f"{file} was not loaded in {self.patience} s")
            time.sleep(0.05)

    def ask(self, expression: str) -> object:
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {json.dumps(found['exceptionDetails'])[:500]}")
        return found["result"].get("value")

    def click(self, selector: str) -> None:
        """Presses and releases the mouse in the middle of an element, as a hand would."""
        place = self.ask(
            f"(e => {{ e.scrollIntoView({{block: 'center'}}); const b = e.getClientRects()[0];"
            f" return [b.x + b.width / 2, b.y + b.height / 2]; }})(document.querySelector({json.dumps(selector)}))"
        )
        assert isinstance(place, list)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])

    def picture(self, file: Path) -> None:
        """What the window shows, as a PNG."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        os.close(self.writes)  # which ends the browser
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.reads)
        self.profile.cleanup()


def main(
    page: str, picture: str, fragment: str = "", width: str = "1280", height: str = "900", scheme: str = ""
) -> None:
    command = found()
    if command is None:
        sys.exit("no Chromium is on PATH; see tools/browser.sh")
    browser = Browser(command)
    try:
        browser.open(Path(page), fragment, width=int(width), height=int(height), dark=scheme == "dark")
        browser.picture(Path(picture))
    finally:
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
