"""A headless Chromium, steered over a pipe; nothing but the standard library."""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import sys

NAMES = ("chromium", "google-chrome", "chromium-browser")
_SECONDS = 60.0

# The browser reads commands from descriptor 3 and answers on 4.
_START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]]
for fd, place in zip(ends, (3, 4)):
    os.dup2(fd, place)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find() -> str | None:
    """Returns the path of a browser, None if there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab of a browser; `messages` holds what went wrong in it."""

    def __init__(self, program: str, folder):
        """Starts the browser, with its profile in `folder`."""
        here, theirs = os.pipe(), os.pipe()
        command = [
            program,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--hide-scrollbars",
            f"--user-data-dir={folder}",
            "--remote-debugging-pipe",
            "about:blank",
        ]
        ends = (str(here[0]), str(theirs[1]))
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, *ends, *command],
            pass_fds=(here[0], theirs[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(here[0])
        os.close(theirs[1])
        self._to, self._from = here[1], theirs[0]
        self._numbers, self._rest = itertools.count(1), b""
        self._events: list[dict] = []
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params):
        """Sends one command of the DevTools protocol and returns its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._events.append(answer)

    def _read(self) -> dict:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], _SECONDS)
            block = os.read(self._from, 1 << 20) if ready else b""
            if not block:
                raise RuntimeError("The browser does not answer.")
            self._rest += block
        first, _, self._rest = self._rest.partition(b"\0")
        return json.loads(first)

    def open(self, url: str, *, width: int = 1200, height: int = 900, dark=False):
        """Loads a page, and forgets the messages of those before."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1}
        phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", mobile=phone, **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._events.clear()
        self.call("Page.navigate", url=url)
        while not any(e.get("method") == "Page.loadEventFired" for e in self._events):
            self._events.append(self._read())

    def evaluate(self, expression: str):
        """Returns the value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"]))
        return found["result"].get("value")

    def messages(self) -> list[str]:
        """Returns errors and warnings of the page, and failed requests."""
        self.evaluate("0")
        wrong = {
            "Runtime.exceptionThrown",
            "Runtime.consoleAPICalled",
            "Log.entryAdded",
            "Network.loadingFailed",
        }
        return [json.dumps(e) for e in self._events if e.get("method") in wrong]

    def requests(self) -> list[str]:
        """Returns the address of everything that the page asked for."""
        self.evaluate("0")
        sent = [e for e in self._events if e["method"] == "Network.requestWillBeSent"]
        return [e["params"]["request"]["url"] for e in sent]

    def screenshot(self, *, whole: bool = True) -> bytes:
        """Returns a PNG of the page."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        return base64.b64decode(found["data"])

    def close(self):
        """Ends the browser."""
        os.close(self._to)
        os.close(self._from)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
