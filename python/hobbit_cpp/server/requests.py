"""What clients ask for, as OpenAI has it: translated into what upstream knows, or refused with the reason."""

from __future__ import annotations

import json
from typing import Any, Literal, Optional

import llama_cpp.llama_grammar
import llama_cpp.server.types
import pydantic

from hobbit_cpp._arguments import check_depth

__all__ = ["ChatRequest", "CompletionRequest", "EmbeddingRequest", "StreamOptions"]

_ChatRequest: Any = llama_cpp.server.types.CreateChatCompletionRequest
_CompletionRequest: Any = llama_cpp.server.types.CreateCompletionRequest
_EmbeddingRequest: Any = llama_cpp.server.types.CreateEmbeddingRequest


class StreamOptions(pydantic.BaseModel):
    """As OpenAI has them."""

    include_usage: bool = False


class _Asked(pydantic.BaseModel):
    """What both kinds of completions have beside upstream's fields. `stream_options` is not handed on to the model."""

    stream_options: Optional[StreamOptions] = pydantic.Field(None, exclude=True)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _as_openai_has_it(cls, data: Any) -> Any:
        return cls._translated(data) if isinstance(data, dict) else data  # what is no object is told

    @classmethod
    def _translated(cls, data: dict[str, Any]) -> dict[str, Any]:
        """As upstream takes it. ValueError: what it would ignore, or fail at."""
        for name in ("n", "best_of"):
            if data.get(name) not in (None, 1):
                raise ValueError(f"{name} must be 1: a request has one answer")
        stop = data.get("stop")
        if "" in (stop if isinstance(stop, list) else [stop]):
            raise ValueError("stop: an empty text would end every answer before it begins")
        most = data.get("max_tokens")
        if isinstance(most, (int, float)) and most < 1 and most != -1:
            raise ValueError("max_tokens must be at least 1")
        return data


class ChatRequest(_Asked, _ChatRequest):  # type: ignore[misc]
    """Takes what upstream knows under another name, as OpenAI has it, and refuses what it would ignore.

    {"type": "json_schema", "json_schema": {"schema": ...}} is its json_object with a schema; max_completion_tokens is max_tokens;
    logprobs without top_logprobs are those of the tokens alone.
    """

    @classmethod
    def _translated(cls, data: dict[str, Any]) -> dict[str, Any]:
        if data.get("max_tokens") is None and data.get("max_completion_tokens") is not None:
            data = {**data, "max_tokens": data["max_completion_tokens"]}
        if data.get("logprobs") and data.get("top_logprobs") is None:
            data = {**data, "top_logprobs": 0}
        data = super()._translated(data)
        if not data.get("messages"):
            raise ValueError("there are no messages")
        if isinstance(data["messages"], list):
            data = {**data, "messages": [_in_one_text(message) for message in data["messages"]]}
        data = {**data, **_tools_with_parameters(data)}
        if data.get("tool_choice") == "required":
            data = {**data, "tool_choice": _only_tool(data)}
        if isinstance(data.get("tool_choice"), dict):
            _check_chosen(data)
        form = data.get("response_format")
        if not isinstance(form, dict):
            return data
        if form.get("type") == "json_schema":
            given = form.get("json_schema")
            if not isinstance(given, dict) or not isinstance(given.get("schema"), dict):
                raise ValueError("response_format of type json_schema needs a json_schema with a schema")
            form = {"type": "json_object", "schema": given["schema"]}
        if form.get("schema") is not None:
            _check_schema(form["schema"])
        return {**data, "response_format": form}


class EmbeddingRequest(_EmbeddingRequest):  # type: ignore[misc]
    """`encoding_format` "base64": each embedding as its 32-bit floats, little-endian."""

    encoding_format: Literal["float", "base64"] = "float"

    @pydantic.model_validator(mode="before")
    @classmethod
    def _as_openai_has_it(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("dimensions") is not None:
            raise ValueError("dimensions: an embedding has as many as the model gives it")
        return data


class CompletionRequest(_Asked, _CompletionRequest):  # type: ignore[misc]
    """Refuses what upstream would ignore or fail at."""

    @classmethod
    def _translated(cls, data: dict[str, Any]) -> dict[str, Any]:
        data = super()._translated(data)
        prompt = data.get("prompt")
        if not prompt or prompt == [""]:
            raise ValueError("there is no prompt")
        if isinstance(prompt, list) and len(prompt) != 1:
            raise ValueError("prompt must be one text: a request has one answer")
        return data


def _in_one_text(message: Any) -> Any:
    """Chat formats put texts together: the parts of one become a text, and nothing beside calls of tools an empty one."""
    if not isinstance(message, dict):
        return message
    if message.get("role") == "developer":  # as OpenAI calls it now
        message = {**message, "role": "system"}
    content = message.get("content")
    if content is None:
        if not message.get("tool_calls") and not message.get("function_call"):
            raise ValueError(f"the message of {message.get('role')!r} has no content")
        return {**message, "content": ""}
    if not isinstance(content, list):
        return message
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"a part of type {kind!r}: this server takes text")
        texts.append(part["text"])
    return {**message, "content": "\n".join(texts)}


def _only_tool(data: dict[str, Any]) -> dict[str, Any]:
    """What "required" comes to where there is one tool. Upstream ignores it."""
    tools = data.get("tools")
    function = tools[0].get("function") if isinstance(tools, list) and len(tools) == 1 and isinstance(tools[0], dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("tool_choice 'required' works with one tool here: name the one that is to be called")
    return {"type": "function", "function": {"name": function["name"]}}


def _check_chosen(data: dict[str, Any]) -> None:
    """The parameters of the tool that is to be called, as a schema."""
    name = (data["tool_choice"].get("function") or {}).get("name")
    functions = [tool.get("function") for tool in data.get("tools") or () if isinstance(tool, dict)]
    chosen = [f for f in functions if isinstance(f, dict) and f.get("name") == name]
    if not chosen:
        raise ValueError(f"tool_choice: there is no tool {name!r}")
    for function in chosen:
        _check_schema(function.get("parameters"))


def _check_schema(schema: Any) -> None:
    """Upstream takes any JSON where it cannot make a grammar of a schema, and does not say so."""
    try:
        check_depth(llama_cpp.llama_grammar.LlamaGrammar.from_json_schema(json.dumps(schema), verbose=False)._grammar)
    except Exception as e:
        raise ValueError(f"the schema cannot be made into a grammar: {type(e).__name__}: {e}") from None


def _tools_with_parameters(data: dict[str, Any]) -> dict[str, Any]:
    """A function without parameters may leave them out; upstream wants them."""
    tools = data.get("tools")
    if not isinstance(tools, list):
        return {}
    none = {"type": "object", "properties": {}}

    def whole(tool: Any) -> Any:
        function = tool.get("function") if isinstance(tool, dict) else None
        return {**tool, "function": {"parameters": none, **function}} if isinstance(function, dict) else tool

    return {"tools": [whole(tool) for tool in tools]}
