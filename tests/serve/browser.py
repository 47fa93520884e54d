"""A headless Chromium, spoken to over a pipe in its DevTools protocol, and a server that answers as a test says.

No driver and no WebSocket: `--remote-debugging-pipe` reads JSON from file 3 and writes it to file 4, a NUL after each
message. Knows nothing of the page under test.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

TIMEOUT_S = 30
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
_KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "ArrowUp": (38, "")}


def find_chromium() -> str | None:
    """The program, None where there is none. The variable CHROMIUM comes first."""
    candidates = (os.environ.get("CHROMIUM", ""), *_NAMES)
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


class Browser:
    """One process. Raises RuntimeError where the browser refuses or says nothing."""

    def __init__(self, program: str, profile: str) -> None:
        (its_input, self._writes), (self._reads, its_output) = _pipe(), _pipe()
        null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in range(3)]
        ends = [(os.POSIX_SPAWN_DUP2, its_input, 3), (os.POSIX_SPAWN_DUP2, its_output, 4)]
        arguments = [program, *_FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        # A group of its own, since a browser is many processes.
        self._pid = os.posix_spawn(program, arguments, os.environ, file_actions=null + ends, setpgroup=0)
        os.close(its_input)
        os.close(its_output)
        self._num_sent, self._pending = 0, b""
        self.events: list[dict[str, Any]] = []

    def send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The result of a command. Events that come before it are kept."""
        self._num_sent += 1
        command = {"id": self._num_sent, "method": method, "params": params}
        command |= {} if session is None else {"sessionId": session}
        os.write(self._writes, json.dumps(command).encode() + b"\0")
        while (message := self._receive()).get("id") != self._num_sent:
            self.events.append(message)
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        return message["result"]

    def wait_for(self, method: str, session: str) -> None:
        """Returns once an event has come that was not waited for before."""
        while True:
            for i, event in enumerate(self.events):
                if event.get("method") == method and event.get("sessionId") == session:
                    del self.events[i]
                    return
            self.events.append(self._receive())

    def close(self) -> None:
        """Ends the process and those that it started."""
        os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._reads)
        os.close(self._writes)

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + TIMEOUT_S
        while b"\0" not in self._pending:
            if not select.select([self._reads], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise RuntimeError(f"the browser said nothing for {TIMEOUT_S} s")
            if not (read := os.read(self._reads, 1 << 16)):
                raise RuntimeError("the browser has ended")
            self._pending += read
        message, _, self._pending = self._pending.partition(b"\0")
        return json.loads(message)


def _pipe() -> list[int]:
    """Its two ends, neither of them 3 or 4: one end must not be put where the other is."""
    ends = os.pipe()
    moved = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return moved


@contextmanager
def browsing(program: str) -> Iterator[Browser]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(program, profile)
        try:
            yield browser
        finally:
            browser.close()


class Page:
    """A tab. What it remembers it remembers by origin, so a server on a new port meets a tab that knows nothing."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        target = browser.send("Target.createTarget", url="about:blank")["targetId"]
        self._session: str = browser.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def open(self, url: str, *, width: int = 1000, height: int = 760, scheme: str = "light") -> None:
        """Goes to a page, with `width` and `height` in CSS pixels; scheme: light or dark, what the system prefers."""
        size = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": width < 500}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._browser.events.clear()
        self.send("Page.navigate", url=url)
        self._browser.wait_for("Page.loadEventFired", self._session)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.send(method, self._session, **params)

    def evaluate(self, expression: str) -> Any:
        """The value of JavaScript, which JSON can hold; a promise's is awaited."""
        options = {"awaitPromise": True, "returnByValue": True, "userGesture": True}
        reply = self.send("Runtime.evaluate", expression=expression, **options)
        if "exceptionDetails" in reply:
            raise RuntimeError(f"{expression}: {reply['exceptionDetails']}")
        return reply["result"].get("value")

    def wait_until(self, condition: str) -> None:
        """Returns once JavaScript is truthy. Raises RuntimeError where it never is."""
        look = f"(() => {{ try {{ return {condition}; }} catch {{ return false; }} }})()"
        loop = f"const end = Date.now() + {TIMEOUT_S * 500}; const look = () => {look} ? resolve(true) : "
        loop += "Date.now() > end ? resolve(false) : setTimeout(look, 5); look();"
        if not self.evaluate(f"new Promise((resolve) => {{ {loop} }})"):
            raise RuntimeError(f"never true: {condition}\n{self.evaluate('document.body.innerText')}")

    def text(self, selector: str) -> str:
        """What the elements say, hidden parts included."""
        return self.evaluate(
            f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent).join('|')"
        )

    def press(self, key: str, *, shift: bool = False) -> None:
        code, text = _KEYS[key]
        named = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        self.send("Input.dispatchKeyEvent", type="keyDown", **named, **({"text": text} if text else {}))
        self.send("Input.dispatchKeyEvent", type="keyUp", **named)

    def type(self, text: str, into: str) -> None:
        self.evaluate(f"document.querySelector({json.dumps(into)}).select()")
        self.send("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """Clicks with the mouse at the middle of the first such element that is shown."""
        found = f"[...document.querySelectorAll({json.dumps(selector)})].find((e) => e.getClientRects().length)"
        script = f"(() => {{ const e = {found}; e.scrollIntoView({{ block: 'nearest' }}); "
        script += "const r = e.getBoundingClientRect(); return { x: r.x + r.width / 2, y: r.y + r.height / 2 }; })()"
        place = self.evaluate(script)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def reload(self) -> None:
        self.send("Page.reload")
        self._browser.wait_for("Page.loadEventFired", self._session)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def problems(self) -> list[str]:
        """What went wrong so far: exceptions that nobody caught, and what the page was forbidden to do."""
        ours = [event for event in self._browser.events if event.get("sessionId") == self._session]
        thrown = [str(e["params"]["exceptionDetails"]) for e in ours if e["method"] == "Runtime.exceptionThrown"]
        entries = [e["params"]["entry"] for e in ours if e["method"] == "Log.entryAdded"]
        return thrown + [entry["text"] for entry in entries if entry["source"] in ("security", "violation")]


# A server that answers as told ------------------------------------------------------------------------------------

CSP = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"


@dataclass
class Reply:
    """An answer: pieces of text, streamed; an Event among them is waited for, or for the client to leave.

    Where `error` is given, its status and message, and no pieces. `breaks`: the connection ends before the answer.
    """

    pieces: list[str | threading.Event] = field(default_factory=list)
    error: tuple[int, str] | None = None
    breaks: bool = False
    left: threading.Event = field(default_factory=threading.Event)
    """Set where the client leaves before the end."""


class FakeServer(ThreadingHTTPServer):
    """A page and OpenAI's API, of a model that says what `replies` hold, one after the other."""

    daemon_threads = True

    def __init__(self, page: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.page, self.replies = page, list[Reply]()
        self.requests: list[tuple[str, dict[str, Any], str | None]] = []
        """Path, body and Authorization of every answer that was asked for."""
        self.key: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


@contextmanager
def faking(page: bytes) -> Iterator[FakeServer]:
    with FakeServer(page) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join(TIMEOUT_S)


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        if self.path == "/":
            self._send(200, "text/html; charset=utf-8", self.server.page, {"Content-Security-Policy": CSP})
        elif self._may_pass():
            model = {"id": "deepseek-v2-lite", "object": "model", "max_model_len": 32768}
            self._send_json(200, {"object": "list", "data": [model]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, body, self.headers["Authorization"]))
        if not self._may_pass():
            return
        reply = self.server.replies.pop(0)
        if reply.error:
            self._send_json(reply.error[0], {"error": {"message": reply.error[1]}})
        else:
            self._stream(reply)

    def _may_pass(self) -> bool:
        may = self.server.key is None or self.headers["Authorization"] == f"Bearer {self.server.key}"
        if not may:
            self._send_json(401, {"error": {"message": "the API key is missing or wrong"}})
        return may

    def _stream(self, reply: Reply) -> None:
        self._head(200, "text/event-stream", {})
        num_tokens = 0
        for piece in reply.pieces:
            if isinstance(piece, str):
                self._event({"choices": [self._choice(piece, None)]})
                num_tokens += 1
            elif not self._is_set(piece):
                reply.left.set()
                return
        if not reply.breaks:
            self._event({"choices": [self._choice("", "stop")]})
            self._event({"choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": num_tokens}})
            self.wfile.write(b"data: [DONE]\n\n")

    def _choice(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        said = {"delta": {"content": text}} if self.path.endswith("chat/completions") else {"text": text}
        return {"index": 0, "finish_reason": finish_reason} | said

    def _is_set(self, event: threading.Event) -> bool:
        """True once it is; False where the client left before."""
        while not event.is_set():
            readable = select.select([self.connection], [], [], 0.005)[0]
            if readable and not self.connection.recv(1):
                return False
        return True

    def _event(self, value: dict[str, Any]) -> None:
        self.wfile.write(b"data: %b\n\n" % json.dumps(value).encode())

    def _send_json(self, status: int, value: Any) -> None:
        self._send(status, "application/json", json.dumps(value).encode(), {})

    def _send(self, status: int, kind: str, body: bytes, headers: dict[str, str]) -> None:
        self._head(status, kind, headers | {"Content-Length": str(len(body))})
        self.wfile.write(body)

    def _head(self, status: int, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": kind} | headers).items():
            self.send_header(name, value)
        self.end_headers()
