"""A headless Chromium for the tests of pages, driven through its DevTools pipe: what it shows, what it complains of."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SECONDS = 60  # a slow machine may take long to start it


class Browser:
    """A browser of its own profile, without a network: one page at a time, at a chosen width and colour scheme."""

    def __init__(self, profile: Path) -> None:
        self.heard: list[dict[str, Any]] = []
        self.rest = b""
        self.number = 0
        theirs_in, self.ours_out = os.pipe()
        self.ours_in, theirs_out = os.pipe()

        def hand_over() -> None:  # Chromium reads from 3 and writes to 4; copies first, since 3 and 4 may be taken
            pair = os.dup(theirs_in), os.dup(theirs_out)
            while min(pair) <= 4:
                pair = os.dup(pair[0]), os.dup(pair[1])
            os.dup2(pair[0], 3)
            os.dup2(pair[1], 4)

        command = [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank",
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, close_fds=False, preexec_fn=hand_over
        )
        os.close(theirs_in)
        os.close(theirs_out)
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    session: str | None = None

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a DevTools command."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.ours_out, json.dumps(message).encode() + b"\0")
        while (answer := self.read()).get("id") != self.number:
            self.heard.append(answer)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def read(self) -> dict[str, Any]:
        """The next message."""
        until = time.monotonic() + SECONDS
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.ours_in], [], [], max(0.0, until - time.monotonic()))
            assert ready, f"the browser said nothing for {SECONDS} s"
            part = os.read(self.ours_in, 1 << 20)
            assert part, "the browser ended"
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def open(self, page: Path, width: int, *, dark: bool = False, mobile: bool = False) -> None:
        """Show a file at so many CSS pixels, and forget what was heard before."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=2 if mobile else 1,
            mobile=mobile,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.heard.clear()
        self.call("Page.navigate", url=page.as_uri())
        while not any(message.get("method") == "Page.loadEventFired" for message in self.heard):
            self.heard.append(self.read())

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression, evaluated from outside: the page's own policy does not forbid that."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def complaints(self) -> list[Mapping[str, Any]]:
        """Errors, warnings, refusals of the policy: everything that went to the console or the log."""
        methods = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [message["params"] for message in self.heard if message.get("method") in methods]

    def requests(self) -> list[str]:
        """The addresses that were asked for, pictures inside the page left out."""
        asked = [m["params"]["request"]["url"] for m in self.heard if m.get("method") == "Network.requestWillBeSent"]
        return [url for url in asked if not url.startswith("data:")]

    def picture(self) -> bytes:
        """The whole page as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def close(self) -> None:
        """End it."""
        self.session = None
        self.call("Browser.close")
        self.process.wait(SECONDS)
        os.close(self.ours_out)
        os.close(self.ours_in)
