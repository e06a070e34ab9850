"""The HTTP side: routes, limits, refusals, the access log, and uvicorn."""

import asyncio
import hmac
import ipaddress
import re
import secrets
import socket
import sys
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_lora.errors import InputError
from mlx_lora.server import protocol
from mlx_lora.server.protocol import ApiError, ChatRequest, Envelope, Sampled, TextRequest
from mlx_lora.server.worker import Answer, Job, Worker

REQUESTS = 256  # at once; more are refused
CONNECTIONS = REQUESTS + 32  # more are cut off unheard, before the process runs out of files (mlx-lm allows it 2048)
HEADER_SECONDS = 10  # from a connection, or the answer before, to the end of a request's headers
BODY_SECONDS = 60
READ_SECONDS = 60  # in which a client must take what is written for it
GRACE_SECONDS = 5  # in which what is written may reach the clients when the server stops


@dataclass(frozen=True)
class Settings:
    """What is served and what a client may ask for."""

    base: str  # its name
    adapters: list[str]  # their names
    max_tokens: int  # in one answer
    max_body: int  # bytes
    api_key: str | None
    hosts: frozenset[str] | None  # names by which clients may call the server; None: any


def chosen(model: str, settings: Settings) -> Mapping[str, float] | str | None:
    """What a request's `model` stands for, as LiveAdapters.use takes it: None for the base, an adapter's name, or the
    weights of a blend, written NAME:WEIGHT+NAME:WEIGHT. Raises ApiError (404)."""
    if model in (settings.base, "base"):
        return None
    if model in settings.adapters:
        return model
    parts = [re.fullmatch(r"(.+):(-?\d{1,2}(?:\.\d{1,12})?)", part, re.ASCII) for part in model.split("+")]
    weights = {part[1]: float(part[2]) for part in parts if part and part[1] in settings.adapters}
    if len(weights) < len(parts):
        known = ", ".join([settings.base, *settings.adapters])
        raise ApiError(404, f"there is no model {model!r}; there are: {known}", "model", "model_not_found")
    return weights


