"""A browser for tests: chromium through chromedriver's own HTTP interface, with the standard library alone."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the driver is here, behind no proxy
KEYS = {"right": "\ue014", "left": "\ue012", "down": "\ue015", "up": "\ue013", "tab": "\ue004", "enter": "\ue007"}


def missing() -> str:
    """Why no browser test can run here; empty where one can."""
    absent = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{' and '.join(absent)} not installed (Debian: chromium, chromium-driver)" if absent else ""


class Browser:
    def __init__(self, url: str):
        self._url = url

    def call(self, method: str, path: str, **body: Any) -> Any:
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with _OPENER.open(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from error

    def open(self, path: Path) -> None:
        self.call("POST", "/url", url=path.resolve().as_uri())

    def run(self, script: str, *args: Any) -> Any:
        """The value of a script's ``return``."""
        return self.call("POST", "/execute/sync", script=script, args=list(args))

    def wait(self, script: str, seconds: float = 10) -> Any:
        """Until the script returns something true."""
        until = time.monotonic() + seconds
        while not (value := self.run(script)):
            if time.monotonic() > until:
                raise AssertionError(f"never true: {script}")
            time.sleep(0.05)
        return value

    def press(self, *keys: str) -> None:
        for key in keys:
            value = KEYS.get(key, key)
            actions = [{"type": "keyDown", "value": value}, {"type": "keyUp", "value": value}]
            self.call("POST", "/actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def resize(self, width: int, height: int = 900, *, dark: bool = False) -> None:
        """The size of the page itself, whatever the smallest window is."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.cdp("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.cdp("Emulation.setEmulatedMedia", features=[scheme])

    def cdp(self, command: str, **params: Any) -> Any:
        return self.call("POST", "/goog/cdp/execute", cmd=command, params=params)

    def console(self) -> list[str]:
        """What the page complained of since the last call."""
        return [entry["message"] for entry in self.call("POST", "/se/log", type="browser")]

    def screenshot(self) -> bytes:
        return base64.b64decode(self.call("GET", "/screenshot"))


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    profile = tempfile.mkdtemp()
    process = subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    driver = None
    try:
        port = next(line.rstrip(".\n").rpartition(" ")[2] for line in process.stdout if "successfully on port" in line)
        base = Browser(f"http://127.0.0.1:{port}")
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"], "binary": shutil.which("chromium")}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = base.call("POST", "/session", capabilities={"alwaysMatch": wanted})
        driver = Browser(f"http://127.0.0.1:{port}/session/{session['sessionId']}")
        yield driver
    finally:
        if driver is not None:
            driver.call("DELETE", "")
        process.terminate()
        process.wait(10)
        process.stdout.close()
        shutil.rmtree(profile, ignore_errors=True)
