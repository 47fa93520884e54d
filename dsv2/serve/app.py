"""The HTTP API: which path does what, who may, and what becomes of errors. What answers hold is decided elsewhere."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from dsv2.config.serve import ServeConfig
from dsv2.serve import tokens
from dsv2.serve.chat import Chat, ChatWriter
from dsv2.serve.completions import Completion, CompletionWriter
from dsv2.serve.loop import EngineFailed, EngineLoop, EngineStopped, QueueFull
from dsv2.serve.metrics import Stats, registry_of
from dsv2.serve.protocol import ApiError, Fields, Usage, bad_request
from dsv2.serve.responses import Answer, ClientGone, EventStream, Writer, error_of, json_response, unless_gone
from dsv2.text import template_of

if TYPE_CHECKING:
    from dsv2.engine.core import Engine

T = TypeVar("T")

PAGE = Path(__file__).with_name("page.html")
# What a model writes can neither run there nor fetch anything.
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
)
# Text of which so much is encoded in a thread: about a millisecond's work.
_LONG_BYTES = 4096


class Api:
    """The endpoints, around one engine. `loop` is started and stopped with the application."""

    def __init__(
        self, engine: Engine, config: ServeConfig, model_name: str, version: str, parent: str | None = None
    ) -> None:
        """Raises ValueError where the engine has no tokenizer. `parent`: the model that an adapter made this one of."""
        if engine.tokenizer is None:
            raise ValueError(f"{model_name} has no tokenizer: a server needs one")
        self.config, self.model_name, self.version, self.parent = config, model_name, version, parent
        self.tokenizer, self.max_model_len = engine.tokenizer, engine.config.max_model_len
        stats = Stats()
        self.loop = EngineLoop(engine, stats, config.max_queued_seqs)
        self.registry = registry_of(stats, engine, model_name)
        self.created = int(time.time())

    # Generation ---------------------------------------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        fields = await self._fields(request)
        return await unless_gone(request.receive, self._complete(fields))

    async def chat_completions(self, request: Request) -> Response:
        fields = await self._fields(request)
        return await unless_gone(request.receive, self._chat(fields))

    async def _complete(self, fields: Fields) -> Response:
        with _refusing():
            body = Completion.take(fields)
            self._finish(fields)
            self.loop.check_room(len(body.prompts) * body.params.n)  # before they are encoded
            prompts = await _encode(fields, lambda: body.encode(self.tokenizer))
        writer = CompletionWriter(body, prompts, self.tokenizer)
        return await self._answer(body, prompts, writer, drops_output=body.drops_output)

    async def _chat(self, fields: Fields) -> Response:
        with _refusing():
            body = await _encode(fields, lambda: Chat.take(fields, template_of(self.tokenizer)))
            self._finish(fields)
            prompts = await _encode(fields, lambda: body.encode(self.tokenizer))
        return await self._answer(body, prompts, ChatWriter(body, self.tokenizer))

    async def _answer(
        self, body: Completion | Chat, prompts: list[list[int]], writer: Writer, drops_output: bool = False
    ) -> Response:
        with _refusing():
            call = await self.loop.submit(f"{writer.id_prefix}-{uuid4().hex}", prompts, body.params)
        answer = Answer(call, self.model_name, writer, Usage(call, drops_output=drops_output))
        if body.streaming.is_on:
            return EventStream(answer, body.streaming)
        with call:
            return json_response(await answer.whole())

    # The model ----------------------------------------------------------------------------------------------------

    async def models(self) -> Response:
        return json_response({"object": "list", "data": [self._model()]})

    async def model(self, name: str) -> Response:
        self._check_model(name)
        return json_response(self._model())

    def _model(self) -> dict[str, Any]:
        about = {"id": self.model_name, "object": "model", "created": self.created, "owned_by": "dsv2"}
        return about | {"root": self.model_name, "parent": self.parent, "max_model_len": self.max_model_len}

    async def tokenize(self, request: Request) -> Response:
        fields = await self._fields(request)
        with _refusing():
            found = await _encode(fields, lambda: tokens.tokenize(fields, self.tokenizer, self.max_model_len))
            self._finish(fields)
        return json_response(found)

    async def detokenize(self, request: Request) -> Response:
        fields = await self._fields(request)
        with _refusing():
            found = await _encode(fields, lambda: tokens.detokenize(fields, self.tokenizer))
            self._finish(fields)
        return json_response(found)

    async def tokenizer_info(self) -> Response:
        return json_response(tokens.tokenizer_info(self.tokenizer, self.max_model_len))

    # The server ---------------------------------------------------------------------------------------------------

    async def health(self) -> Response:
        return json_response({}, 200 if self.loop.is_accepting else 503)

    async def show_version(self) -> Response:
        return json_response({"version": self.version})

    async def metrics(self) -> Response:
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)

    async def page(self) -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": PAGE_POLICY})

    async def check_key(self, request: Request) -> None:
        """ApiError 401 unless the client knows the key. Takes as long whatever the client sent."""
        key = self.config.api_key
        if key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Starlette reads headers as Latin-1, so this gives back the bytes that were sent.
        is_known = hmac.compare_digest(given.strip().encode("latin-1"), key.encode())
        if scheme.lower() != "bearer" or not is_known:
            raise ApiError(
                401, "the API key is missing or wrong: send Authorization: Bearer KEY", code="invalid_api_key"
            )

    # Bodies -------------------------------------------------------------------------------------------------------

    async def _fields(self, request: Request) -> Fields:
        """The body, of which no more is ever held than may come."""
        limit, body = self.config.max_body_bytes, bytearray()
        too_large = ApiError(413, f"the body is larger than {limit} bytes, the most", code="body_too_large")
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > limit:
            raise too_large
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise too_large
        with _refusing():
            return Fields(bytes(body))

    def _finish(self, fields: Fields) -> None:
        """Errors for another model than this, and for fields that nobody took."""
        self._check_model(fields.take("model", str, self.model_name))
        fields.finish()

    def _check_model(self, name: str) -> None:
        if name != self.model_name:
            message = f"the model {name!r} does not exist, expected {self.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")


@contextmanager
def _refusing() -> Iterator[None]:
    """What a request's own content raises in this context is answered with 400."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise bad_request(error) from None