class Completions:
    """The route of chats, or of texts."""

    def __init__(self, worker: Worker, settings: Settings, kind: type[Sampled]) -> None:
        self._worker, self._settings, self._kind = worker, settings, kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await self._body(Request(scope, receive))
        except ClientDisconnect:
            return
        request = protocol.parse(self._kind, body)
        await _while_connected(receive, self._respond(request, scope, receive, send))

    async def _body(self, request: Request) -> bytes:
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            # A web page can send other types to any server without asking it first.
            raise ApiError(415, "the Content-Type is not application/json")
        too_large = ApiError(413, f"the body is larger than {self._settings.max_body} bytes")
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._settings.max_body:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    body += part
                    if len(body) > self._settings.max_body:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {BODY_SECONDS} seconds") from None
        return bytes(body)

    async def _respond(self, request: Sampled, scope: Scope, receive: Receive, send: Send) -> None:
        adapter = chosen(request.model, self._settings)
        log = scope["state"]["log"]
        log["model"] = request.model
        with self._worker.waiting():
            prompt = await self._worker.encode(request.tokens)
            log["prompt"] = len(prompt)
            answer = await self._worker.start(self._job(request, adapter, prompt))
        try:
            if request.stream:
                await self._stream(request, answer, log, send)
                return
            text = []
            async for piece in answer.pieces():
                text.append(piece.text)
                log["generated"] = piece.tokens
            assert piece.finish
            body = Envelope(request).whole("".join(text), piece.finish, len(prompt), piece.tokens)
            await JSONResponse(body)(scope, receive, send)
        finally:
            answer.cancel()

    def _job(self, request: Sampled, adapter: Mapping[str, float] | str | None, prompt: list[int]) -> Job:
        if not prompt:
            raise ApiError(400, "the prompt is empty", "prompt")
        most, context = self._settings.max_tokens, self._worker.context
        asked = request.limit()
        if asked is not None and asked > most:
            raise ApiError(400, f"max_tokens: {asked} is more than the {most} that this server allows", "max_tokens")
        room = most if context is None else context - len(prompt)
        if room < (asked or 1):
            raise ApiError(
                400,
                f"the model's context is {context} tokens: the prompt has {len(prompt)}, the answer may have "
                f"{asked or 'any number'}",
                "prompt" if room < 1 else "max_tokens",
                "context_length_exceeded",
            )
        return Job(
            adapter=adapter,
            prompt=prompt,
            max_tokens=min(most, room) if asked is None else asked,
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=secrets.randbits(64) if request.seed is None else request.seed,
            frequency_penalty=request.frequency_penalty or 0.0,
            presence_penalty=request.presence_penalty or 0.0,
            stop=request.stop or [],
        )

    async def _stream(self, request: Sampled, answer: Answer, log: dict[str, Any], send: Send) -> None:
        envelope = Envelope(request)
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def write(events: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": events, "more_body": more})

        try:
            await write(envelope.start())
            async for piece in answer.pieces():
                log["generated"] = piece.tokens
                events = envelope.event(piece.text, None) if piece.text else b""
                await write(events + (envelope.event(None, piece.finish) if piece.finish else b""))
            await write(envelope.end(log["prompt"], log["generated"]), more=False)
        except Exception as error:
            failure = error if isinstance(error, ApiError) else _FAILURE
            await write(protocol.event(failure.body()), more=False)
            if failure is _FAILURE:
                raise


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Does the work, and cancels it when the client goes away."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
    try:
        await tasks[0]
    except asyncio.CancelledError:
        if not tasks[1].done():
            raise


class Gate:
    """Around every request: who may ask, and one line in the log."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        log: dict[str, Any] = {}
        scope.setdefault("state", {})["log"] = log
        status = "gone"

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._running += 1
        try:
            refusal = self._refusal(Request(scope))
            await (self._app if refusal is None else error_response(refusal))(scope, receive, noting)
        finally:
            self._running -= 1
            words = [scope["method"], scope["raw_path"].decode("latin-1")[:200], str(status)]
            words += [f"{name}={value}" for name, value in log.items()]
            print(*words, f"{time.perf_counter() - started:.2f}s", file=sys.stderr, flush=True)

    def _refusal(self, request: Request) -> ApiError | None:
        if self._running > REQUESTS:
            return ApiError(503, f"{REQUESTS} requests are open already; try again later", code="overloaded")
        name = re.sub(r":\d*$", "", request.headers.get("host", "")).lower()
        if self._settings.hosts is not None and name not in self._settings.hosts:
            # A web page reaches a loopback server by a name of its own that it points at 127.0.0.1 (DNS rebinding).
            return ApiError(403, f"this server does not go by the name {name!r}")
        key = self._settings.api_key
        given = request.headers.get("authorization", "")
        if not key or request.url.path == "/health" or hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
            return None
        return ApiError(401, "the API key is missing or wrong", code="invalid_api_key")


_FAILURE = ApiError(500, "the server failed; its log says how")


def error_response(error: ApiError, headers: dict[str, str] | None = None) -> JSONResponse:
    extra = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(error.status, {})
    return JSONResponse(error.body(), error.status, {**extra, **(headers or {})})


def _on_error(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, ApiError):
        return error_response(error)
    if isinstance(error, InputError):
        return error_response(ApiError(400, str(error)))
    if isinstance(error, HTTPException):
        where = f"{request.method} {request.url.path}"
        reason = {404: "there is no such route", 405: "the route has other methods"}.get(
            error.status_code, error.detail
        )
        return error_response(ApiError(error.status_code, f"{where}: {reason}"), dict(error.headers or {}))
    return error_response(_FAILURE)


def application(worker: Worker, settings: Settings) -> ASGIApp:
    created = int(time.time())
    models = {
        name: {"id": name, "object": "model", "created": created, "owned_by": "mlx_lora"}
        for name in [settings.base, *settings.adapters]
    }

    async def listed(_: Request) -> JSONResponse:
        return JSONResponse({"object": "list", "data": list(models.values())})

    async def one(request: Request) -> JSONResponse:
        name = request.path_params["name"]
        if name not in models:
            raise ApiError(404, f"there is no model {name!r}", "model", "model_not_found")
        return JSONResponse(models[name])

    async def health(_: Request) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    kinds = (ApiError, InputError, HTTPException, Exception)
    routes = [
        Route("/v1/chat/completions", Completions(worker, settings, ChatRequest), methods=["POST"]),
        Route("/v1/completions", Completions(worker, settings, TextRequest), methods=["POST"]),
        Route("/v1/models", listed),
        Route("/v1/models/{name:path}", one),
        Route("/health", health),
    ]
    return Gate(Starlette(routes=routes, exception_handlers=dict.fromkeys(kinds, _on_error)), settings)


# ---- uvicorn ---------------------------------------------------------------------------------------------------------


def listen(host: str, port: int) -> socket.socket:
    """A socket on the address. Raises InputError where there is no such address or it is taken."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        raise InputError(f"--host {host} --port {port}: {getattr(error, 'strerror', None) or error}") from None
    return listener


def hosts(listener: socket.socket) -> frozenset[str] | None:
    """The names for a loopback address; None for any other, which may have any name."""
    host = listener.getsockname()[0]
    address = ipaddress.ip_address(host)
    address = getattr(address, "ipv4_mapped", None) or address
    return frozenset({"localhost", "127.0.0.1", "[::1]", host, f"[{host}]"}) if address.is_loopback else None


class _Connection(H11Protocol):
    """uvicorn's, with an end to waiting: its own timer runs between requests only."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if len(self.connections) >= CONNECTIONS:
            self.transport = transport
            transport.abort()
            return
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # so that writing is paused until everything is taken
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def data_received(self, data: bytes) -> None:
        # As uvicorn's, but the timer goes on until handle_events has a whole request.
        self.conn.receive_data(data)
        self.handle_events()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:  # the request was answered, or is being, before its body went wrong
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread.cancel()

    def shutdown(self) -> None:
        super().shutdown()
        if self.cycle is not None and self.cycle.more_body:  # a request that has not arrived
            self.transport.close()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self._worker = worker

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            host, port = listener.getsockname()[:2]
            print(f"serving on http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._worker.stop()
        asyncio.get_running_loop().call_later(GRACE_SECONDS, self._cut_off)
        await super().shutdown(sockets)

    def _cut_off(self) -> None:
        for connection in list(self.server_state.connections):
            assert isinstance(connection, _Connection)
            connection.transport.abort()


def run(worker: Worker, settings: Settings, listener: socket.socket) -> None:
    """Serves until SIGINT or SIGTERM, which takes effect when the clients have heard of it."""
    config = uvicorn.Config(
        application(worker, settings),
        http=_Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=CONNECTIONS,  # asyncio accepts as many in one go, before it asks about any
        timeout_keep_alive=HEADER_SECONDS,
    )
    _Server(config, worker).run(sockets=[listener])
