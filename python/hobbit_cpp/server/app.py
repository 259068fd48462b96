"""llama-cpp-python's server over one `Llama` that is loaded already.

Routes, schemas and authentication are upstream's (llama_cpp.server.app, pinned). Added here:

- a request whose client goes away is cancelled, also while its prompt is processed or while it waits for its turn;
- requests take turns in the order they came; none interrupts another;
- what fails in the middle of a stream is told as an event, an error of ours as one line, not as a traceback, and a request
  that is wrong is answered with 400 and the reason;
- OpenAI's `response_format` of type json_schema, which upstream knows under another name;
- /metrics, /health, and a /v1/models that does not wait for a running answer.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

import anyio
import llama_cpp.server.app
import llama_cpp.server.errors
import llama_cpp.server.model
import llama_cpp.server.settings
import numpy as np
import uvicorn
from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool

from .._calls import OWNER, Owner
from ..errors import EvaluationCancelled, HobbitError, StateError
from ..llama import Llama
from .metrics import CONTENT_TYPE, Requests, render
from .requests import ChatRequest, CompletionRequest, EmbeddingRequest
from .usage import USAGE, Usage, counted

__all__ = ["App", "serve"]

upstream: Any = llama_cpp.server.app
upstream_settings: Any = llama_cpp.server.settings
_Proxy: Any = llama_cpp.server.model.LlamaProxy
_ErrorHandler: Any = llama_cpp.server.errors.RouteErrorHandler
_upstream_error_message = _ErrorHandler.error_message_wrapper

CLIENT_CLOSED_REQUEST = 499  # nginx's number; nobody is there to read it
SHUTTING_DOWN = 503
# How long a running answer may take to end after Ctrl-C; it is cancelled, so this is for what hangs.
_SHUTDOWN_SECONDS = 10
# Of a request, whose text and tokens no budget knows of: what a context can take; several texts to embed go one after another.
_BYTES, _BYTES_A_TOKEN, _EMBEDDED_BYTES = 64 << 10, 64, 8 << 20


def _plain(value: Any) -> Any:
    """Without numpy's numbers, which upstream leaves in logprobs."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value


