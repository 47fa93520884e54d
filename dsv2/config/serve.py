"""`ServeConfig`: what a server takes on and puts up with. Standard library only.

These limits are about clients; what the engine takes on at once is in `dsv2.config.engine`.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv2.config.schema import require


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Limits of a server. Raises ValueError outside the ranges."""

    api_key: str | None = None
    """What clients must send as bearer token; None: nothing."""
    max_body_bytes: int = 8 << 20
    """A larger request is refused (413)."""
    max_queued_seqs: int = 4096
    """Sequences, `n` of every prompt, that are answered or wait at once; more are refused (429)."""
    max_connections: int = 8192
    """Past it the connection that has been silent longest is closed."""
    idle_timeout_s: float = 30.0
    """In which a connection must deliver a whole request, and a client must go on reading."""
    shutdown_timeout_s: float = 60.0
    """In which running requests may finish once the server is told to stop."""

    def __post_init__(self) -> None:
        require(self.api_key != "", "serve.api_key is empty: give a key, or none at all")
        for name in ("max_body_bytes", "max_queued_seqs", "max_connections", "idle_timeout_s"):
            value = getattr(self, name)
            require(0 < value < float("inf"), f"serve.{name}={value} must be positive")
        timeout = self.shutdown_timeout_s
        require(0 <= timeout < float("inf"), f"serve.shutdown_timeout_s={timeout} must not be negative")
