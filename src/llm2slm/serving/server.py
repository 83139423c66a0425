"""An OpenAI-compatible server of one checkpoint on one machine.

Choices made here:
- Starlette and uvicorn. LitServe 0.2.19, which has batching and OpenAI's chat, was tried: it goes on with requests
  whose client has left, has no `/v1/completions`, calls a response that was cut finished, answers bad requests in
  another shape, and keeps the model in a process of its own. (Its source shows no telemetry.) What FastAPI adds to
  Starlette is one line here.
- The event loop reads requests and answers them, threads tokenize, and one thread works the model
  ([`~llm2slm.serving.batching.Batcher`]).
- Content types other than JSON are refused: a page of another site can send those without asking.
"""

import asyncio
import base64
import hmac
import ipaddress
import json
import logging
import signal
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import numpy as np
import uvicorn
from anyio.to_thread import run_sync
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic_core import to_json
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from .batching import Written
from .requests import ChatRequest, CompletionRequest, EncodingRequest, GenerationRequest, RequestError, parse
from .service import ClientLeft, Job, Service

logger = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]
KEEP_ALIVE_SECONDS = 65  # longer than clients keep a connection they do not use
MAX_FLOAT16 = 65504
NO_NAMES = (None, "dummy", "tgi")  # what clients send that name no model: `InferenceClient`, and its documentation
ROWS = 6  # of a prompt's embeddings that are written at a time; base64 pads none, as their bytes are a multiple of 3
UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies pass on each part of a stream at once
SHUTDOWN_SECONDS = 5  # for the last answer's way to its client