class App:
    """The ASGI application.

    Args:
        llm: the model, loaded.
        name: what /v1/models calls it.
        api_key: None: everybody may ask.
    """

    def __init__(self, llm: Llama, name: str, api_key: str | None = None) -> None:
        self._llm = llm
        llm.model_path = name  # what answers say when the request names no model
        llm.generate = counted(llm)  # type: ignore[method-assign]
        self._requests = Requests()
        self._owners: set[Owner] = set()
        self._stopping = False
        self._app = _upstream_app(llm, name, api_key)
        self._app.router.routes[:0] = self._routes(name).routes

    def _routes(self, name: str) -> APIRouter:
        router = APIRouter(route_class=_ErrorHandler)
        protected = [Depends(upstream.authenticate)]

        @router.get("/v1/models", dependencies=protected)
        async def models() -> Any:
            return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "me", "permissions": []}]}

        @router.post("/v1/chat/completions", dependencies=protected, response_model=None)
        async def chat(request: Request, body: ChatRequest) -> Any:
            return _plain(await upstream.create_chat_completion(request, body))

        @router.post("/v1/completions", dependencies=protected, response_model=None)
        @router.post("/v1/engines/copilot-codex/completions", dependencies=protected, response_model=None)
        async def completion(request: Request, body: CompletionRequest) -> Any:
            return _plain(await upstream.create_completion(request, body))

        @router.post("/v1/embeddings", dependencies=protected, response_model=None)
        async def embeddings(body: EmbeddingRequest) -> Any:
            texts = [body.input] if isinstance(body.input, str) else body.input
            return await run_in_threadpool(self._embed, texts, body.encoding_format)

        @router.get("/metrics", dependencies=protected)
        async def metrics() -> Any:
            try:
                stats = self._llm.offload_stats()
            except StateError:  # without offload
                stats = None
            return Response(render(self._requests, stats), headers={"Content-Type": CONTENT_TYPE})

        @router.get("/health")
        async def health() -> Any:
            return {"status": "ok"}

        return router

    def _embed(self, texts: list[str], encoding_format: str) -> Any:
        """Upstream cuts a text at the batch, and says nothing."""
        most = self._llm.n_batch
        for text in texts if self._llm.context_params.embeddings else ():  # else upstream refuses them all
            data = text.encode("utf-8")
            if len(data) > _BYTES_A_TOKEN * most or len(self._llm.tokenize(data)) > most:
                raise ValueError(f"a text is longer than a batch of {most} tokens (-b)")
        answer: Any = self._llm.create_embedding(texts)
        if encoding_format == "base64":
            for data in answer["data"]:
                data["embedding"] = base64.b64encode(np.asarray(data["embedding"], "<f4").tobytes()).decode()
        return answer

    def _limit(self, path: str) -> tuple[int, str]:
        """Bytes of a request, and what is said of more."""
        n_ctx = self._llm.n_ctx()
        of_context = _BYTES + _BYTES_A_TOKEN * n_ctx
        if not path.endswith("embeddings"):
            return of_context, f"a request of more than {of_context} bytes is more than a context of {n_ctx} tokens takes"
        most = max(of_context, _EMBEDDED_BYTES)
        return most, f"a request of more than {most} bytes: send fewer texts at once"

    def stop(self) -> None:
        """Cancels what runs and what waits. From any thread or signal handler."""
        self._stopping = True
        for owner in list(self._owners):
            self._llm._calls.cancel(owner)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most, why = self._limit(scope["path"])
        owner = Owner()
        read, gone = asyncio.Event(), asyncio.Event()  # the whole body was read; the client went away
        code, answered = 0, False

        n_body = 0

        async def receive_body() -> Any:
            nonlocal n_body
            if not read.is_set():
                message = await receive()
                if message["type"] == "http.disconnect":
                    gone.set()
                n_body += len(message.get("body") or b"")
                if n_body > most:
                    await _drop_rest(message, receive)
                    read.set()
                    raise _TooLarge(why)
                if gone.is_set() or not message.get("more_body"):
                    read.set()
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            await read.wait()
            while not gone.is_set():
                if (await receive())["type"] == "http.disconnect":
                    if answered:  # which is reported in the same way
                        return
                    gone.set()
            self._llm._calls.cancel(owner)

        async def send_counted(message: Any) -> None:
            nonlocal code, answered
            if message["type"] == "http.response.start":
                code = message["status"]
            answered = message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        token = OWNER.set(owner)
        self._owners.add(owner)
        if self._stopping:
            self._llm._calls.cancel(owner)
        self._requests.running += 1
        watcher = asyncio.create_task(watch())
        try:
            await self._app(scope, receive_body, send_counted)
        except Exception:
            if not gone.is_set():
                raise
        finally:
            code = CLIENT_CLOSED_REQUEST if gone.is_set() else code
            watcher.cancel()
            self._requests.running -= 1
            self._requests.by_code[code] = self._requests.by_code.get(code, 0) + 1
            self._owners.discard(owner)
            OWNER.reset(token)


def _upstream_app(llm: Llama, name: str, api_key: str | None) -> Any:
    class Proxy(_Proxy):  # type: ignore[misc]
        @staticmethod
        def load_llama_from_model_settings(settings: Any) -> Any:
            return llm

    upstream.LlamaProxy = Proxy
    upstream.get_event_publisher = _publish
    _ErrorHandler.error_message_wrapper = _error_message
    # Settings are built without looking at the environment, where PORT or API_KEY may mean something else.
    os.environ.pop("CONFIG_FILE", None)
    server = upstream_settings.ServerSettings.model_construct(api_key=api_key, interrupt_requests=False)
    model = upstream_settings.ModelSettings.model_construct(model=name, model_alias=name)
    app = upstream.create_app(server_settings=server, model_settings=[model])
    app.add_exception_handler(json.JSONDecodeError, _not_json)
    app.add_exception_handler(RecursionError, _not_json)
    app.add_exception_handler(_TooLarge, _too_large)
    return app


class _TooLarge(HTTPException):
    def __init__(self, why: str) -> None:
        super().__init__(413, why)


async def _too_large(request: Request, error: Exception) -> Any:
    assert isinstance(error, _TooLarge)
    return JSONResponse({"error": _error("invalid_request_error", error.detail)}, error.status_code)


