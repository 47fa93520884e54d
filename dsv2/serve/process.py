"""A server in a process of its own, for as long as a block lasts: what the demo and a benchmark talk to."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 90.0


@contextmanager
def served(path: str | Path, *options: str, log: Path) -> Iterator[str]:
    """Runs `dsv2 serve path *options` on a free port and gives its address once it answers; it is told to stop after.

    What it prints goes to `log`. Raises RuntimeError, with the end of that, where it ends or keeps silent.
    """
    port = _free_port()
    command = [sys.executable, "-m", "dsv2", "serve", str(path), "--port", str(port), *options]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            await_server(url, process, log)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def await_server(url: str, process: subprocess.Popen[bytes], log: Path | None = None) -> None:
    """Returns once the server answers. Raises RuntimeError, with the end of `log`, where it ends or keeps silent."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    said = "" if log is None else f"; the end of {log}: {log.read_text(encoding='utf-8', errors='replace')[-2000:]}"
    raise RuntimeError(f"the server at {url} did not start{said}")