# ------------------------------------------------------------------------------------------------- the answers' shapes
class Completions:
    """The JSON of `/v1/completions`."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    @staticmethod
    def choice(index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        """A whole response."""
        return {"index": index, "text": text, "finish_reason": finish_reason, "logprobs": None}

    @staticmethod
    def part(index: int, text: str, finish_reason: str | None, first: bool) -> dict[str, Any]:
        """Some more of a response."""
        return Completions.choice(index, text, finish_reason)


class Chats:
    """The JSON of `/v1/chat/completions`."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    @staticmethod
    def choice(index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        """A whole message."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "finish_reason": finish_reason, "logprobs": None}

    @staticmethod
    def part(index: int, text: str, finish_reason: str | None, first: bool) -> dict[str, Any]:
        """Some more of a message."""
        delta = ({"role": "assistant"} if first else {}) | {"content": text}
        return {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": None}


Shape = type[Completions] | type[Chats]


def _embeddings(answer: dict[str, Any], arrays: Sequence[np.ndarray], as_text: bool) -> Iterator[bytes]:
    """The JSON of `/v1/prompt_embeddings`, a few rows at a time: the server answers others in between."""
    yield to_json(answer)[:-1] + b',"data":['
    for index, array in enumerate(arrays):  # (prompt_length, slm_hidden_size)
        item = {"object": "prompt_embedding", "index": index, "shape": array.shape}
        yield (b"," if index else b"") + to_json(item)[:-1] + (b',"embedding":"' if as_text else b',"embedding":[')
        for start in range(0, len(array), ROWS):
            rows = array[start : start + ROWS]
            if as_text:
                yield base64.b64encode(rows.tobytes())
            else:
                yield (b"," if start else b"") + to_json(rows.tolist())[1:-1]
        yield b'"}' if as_text else b"]}"
    yield b"]}"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"  # in ASCII: clients end lines at U+2028 and the like too


# ---------------------------------------------------------------------------------------------------------- the server
class Server:
    r"""
    The HTTP side of a [`Service`].

    Args:
        service ([`Service`]): What answers.
        name (`str`): What clients call the model.
        api_key (`str`, *optional*): What clients must send to use `/v1/...`.
        origins (`Sequence[str]`, *optional*): The sites whose pages may use it, such as `https://example.org`.
        hosts (`Sequence[str]`, *optional*): The names by which it may be asked, from [`own_names`]; any if none.
    """

    def __init__(
        self,
        service: Service,
        name: str,
        api_key: str | None = None,
        origins: Sequence[str] = (),
        hosts: Sequence[str] = (),
    ):
        self.service, self.name, self.api_key = service, name, api_key
        self.created = int(time.time())
        routes = [
            Route("/v1/completions", self._endpoint(self.complete), methods=["POST"]),
            Route("/v1/chat/completions", self._endpoint(self.chat), methods=["POST"]),
            Route("/v1/prompt_embeddings", self._endpoint(self.encode), methods=["POST"]),
            Route("/v1/models", self._endpoint(self.models)),
            Route("/v1/models/{name:path}", self._endpoint(self.model)),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
        ]
        trusted = Middleware(TrustedHostMiddleware, allowed_hosts=hosts)
        cors = Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
        self.app = Starlette(
            routes=routes,
            middleware=[*([trusted] if hosts else []), *([cors] if origins else [])],
            exception_handlers={HTTPException: self._unknown_path},
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        await run_sync(self.service.batcher.close)

    async def _unknown_path(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        refused = RequestError(error.status_code, f"{request.method} {request.url.path}: {error.detail}.")
        return JSONResponse(refused.body, refused.status, error.headers)

    def _endpoint(self, handler: Handler) -> Handler:
        """A handler for those who know the key, whose errors have OpenAI's shape, and whose answers are counted."""

        async def answer(request: Request) -> Response:
            begun = time.monotonic()
            try:
                self._check_key(request)
                response = await handler(request)
            except RequestError as refused:
                response = JSONResponse(refused.body, refused.status, refused.headers)
            except Exception:
                logger.exception("%s failed.", request.url.path)
                failed = RequestError(500, "The server could not answer this request.")
                response = JSONResponse(failed.body, failed.status)
            path = request.scope["route"].path
            self.service.metrics.requests.labels(path, response.status_code).inc()
            if not isinstance(response, StreamingResponse):
                self.service.metrics.request_seconds.observe(time.monotonic() - begun)
            return response

        return answer

    def _check_key(self, request: Request) -> None:
        if self.api_key is None:
            return
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self.api_key}".encode()):
            raise RequestError(401, "The API key is missing or wrong.", code="invalid_api_key")

    # -------------------------------------------------------------------------------------------------------- requests
    async def _read(self, request: Request, kind: type) -> Any:
        """What is asked for."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError(415, "The content type must be application/json.")
        limits = self.service.limits
        too_large = RequestError(413, f"A request may have {limits.body_bytes} bytes at most.")
        stated = request.headers.get("content-length", "")
        if stated.isdecimal() and int(stated) > limits.body_bytes:
            raise too_large
        body = bytearray()
        try:
            with anyio.fail_after(limits.seconds):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limits.body_bytes:
                        raise too_large
        except TimeoutError:
            raise RequestError(408, "The request came too slowly.", code="timeout") from None
        except ClientDisconnect:
            raise ClientLeft from None
        asked: Any = parse(kind, bytes(body))
        if asked.model not in NO_NAMES:
            self._check_model(asked.model)
        return asked

    def _check_model(self, name: str) -> None:
        if name != self.name:
            raise RequestError(404, f"There is no model {name!r}, only {self.name!r}.", "model", "model_not_found")

    async def _watch(self, request: Request, job: Job) -> None:
        """Gives up a request whose client leaves."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.service.metrics.clients_left.inc()
        job.stop(ClientLeft())

    # --------------------------------------------------------------------------------------------------------- answers
    async def complete(self, request: Request) -> Response:
        """`POST /v1/completions`."""
        asked = await self._read(request, CompletionRequest)
        prompts = await run_sync(self.service.tokenize, asked.prompt)
        return await self._answer(request, asked, prompts, Completions)

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        asked = await self._read(request, ChatRequest)
        prompt = await run_sync(self.service.tokenize_chat, asked.messages)
        return await self._answer(request, asked, [prompt], Chats)

    async def _answer(
        self, request: Request, asked: GenerationRequest, prompts: list[list[int]], shape: Shape
    ) -> Response:
        job = self.service.write(asked, prompts)
        watch = asyncio.create_task(self._watch(request, job))
        head = {"id": f"{shape.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
        news, streams = job.news(), False
        try:
            first = await anext(news)  # what fails before it has an HTTP status of its own
            if asked.stream:
                streams = True
                events = self._events(asked, prompts, job, watch, first, news, head, shape)
                return StreamingResponse(events, headers=UNBUFFERED, media_type="text/event-stream")
            written = dict([first, *[one async for one in news]])
        finally:
            if not streams:
                watch.cancel()
                job.leave()
        choices = [shape.choice(i, written[i].text, written[i].finish_reason) for i in sorted(written)]
        usage = self._usage(prompts, [one.num_tokens for one in written.values()])
        return JSONResponse({**head, "object": shape.whole, "choices": choices, "usage": usage})

    async def _events(
        self,
        asked: GenerationRequest,
        prompts: list[list[int]],
        job: Job,
        watch: asyncio.Task,
        first: tuple[int, Written],
        news: AsyncIterator[tuple[int, Written]],
        head: dict[str, Any],
        shape: Shape,
    ) -> AsyncIterator[str]:
        head = {**head, "object": shape.chunk}
        num_tokens: dict[int, int] = {}
        try:
            index, written = first
            while True:
                part = shape.part(index, written.text, written.finish_reason, first=index not in num_tokens)
                num_tokens[index] = written.num_tokens
                yield _event({**head, "choices": [part]})
                try:
                    index, written = await anext(news)
                except StopAsyncIteration:
                    break
            usage = self._usage(prompts, num_tokens.values())
            if asked.stream_options is not None and asked.stream_options.include_usage:
                yield _event({**head, "choices": [], "usage": usage})
            yield "data: [DONE]\n\n"
            self.service.metrics.request_seconds.observe(time.monotonic() - job.waiting[0].came)
        except RequestError as error:
            yield _event(error.body)
        finally:
            watch.cancel()
            job.leave()

    def _usage(self, prompts: list[list[int]], response_tokens) -> dict[str, int]:
        prompt_tokens, completion_tokens = sum(map(len, prompts)), sum(response_tokens)
        self.service.metrics.prompt_tokens.inc(prompt_tokens)
        self.service.metrics.response_tokens.inc(completion_tokens)
        total = prompt_tokens + completion_tokens
        return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}

    async def encode(self, request: Request) -> Response:
        """`POST /v1/prompt_embeddings`: what the SLM reads of each prompt, as floats of 32 or 16 bits."""
        asked = await self._read(request, EncodingRequest)
        prompts = await run_sync(self.service.tokenize, asked.prompt)
        job = self.service.encode(prompts)
        watch = asyncio.create_task(self._watch(request, job))
        try:
            states = dict([one async for one in job.news()])
        finally:
            watch.cancel()
            job.leave()

        def as_asked() -> list[np.ndarray]:
            arrays = [states[index].numpy() for index in sorted(states)]
            if asked.dtype == "float16" and any(abs(array).max() > MAX_FLOAT16 for array in arrays):
                raise RequestError(400, "Some numbers are too large for float16: ask for float32.", "dtype")
            return [array.astype("<f2" if asked.dtype == "float16" else "<f4", copy=False) for array in arrays]

        arrays = await run_sync(as_asked)

        def content() -> Iterator[bytes]:
            answer = {"object": "list", "model": self.name, "usage": self._usage(prompts, [])}
            yield from _embeddings(answer, arrays, asked.encoding_format == "base64")
            self.service.metrics.request_seconds.observe(time.monotonic() - job.waiting[0].came)

        return StreamingResponse(content(), media_type="application/json")

    # ------------------------------------------------------------------------------------------------ about the server
    def _card(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "llm2slm"}

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`."""
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        """`GET /v1/models/NAME`."""
        self._check_model(request.path_params["name"])
        return JSONResponse(self._card())

    async def health(self, request: Request) -> Response:
        """`GET /health`: 200 while prompts are answered."""
        alive = self.service.batcher.alive
        return JSONResponse({"status": "ok" if alive else "stopping"}, 200 if alive else 503)

    async def metrics(self, request: Request) -> Response:
        """`GET /metrics`, for Prometheus."""
        return Response(self.service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


# ------------------------------------------------------------------------------------------------------------- running
def listen(host: str, port: int) -> socket.socket:
    """
    A socket that listens there; at any free port with 0.

    Raises:
        OSError: if there is no such address here, or it is in use.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        raise OSError(f"Cannot listen at {host}, port {port}: {error}.") from error


def own_names(listening: socket.socket, host: str) -> list[str]:
    """
    The names of this machine by which it can be asked at a socket that only this machine reaches: a page whose site
    gives its own name the address 127.0.0.1 (DNS rebinding) asks by that name. None if others reach the socket.
    """
    if not ipaddress.ip_address(listening.getsockname()[0]).is_loopback:
        return []
    return ["localhost", "127.0.0.1", "[::1]", "[", host]  # "[" is what Starlette before 1 sees of "[::1]:8000"


def run(server: Server, listening: socket.socket) -> None:
    """
    Serves until SIGTERM or SIGINT (Ctrl-C): then takes nothing new, finishes what it began, and ends.

    Raises:
        KeyboardInterrupt: after SIGINT, when all is finished.
    """
    config = uvicorn.Config(
        server.app,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(server.service.limits.seconds) + SHUTDOWN_SECONDS,
    )
    host, port = listening.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    print(f"Serving {server.name} at http://{host}:{port}/v1", file=sys.stderr, flush=True)
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises what stopped it once more at its end
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, before)
