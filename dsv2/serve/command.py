"""`dsv2 serve`: a checkpoint, an engine and a server around it, until a signal comes."""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dsv2.config.serve import ServeConfig

# Files besides connections: the checkpoint's, libraries', the event loop's.
_OTHER_FILES = 256


def serve(
    path: str,
    host: str,
    port: int,
    config: ServeConfig,
    *,
    version: str,
    served_model_name: str | None = None,
    adapter: str | None = None,
    on_start: Callable[[str], None] = lambda url: None,
    **engine_options: Any,
) -> None:
    """Serve a checkpoint at http://host:port until SIGTERM or SIGINT.

    Args:
        path: a checkpoint's directory or hub id.
        version: what /version says.
        served_model_name: the `model` that clients name; None: `adapter`, or else `path`, as it was given.
        adapter: LoRA weights; the model is then served with them only, and /v1/models tells its parent, `path`.
        on_start: called with the address once the model is loaded, before the port is open.
        engine_options: of `dsv2.engine.llm.LLM`.

    Raises ValueError as `LLM` does, and where the checkpoint has no tokenizer.
    """
    from dsv2.engine.llm import LLM
    from dsv2.serve.app import create_app
    from dsv2.serve.server import Server

    config = replace(config, max_connections=_allowed_connections(config.max_connections))
    engine = LLM(path, adapter=adapter, **engine_options).engine
    name, parent = served_model_name or adapter or path, None if adapter is None else path
    app = create_app(engine, config, name, version, parent)
    on_start(f"http://{host}:{port}")
    Server(app, host, port, config).run()


def _allowed_connections(wanted: int) -> int:
    """As many as the system lets this process have open, which is raised as far as it may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = wanted + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < enough:
        soft = enough if hard == resource.RLIM_INFINITY else min(enough, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        return max(1, min(wanted, soft - _OTHER_FILES))
    return wanted