async def _drop_rest(message: Any, receive: Any) -> None:
    """Of a body: who is still sending does not hear an answer."""
    while message.get("more_body"):
        message = await receive()


async def _not_json(request: Request, error: Exception) -> Any:
    return JSONResponse({"error": _error("invalid_request_error", f"the request is not JSON: {error}")}, 400)


def _error_message(self: Any, error: Exception, body: Any = None) -> tuple[int, Any]:
    """Status and OpenAI's error object for what a request raised."""
    known = any(pattern.search(str(error)) for pattern in _ErrorHandler.pattern_and_formatters)
    kind = "internal_server_error"
    if isinstance(error, EvaluationCancelled):
        code = SHUTTING_DOWN
    elif isinstance(error, HobbitError):
        code = 500
        print(f"hobbit: {' '.join(str(error).split())}", file=sys.stderr)
    elif "embedding=True" in str(error):
        return 400, _error("invalid_request_error", "this server gives no embeddings: start it with --embedding")
    elif "logits_all=False" in str(error):
        return 400, _error("invalid_request_error", "this server gives no logprobs: start it with --logprobs")
    elif isinstance(error, RequestValidationError):
        reasons = (f"{'.'.join(str(at) for at in e['loc'] if at != 'body')}: {e['msg']}".lstrip(": ") for e in error.errors())
        return 400, _error("invalid_request_error", "; ".join(reasons))
    elif isinstance(error, (AssertionError, RecursionError)):
        return 400, _error("invalid_request_error", f"the server cannot do what is asked: {error or type(error).__name__}")
    elif isinstance(error, ValueError) and not known:
        code, kind = 400, "invalid_request_error"
    else:
        code, out = _upstream_error_message(self, error, body)
        return code, out
    return code, _error(kind, str(error))


def _error(kind: str, message: str) -> dict[str, Any]:
    return {"message": message, "type": kind, "param": None, "code": None}


async def _publish(
    request: Any, inner_send_chan: Any, body: Any, body_model: Any, llama_call: Any, kwargs: dict[str, Any]
) -> None:
    """A stream: chunks as events, [DONE] at the end. An error is an event, since the response has begun."""
    async with contextlib.asynccontextmanager(upstream.get_llama_proxy)() as proxy, inner_send_chan:
        iterator: Any = None
        usage = Usage()
        USAGE.set(usage)  # the request has a context of its own
        try:
            llm = upstream.prepare_request_resources(body, proxy, body_model, kwargs)
            iterator = await run_in_threadpool(llama_call, llm, **kwargs)
            async for chunk in iterate_in_threadpool(iterator):
                await inner_send_chan.send({"data": json.dumps(chunk)})
            if body.stream_options is not None and body.stream_options.include_usage:
                about = {key: value for key, value in chunk.items() if key != "choices"}
                await inner_send_chan.send({"data": json.dumps({**about, "choices": [], "usage": usage.as_openai_has_it()})})
        except anyio.get_cancelled_exc_class():
            raise
        except Exception as e:
            if await request.is_disconnected():
                return
            _, error = _error_message(_ErrorHandler, e, body)
            await inner_send_chan.send({"data": json.dumps({"error": error})})
        finally:
            if iterator is not None:
                iterator.close()
        await inner_send_chan.send({"data": "[DONE]"})


class _Server(uvicorn.Server):
    """uvicorn, but a signal cancels what runs, and is not raised again when all has ended."""

    def __init__(self, config: uvicorn.Config, app: App, greeting: str) -> None:
        super().__init__(config)
        self._hobbit = app
        self._greeting = greeting

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(self._greeting, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        def stop(number: int, frame: Any) -> None:
            self.handle_exit(number, frame)
            self._hobbit.stop()

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def serve(app: App, listener: socket.socket, greeting: str, verbose: bool = False) -> None:
    """Serves until SIGINT or SIGTERM. `greeting` is printed to stderr when requests are taken."""
    config = uvicorn.Config(
        app,
        log_level="info" if verbose else "warning",
        access_log=verbose,
        lifespan="off",
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
    )
    _Server(config, app, greeting).run(sockets=[listener])
