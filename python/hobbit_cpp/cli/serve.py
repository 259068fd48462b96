"""hobbit serve: an OpenAI-compatible server."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
from typing import Any

from .loading import load_with_progress
from .options import add_model_flags, check_model_flags, load_model
from .worker import Worker

__all__ = ["add_parser", "serve"]


def add_parser(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "serve",
        help="serve a model over HTTP, as OpenAI does",
        description="Serves /v1/chat/completions, /v1/completions, /v1/embeddings, /v1/models, /metrics and /health. "
        "Requests take turns in the order they come.",
    )
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine only)")
    group.add_argument("--port", metavar="N", type=_port, default=8000, help="default: 8000; 0: any that is free")
    group.add_argument("--api-key", metavar="KEY", help="ask for it as a bearer token (default: $HOBBIT_API_KEY, or none)")
    group.add_argument("-a", "--alias", metavar="NAME", help="name of the model in /v1/models (default: that of the file)")
    group.add_argument("--chat-format", metavar="NAME", help="of llama-cpp-python (default: the model's own template)")
    group.add_argument(
        "--embedding",
        action="store_true",
        help="answer /v1/embeddings, of texts up to -b tokens; takes 8 bytes x -b x vocabulary",
    )
    group.add_argument(
        "--pooling",
        choices=["mean", "cls", "last"],
        help="how the vectors of a text's tokens become one embedding (default: as the model says, or else mean)",
    )
    group.add_argument(
        "--logprobs", action="store_true", help="answer requests for logprobs; takes 8 bytes x (context + -b) x vocabulary"
    )
    add_model_flags(parser)
    parser.set_defaults(function=serve)


def serve(args: argparse.Namespace) -> int:
    """Loads, then serves until it is told to end."""
    check_model_flags(args)
    if args.pooling is not None and not args.embedding:
        raise ValueError("--pooling needs --embedding")
    listener = _listen(args.host, args.port)
    try:
        # Before the model: what the server takes is part of the budget.
        try:
            from hobbit_cpp.server import app
        except ModuleNotFoundError as e:
            raise ValueError(f"hobbit serve needs {e.name}, which is not installed: pip install 'hobbit-cpp[server]'") from e
        print(f"loading {args.model}", file=sys.stderr, flush=True)
        _check_chat_format(args.chat_format)

        def load(args: argparse.Namespace, **more: Any) -> Any:
            if args.embedding:
                more["pooling_type"] = _pooling(args)
            return load_model(args, chat_format=args.chat_format, embedding=args.embedding, logits_all=args.logprobs, **more)

        with contextlib.closing(Worker()) as worker:
            llm = load_with_progress(load, args, worker)
        try:
            name = args.alias or args.model.stem
            key = args.api_key or os.environ.get("HOBBIT_API_KEY") or None
            host, port = listener.getsockname()[:2]
            where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            app.serve(app.App(llm, name, key), listener, f"serving {name} at {where}/v1", args.verbose)
        finally:
            llm.close()
    finally:
        listener.close()
    return 0


def _pooling(args: argparse.Namespace) -> int:
    """A model that says nothing has an embedding for each token, which no client expects."""
    import llama_cpp

    from hobbit_cpp.convert.header import read_header

    if args.pooling is not None:
        return int(getattr(llama_cpp, f"LLAMA_POOLING_TYPE_{args.pooling.upper()}"))
    with open(args.model, "rb") as file:
        header = read_header(file, str(args.model), os.fstat(file.fileno()).st_size)
    said = header.integer(f"{header.string('general.architecture')}.pooling_type", llama_cpp.LLAMA_POOLING_TYPE_NONE)
    none = said == llama_cpp.LLAMA_POOLING_TYPE_NONE
    return int(llama_cpp.LLAMA_POOLING_TYPE_MEAN if none else llama_cpp.LLAMA_POOLING_TYPE_UNSPECIFIED)


def _check_chat_format(name: str | None) -> None:
    from llama_cpp import llama_chat_format

    if name is not None:
        try:
            llama_chat_format.get_chat_completion_handler(name)
        except llama_chat_format.LlamaChatCompletionHandlerNotFoundException:
            raise ValueError(f"llama-cpp-python has no chat format {name!r}") from None


def _port(text: str) -> int:
    n = int(text)
    if not 0 <= n <= 65535:
        raise argparse.ArgumentTypeError(f"{n} is not a port: 0 to 65535")
    return n


def _listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, so that a port in use is found out before the model is loaded."""
    out: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        out = socket.socket(family, kind, protocol)
        out.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        out.bind(address)
        return out
    except OSError as e:
        if out is not None:
            out.close()
        raise ValueError(f"cannot listen at {host}, port {port}: {getattr(e, 'strerror', None) or e}") from e