async def _encode(fields: Fields, work: Callable[[], T]) -> T:
    """`work` on the text of a body, in a thread where that is long."""
    return await asyncio.to_thread(work) if fields.num_bytes > _LONG_BYTES else work()


def create_app(
    engine: Engine, config: ServeConfig, model_name: str, version: str, parent: str | None = None
) -> FastAPI:
    """The application, whose `state.api` is its `Api`. Arguments and errors are of that."""
    api = Api(engine, config, model_name, version, parent)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        api.loop.start()
        yield
        await api.loop.stop()

    # The pages that FastAPI makes of types would load scripts from elsewhere, and bodies have no types here.
    app = FastAPI(title="dsv2", lifespan=lifespan, openapi_url=None)
    app.state.api = api
    app.add_api_route("/", api.page)
    app.add_api_route("/health", api.health)
    app.include_router(_guarded(api))
    _handle_errors(app)
    return app


def _guarded(api: Api) -> APIRouter:
    """What needs the key."""
    router = APIRouter(dependencies=[Depends(api.check_key)])
    router.add_api_route("/v1/models", api.models)
    router.add_api_route("/v1/models/{name:path}", api.model)
    router.add_api_route("/v1/completions", api.completions, methods=["POST"])
    router.add_api_route("/v1/chat/completions", api.chat_completions, methods=["POST"])
    router.add_api_route("/tokenize", api.tokenize, methods=["POST"])
    router.add_api_route("/detokenize", api.detokenize, methods=["POST"])
    router.add_api_route("/tokenizer_info", api.tokenizer_info)
    router.add_api_route("/version", api.show_version)
    router.add_api_route("/metrics", api.metrics)
    return router


def _handle_errors(app: FastAPI) -> None:
    def answer(kind: type[Exception], as_api_error: Callable[[Any], ApiError]) -> None:
        async def handle(_: Request, error: Exception) -> Response:
            said = as_api_error(error)
            return json_response(said.body, said.status, {"retry-after": "1"} if said.status in (429, 503) else None)

        app.add_exception_handler(kind, handle)

    async def drop(_: Request, __: Exception) -> Response:
        return Response(status_code=499)  # nginx's number for a client that left

    answer(ApiError, lambda error: error)
    answer(QueueFull, lambda error: ApiError(429, str(error), code="queue_full"))
    answer(EngineFailed, error_of)
    answer(EngineStopped, error_of)
    answer(HTTPException, lambda error: ApiError(error.status_code, str(error.detail)))
    answer(Exception, lambda _: ApiError(500, "the server failed", code="internal"))
    for kind in (ClientDisconnect, ClientGone):
        app.add_exception_handler(kind, drop)
