"""A headless Chromium for tests of pages, driven by its own protocol."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import unittest

from zreconnect.tests.base import REQUIRED

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
# Chromium reads commands from descriptor 3, and writes to 4.
START = (
    "import os, sys\n"
    "for source, wanted in ((int(sys.argv[1]), 3), (int(sys.argv[2]), 4)):\n"
    "    os.dup2(source, wanted)\n"
    "os.execv(sys.argv[3], sys.argv[3:])\n"
)
KEYS = {"Tab": 9, "Enter": 13}


def on_chromium(test_case):
    """Skip the tests if Chromium is not installed, unless it must be."""
    is_missing = PROGRAM is None and not REQUIRED
    return unittest.skipIf(is_missing, "Chromium is not installed: make services")(test_case)


class Page:
    """One page in a browser of its own. Use it as a context manager."""

    def __init__(self, url):
        self._url = url
        self._numbers = itertools.count(1)
        self._session = {}
        #: What the page has logged, and the addresses that it has asked for.
        self.log, self.requests = [], []

    def __enter__(self):
        self._directory = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        reader, theirs_to_write = os.pipe()
        theirs_to_read, writer = os.pipe()
        # Above the descriptors that Chromium wants to have.
        passed = [os.dup(os.dup(os.dup(each))) for each in (theirs_to_read, theirs_to_write)]
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", "-c", START, *map(str, passed)),
                *(PROGRAM, "--headless=new", "--remote-debugging-pipe", "--no-sandbox"),
                *(
                    "--disable-gpu",
                    "--disable-dev-shm-usage",
                    "--no-first-run",
                    "--hide-scrollbars",
                ),
                *(f"--user-data-dir={self._directory.name}", "about:blank"),
            ],
            pass_fds=passed,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": self._directory.name},
        )
        for each in (theirs_to_read, theirs_to_write, *passed):
            os.close(each)
        self._reader, self._writer = os.fdopen(reader, "rb"), os.fdopen(writer, "wb")
        self._rest = b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Log", "Network", "Runtime", "Accessibility"):
            self.call(f"{domain}.enable")
        self.load()
        return self

    def __exit__(self, *error):
        self._session = {}
        self.call("Browser.close")
        self._process.wait()
        self._reader.close()
        self._writer.close()
        self._directory.cleanup()

    def load(self):
        """Load the page anew."""
        self.call("Page.navigate", url=self._url)
        self._read_until(lambda message: message.get("method") == "Page.loadEventFired")

    def call(self, method, **parameters):
        """The result of a command of the protocol."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters, **self._session}
        self._writer.write(json.dumps(message).encode() + b"\0")
        self._writer.flush()
        answer = self._read_until(lambda message: message.get("id") == number)
        assert "error" not in answer, answer
        return answer["result"]

    def value(self, expression):
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key):
        """Press a key of the keyboard."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=KEYS[key],
                **(text if kind == "keyDown" else {}),
            )

    def media(self, media="", scheme="light"):
        """Show it as on a screen or in print, to somebody who prefers these colours."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)

    def width(self, pixels):
        """Make the window so wide."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=pixels,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )

    def accessible(self):
        """What a screen reader has to read, as (role, name)."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node["ignored"]
        ]

    def pdf(self):
        """The page as it is printed on A4."""
        printed = self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)
        return base64.b64decode(printed["data"])

    def screenshot(self):
        """The whole page, as PNG."""
        return base64.b64decode(
            self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        )

    def _read_until(self, is_it):
        while True:
            while b"\0" not in self._rest:
                part = os.read(self._reader.fileno(), 1 << 20)
                assert part, "Chromium has ended"
                self._rest += part
            message, _, self._rest = self._rest.partition(b"\0")
            found = json.loads(message)
            if found.get("method") in ("Log.entryAdded", "Runtime.consoleAPICalled"):
                self.log.append(found["params"])
            elif found.get("method") == "Network.requestWillBeSent":
                self.requests.append(found["params"]["request"]["url"])
            if is_it(found):
                return found
