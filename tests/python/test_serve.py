"""`hobbit serve` over real HTTP, with a tiny model."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hobbit_cpp.cli import main
from hobbit_cpp.llama import llama_cpp
from hobbit_cpp.server import usage as u
from hobbit_cpp.server.metrics import Requests, render
from hobbit_cpp.stats import OffloadStats
from models import tiny_dual

parser = pytest.importorskip("prometheus_client.parser", reason="prometheus-client is in the test extra")

KEY = "secret"
CONTEXT = 6000
LONG = "the hunters run away from the fox and " * 150  # most of the context


class Server:
    """A running `hobbit serve`."""

    def __init__(self, *flags: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hobbit_cpp", "serve", str(tiny_dual("mixtral")), "--port", "0", "--expert-cache", "8MiB"]
            + ["-t", "1", "-tb", "1", "-c", str(CONTEXT), "-b", "8192", "-ub", "32", *flags],
            stderr=subprocess.PIPE,
            text=True,
            env=dict(os.environ, PORT="1", API_KEY="other", CONFIG_FILE="/nonexistent"),  # of other programs
        )
        assert self.process.stderr is not None
        self.said: list[str] = []
        for line in self.process.stderr:
            self.said.append(line)
            found = re.match(r"serving (\S+) at http://127.0.0.1:(\d+)/v1$", line)
            if found:
                self.name, self.port = found[1], int(found[2])
                break
        else:
            raise AssertionError("".join(self.said))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.said += list(self.process.stderr)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)

    def begin(self, path: str, body: Any = None, key: str = KEY, data: str | None = None) -> http.client.HTTPConnection:
        connection = self.connect()
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        data = json.dumps(body) if body is not None else data
        connection.request("GET" if data is None else "POST", path, data, headers)
        return connection

    def ask(self, path: str, body: Any = None, key: str = KEY) -> tuple[int, Any]:
        connection = self.begin(path, body, key)
        response = connection.getresponse()
        data = response.read().decode()
        connection.close()
        return response.status, json.loads(data) if response.headers.get_content_type() == "application/json" else data

    def stream(self, path: str, body: Any) -> list[Any]:
        status, data = self.ask(path, {**body, "stream": True})
        assert status == 200
        events = [line[6:] for line in data.splitlines() if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        return [json.loads(e) for e in events[:-1]]

    def metrics(self) -> dict[str, float]:
        """name{label} -> value, as Prometheus reads it."""
        status, text = self.ask("/metrics")
        assert status == 200
        return parse(text)

    def wait_for(self, what: Any) -> None:
        end = time.monotonic() + 60
        while not what(self.metrics()):
            assert time.monotonic() < end, self.metrics()
            time.sleep(0.02)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(30)
        self._reader.join(10)
        return code


def parse(text: str) -> dict[str, float]:
    out = {}
    for family in parser.text_string_to_metric_families(text):
        assert family.documentation and family.type in ("counter", "gauge")
        for sample in family.samples:
            assert (family.type == "counter") == sample.name.endswith("_total")
            out[sample.name + "".join(f"{{{v}}}" for v in sample.labels.values())] = sample.value
    return out


@contextlib.contextmanager
def running(*flags: str) -> Iterator[Server]:
    server = Server(*flags)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running("--api-key", KEY) as server:
        yield server


def chat(text: str, n: int = 12, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": n, "temperature": 0, **more}


CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RUNNING = "hobbit_http_requests"
GONE = "hobbit_http_requests_total{499}"


def test_models_health_and_key(server: Server) -> None:
    assert server.ask("/health", key="") == (200, {"status": "ok"})
    status, models = server.ask("/v1/models")
    assert status == 200 and [m["id"] for m in models["data"]] == [server.name] == [tiny_dual("mixtral").stem]
    for path in ("/v1/models", "/metrics"):
        assert server.ask(path, key="wrong")[0] == 401
    assert server.ask(CHAT, chat("x"), key="other")[0] == 401


def test_answers_whole_and_streamed_are_the_same(server: Server) -> None:
    status, answer = server.ask(CHAT, chat("the fox"))
    assert status == 200 and answer["usage"]["completion_tokens"] > 0
    chunks = server.stream(CHAT, chat("the fox"))
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
    assert text == answer["choices"][0]["message"]["content"] and text
    ask = {"prompt": "the fox", "max_tokens": 9, "temperature": 0}
    status, answer = server.ask(COMPLETIONS, ask)
    assert status == 200
    assert "".join(c["choices"][0]["text"] for c in server.stream(COMPLETIONS, ask)) == answer["choices"][0]["text"]
    status, answer = server.ask(CHAT, chat("say", 40, response_format={"type": "json_object"}, min_tokens=1))
    assert status == 200 and answer["choices"][0]["message"]["content"].lstrip().startswith("{")


def test_messages_in_parts(server: Server) -> None:
    status, whole = server.ask(CHAT, chat("the fox\nand a dog"))
    parts = [{"type": "text", "text": text} for text in ("the fox", "and a dog")]
    status, answer = server.ask(CHAT, {**chat(""), "messages": [{"role": "user", "content": parts}]})
    assert status == 200 and answer["choices"] == whole["choices"]
    image = {"type": "image_url", "image_url": {"url": "http://x"}}
    for content, says in (([*parts, image], "image_url"), (None, "no content"), ([None], "takes text")):
        status, answer = server.ask(CHAT, {**chat(""), "messages": [{"role": "user", "content": content}]})
        assert status == 400 and says in answer["error"]["message"]


def test_a_request_that_is_larger_than_the_context_is_not_read(server: Server) -> None:
    large = {"prompt": "a b " * 200_000, "max_tokens": 3}
    before = server.metrics()["hobbit_memory_peak_bytes"]
    status, answer = server.ask(COMPLETIONS, large)
    assert status == 413 and "a context of 6144 tokens" in answer["error"]["message"]
    connection = server.connect()
    pieces = (b" " * 65536 for _ in range(100))  # without a length
    connection.request("POST", COMPLETIONS, pieces, {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 413 and "a context of 6144 tokens" in json.loads(response.read())["error"]["message"]
    connection.close()
    assert server.ask("/extras/tokenize", {"input": "a b " * 200_000})[0] == 413
    assert server.ask("/v1/embeddings", {"input": ["a b " * 200_000]})[0] == 400  # not started for it, but not too large
    assert server.metrics()["hobbit_memory_peak_bytes"] < before + (16 << 20)
    assert server.ask(CHAT, chat("the fox"))[0] == 200


@pytest.mark.parametrize(
    "path,body", [(CHAT, chat("the fox")), (COMPLETIONS, {"prompt": "the fox", "max_tokens": 9, "temperature": 0})]
)
def test_a_stream_ends_with_its_usage_when_asked(server: Server, path: str, body: dict[str, Any]) -> None:
    status, answer = server.ask(path, body)
    assert status == 200 and answer["usage"]["completion_tokens"] > 0
    *chunks, last = server.stream(path, {**body, "stream_options": {"include_usage": True}})
    assert last["usage"] == answer["usage"] and last["choices"] == [] and last["id"] == chunks[0]["id"]
    assert len(chunks) == len(server.stream(path, {**body, "stream_options": {"include_usage": False}}))
    status, answer = server.ask(path, {**body, "stream": True, "stream_options": 1})
    assert status == 400 and "stream_options" in answer["error"]["message"]


DEEP = {"type": "array", "items": {"type": "integer"}, "maxItems": 100_000}
BAD_TOOL = {"type": "function", "function": {"name": "bad", "parameters": {"type": "objectx"}}}


def test_errors_are_told_in_the_way_of_openai(server: Server) -> None:
    too_long = {"prompt": LONG * 3, "max_tokens": 3}
    status, answer = server.ask(COMPLETIONS, too_long)
    assert status == 400 and answer["error"]["code"] == "context_length_exceeded"
    (chunk,) = server.stream(COMPLETIONS, too_long)
    assert chunk["error"]["code"] == "context_length_exceeded"
    status, answer = server.ask(COMPLETIONS, {"prompt": "x", "logprobs": 2})
    assert status == 400 and "--logprobs" in answer["error"]["message"]
    status, answer = server.ask(CHAT, {**chat("x"), "logprobs": True})
    assert status == 400 and "--logprobs" in answer["error"]["message"]
    status, answer = server.ask("/v1/embeddings", {"input": "x"})
    assert status == 400 and "--embedding" in answer["error"]["message"]
    for path, body, says in (
        (CHAT, {"messages": "x"}, "messages"),
        (CHAT, {"messages": [{"role": "nobody", "content": "x"}]}, "messages"),
        (CHAT, [1], "dict"),
        (CHAT, {**chat("x"), "max_tokens": "many"}, "max_tokens"),
        (CHAT, chat("x", response_format={"type": "json_schema"}), "json_schema"),
        (COMPLETIONS, {"prompt": "x", "temperature": "hot"}, "temperature"),
        ("/v1/embeddings", {"input": 5}, "input"),
        (COMPLETIONS, {"prompt": "x", "grammar": "bad ::"}, "grammar"),
        (COMPLETIONS, {"prompt": ["a", "b"]}, "one text"),
        (COMPLETIONS, {}, "no prompt"),
        (COMPLETIONS, {"prompt": []}, "no prompt"),
        (CHAT, {}, "no messages"),
        (CHAT, {"messages": []}, "no messages"),
        (COMPLETIONS, {"prompt": "x", "n": 2}, "n must be 1"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 0}, "max_tokens"),
        (CHAT, {**chat("x"), "n": 2}, "n must be 1"),
        (CHAT, chat("x", stop=["y", ""]), "stop"),
        (COMPLETIONS, {"prompt": "x", "stop": ""}, "stop"),
        (CHAT, chat("x", response_format={"type": "json_object", "schema": {"type": "objectx"}}), "schema"),
        (CHAT, chat("x", tools=[], tool_choice="required"), "one tool"),
        (CHAT, chat("x", tool_choice={"type": "function", "function": {"name": "feed"}}), "no tool"),
        (CHAT, chat("x", response_format={"type": "json_object", "schema": DEEP}), "groups in one another"),
        (COMPLETIONS, {"prompt": "x", "grammar": "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000}, "groups in one another"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 0.0}, "max_tokens"),
        (CHAT, chat("x", tools=[BAD_TOOL], tool_choice="required"), "schema"),
        (CHAT, chat("x", tools=[BAD_TOOL], tool_choice={"type": "function", "function": {"name": "bad"}}), "schema"),
        (CHAT, 5, ""),
        ("/extras/detokenize", {"tokens": [999999]}, "no token 999999"),
        ("/extras/detokenize", {"tokens": [-5]}, "no token -5"),
    ):
        status, answer = server.ask(path, body)
        assert status == 400 and answer["error"]["type"] == "invalid_request_error", (path, body, answer)
        assert says in answer["error"]["message"] and "\n" not in answer["error"]["message"], answer
    (chunk,) = server.stream(COMPLETIONS, {"prompt": "x", "grammar": "bad ::"})
    assert "grammar" in chunk["error"]["message"]
    for path, data in ((CHAT, '{"prompt": '), (COMPLETIONS, '{"prompt": '), (COMPLETIONS, "[" * 3000)):
        connection = server.begin(path, data=data)
        response = connection.getresponse()
        assert response.status == 400 and "not JSON" in json.loads(response.read())["error"]["message"]
    assert server.ask(COMPLETIONS, {"prompt": "the", "max_tokens": 1})[0] == 200
    assert server.ask(CHAT, chat("x", max_tokens=None, max_completion_tokens=2))[1]["usage"]["completion_tokens"] <= 2


SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["fox", "dog"]}, "tame": {"type": "boolean"}},
    "required": ["kind", "tame"],
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "form",
    [
        {"type": "json_schema", "json_schema": {"name": "animal", "strict": True, "schema": SCHEMA}},
        {"type": "json_object", "schema": SCHEMA},
    ],
    ids=["OpenAI", "llama-cpp-python"],
)
def test_answers_follow_a_schema(server: Server, form: dict[str, Any], stream: bool) -> None:
    body = chat("which animal?", 200, response_format=form)
    if stream:
        text = "".join(c["choices"][0]["delta"].get("content", "") for c in server.stream(CHAT, body))
    else:
        text = server.ask(CHAT, body)[1]["choices"][0]["message"]["content"]
    said = json.loads(text)
    assert set(said) == {"kind", "tame"} and said["kind"] in ("fox", "dog") and isinstance(said["tame"], bool)


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called(server: Server, stream: bool) -> None:
    parameters = {"type": "object", "properties": {"kind": {"enum": ["fox", "dog"]}}, "required": ["kind"]}
    tools = [{"type": "function", "function": {"name": "feed", "parameters": parameters}}]
    body = chat("feed them", 100, tools=tools, tool_choice={"type": "function", "function": {"name": "feed"}})
    if stream:
        deltas = [c["choices"][0]["delta"].get("tool_calls") for c in server.stream(CHAT, body)]
        calls = [d[0]["function"] for d in deltas if d]
        assert {c["name"] for c in calls} == {"feed"}
        arguments = "".join(c["arguments"] for c in calls)
    else:
        (call,) = server.ask(CHAT, body)[1]["choices"][0]["message"]["tool_calls"]
        assert call["function"]["name"] == "feed"
        arguments = call["function"]["arguments"]
    assert json.loads(arguments)["kind"] in ("fox", "dog")
    if not stream:
        (again,) = server.ask(CHAT, {**body, "tool_choice": "required"})[1]["choices"][0]["message"]["tool_calls"]
        assert again["function"]["name"] == "feed"


def test_developers_are_systems(server: Server) -> None:
    texts = []
    for role in ("system", "developer"):
        messages = [{"role": role, "content": "be short"}, {"role": "user", "content": "the fox"}]
        texts.append(server.ask(CHAT, {"messages": messages, "max_tokens": 4, "temperature": 0})[1]["choices"])
    assert texts[0] == texts[1]


def test_many_clients_are_all_served(server: Server) -> None:
    texts = ["the fox", "hunters", "runs away", "and then it sleeps"]
    alone = [server.ask(CHAT, chat(t))[1]["choices"][0]["message"]["content"] for t in texts]

    def one(i: int) -> str:
        if i % 2:
            chunks = server.stream(CHAT, chat(texts[i % 4]))
            return "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
        return str(server.ask(CHAT, chat(texts[i % 4]))[1]["choices"][0]["message"]["content"])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(16))) == alone * 4


def test_the_prefix_of_a_chat_is_kept(server: Server) -> None:
    first = "the quick brown fox jumps over the lazy dog " * 8
    before = server.metrics()["hobbit_tokens_total"]
    answer = server.ask(COMPLETIONS, {"prompt": first, "max_tokens": 4, "temperature": 0})[1]
    n_first = answer["usage"]["prompt_tokens"]
    middle = server.metrics()["hobbit_tokens_total"]
    assert middle - before >= n_first - 8
    server.ask(COMPLETIONS, {"prompt": first + answer["choices"][0]["text"] + " and", "max_tokens": 4, "temperature": 0})
    assert server.metrics()["hobbit_tokens_total"] - middle < n_first / 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_its_prompt_is_processed(server: Server, stream: bool) -> None:
    before = server.metrics()
    connection = server.begin(COMPLETIONS, {"prompt": f"{stream} " + LONG, "max_tokens": 9, "stream": stream})
    begun = before["hobbit_tokens_total"] + 64
    server.wait_for(lambda m: m["hobbit_tokens_total"] > begun)
    waiting = server.begin(CHAT, chat("hunters", n=999, stream=stream))  # and one that leaves before its turn
    server.wait_for(lambda m: m[RUNNING] == 3)
    for c in (waiting, connection):
        c.close()
    assert server.ask(COMPLETIONS, {"prompt": "the", "max_tokens": 2})[0] == 200
    server.wait_for(lambda m: m[RUNNING] == 1)
    after = server.metrics()
    assert after["hobbit_tokens_total"] - before["hobbit_tokens_total"] < 4500
    assert after[GONE] == before.get(GONE, 0) + 2


def test_a_client_that_leaves_while_its_answer_is_streamed(server: Server) -> None:
    gone = server.metrics().get(GONE, 0)
    # Letters only: upstream holds back what is no UTF-8, which a random model produces.
    endless = {"prompt": "the", "max_tokens": 5000, "min_tokens": 5000, "grammar": "root ::= [a-z ]*", "stream": True}
    connection = server.begin(COMPLETIONS, endless)
    response = connection.getresponse()
    for _ in range(6):
        assert response.readline()
    response.close()
    connection.close()
    server.wait_for(lambda m: m.get(GONE, 0) == gone + 1 and m[RUNNING] == 1)


def test_metrics_add_up(server: Server) -> None:
    m = server.metrics()
    parts = ("hits_total{high}", "hits_total{low}", "loads_total{high}", "loads_total{low}", "skips_total")
    assert m["hobbit_selections_total"] == sum(m[f"hobbit_{p}"] for p in parts) > 0
    assert m["hobbit_read_bytes_total{demand}"] > 0 and m["hobbit_memory_bytes"] > 0
    assert m["hobbit_http_requests_total{200}"] > 0
    connection = server.begin("/metrics")
    assert connection.getresponse().headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert "hobbit_tokens_total" not in parse(render(Requests()))
    assert parse(render(Requests(), OffloadStats(n_tokens=3)))["hobbit_tokens_total"] == 3


def test_nothing_was_written_by_what_went_wrong(server: Server) -> None:
    """After the tests above: disconnects and refused requests leave no tracebacks."""
    assert len(server.said) == 2, server.said


@pytest.mark.parametrize("flags", [[], ["--pooling", "last"]], ids=["mean", "last"])
def test_an_embedding_is_one_vector(flags: list[str]) -> None:
    with running("--embedding", "--exact", "-c", "256", "-b", "64", *flags) as server:
        status, answer = server.ask("/v1/embeddings", {"input": ["the fox", "a dog and its tail", "the fox"]})
        assert status == 200
        fox, dog, again = (data["embedding"] for data in answer["data"])
        assert len(fox) == len(dog) and all(isinstance(x, float) for x in fox)
        assert fox == pytest.approx(again) and fox != pytest.approx(dog)
        status, answer = server.ask("/v1/embeddings", {"input": "the fox", "encoding_format": "base64"})
        packed = base64.b64decode(answer["data"][0]["embedding"])
        assert status == 200 and struct.unpack(f"<{len(packed) // 4}f", packed) == pytest.approx(fox)
        refused: list[tuple[dict[str, Any], str]] = [
            ({"dimensions": 8}, "dimensions"),
            ({"encoding_format": "xx"}, "encoding_format"),
        ]
        refused += [({"input": "a " * n}, "-b") for n in (80, 80_000)]
        for wrong, says in refused:
            status, answer = server.ask("/v1/embeddings", {"input": "x", **wrong})
            assert status == 400 and says in answer["error"]["message"], answer


def test_logprobs_whole_and_streamed() -> None:
    with running("--logprobs", "--exact", "-c", "256", "-b", "64") as server:
        ask = {"prompt": "the fox", "max_tokens": 5, "temperature": 0, "logprobs": 2}
        status, answer = server.ask(COMPLETIONS, ask)
        assert status == 200
        whole = answer["choices"][0]["logprobs"]
        chunks = [c["choices"][0]["logprobs"] for c in server.stream(COMPLETIONS, ask)]
        streamed = [p for c in chunks if c is not None for p in c["token_logprobs"]]
        assert len(streamed) == 5
        assert whole["token_logprobs"] == pytest.approx(streamed, rel=0.01)  # the second has its prompt already
        assert all(top[t] == p for t, p, top in zip(whole["tokens"], whole["token_logprobs"], whole["top_logprobs"]))

        for top in (None, 2):
            status, answer = server.ask(CHAT, {**chat("the fox", 5), "logprobs": True, "top_logprobs": top})
            assert status == 200
            content = answer["choices"][0]["logprobs"]["content"]
            assert len(content) == answer["usage"]["completion_tokens"]
            assert all(c["logprob"] <= 0 and c["top_logprobs"] for c in content)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it(number: int) -> None:
    with running("--embedding", "-b", "512", "-ub", "512") as server:
        status, answer = server.ask("/v1/embeddings", {"input": ["the fox", "a dog"]})
        assert status == 200 and len(answer["data"]) == 2
        whole = server.begin(COMPLETIONS, {"prompt": LONG, "max_tokens": 5})
        server.wait_for(lambda m: m["hobbit_tokens_total"] > 64)
        queued = server.begin(CHAT, chat("the fox"))
        server.wait_for(lambda m: m[RUNNING] == 3)
        assert server.stop(number) == 0
        assert [c.getresponse().status for c in (whole, queued)] == [503, 503]
        assert "Traceback" not in "".join(server.said)


def test_what_stands_in_the_way_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = str(tiny_dual("mixtral"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", model, "--port", str(taken.getsockname()[1])]) == 1
    assert "Address already in use" in capsys.readouterr().err
    assert main(["serve", model, "--host", "no.such.host.invalid"]) == 1
    assert "cannot listen at no.such.host.invalid" in capsys.readouterr().err
    assert main(["serve", model, "--port", "70000"]) == 2
    assert main(["serve", model, "--port", "0", "--chat-format", "nonsense"]) == 1
    assert "no chat format 'nonsense'" in capsys.readouterr().err
    assert main(["serve", str(Path("no.gguf")), "--port", "0"]) == 1
    assert "no.gguf: no such file" in capsys.readouterr().err
    for name in [n for n in sys.modules if n.startswith("hobbit_cpp.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", model, "--port", "0"]) == 1
    assert "pip install 'hobbit-cpp[server]'" in capsys.readouterr().err


def test_metrics_are_what_they_are_called() -> None:
    stats = OffloadStats(
        n_tokens=1, selections=2, hits_high=3, hits_low=4, loads_high=5, loads_low=6, skips=7, prefetches=8, prefetches_useful=9,
        prefetches_late=10, prefetches_wasted=11, bytes_demand=12, bytes_prefetch=13, bytes_wasted=14, bytes_warmed=15,
        memory_budget=16, pool_bytes=17, pool_shrinks=18, pool_grows=19, slots_high=20, slots_low=21, resident_high=22,
        resident_low=23, stall_seconds=24.0, expert_seconds=25.0, eval_seconds=26.0,
    )  # fmt: skip
    lines = dict(line.rsplit(" ", 1) for line in render(Requests(), stats).splitlines() if not line.startswith("#"))
    for name, value in {
        "tokens_total": 1, "selections_total": 2, 'hits_total{precision="high"}': 3, 'hits_total{precision="low"}': 4,
        'loads_total{precision="high"}': 5, 'loads_total{precision="low"}': 6, "skips_total": 7, "prefetches_started_total": 8,
        'prefetches_total{result="useful"}': 9, 'prefetches_total{result="late"}': 10, 'prefetches_total{result="wasted"}': 11,
        'read_bytes_total{cause="demand"}': 12, 'read_bytes_total{cause="prefetch"}': 13, "wasted_bytes_total": 14,
        "warmed_bytes_total": 15, "memory_budget_bytes": 16, "pool_bytes": 17, 'pool_steps_total{direction="shrink"}': 18,
        'pool_steps_total{direction="grow"}': 19, 'slots{precision="high"}': 20, 'slots{precision="low"}': 21,
        'resident_experts{precision="high"}': 22, 'resident_experts{precision="low"}': 23, "stall_seconds_total": 24,
        "expert_seconds_total": 25, "eval_seconds_total": 26,
    }.items():  # fmt: skip
        assert float(lines["hobbit_" + name]) == value, name


def test_the_prompt_of_an_answer_is_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "llama_vocab_is_eog", lambda vocab, token: token == 0)
    llm: Any = types.SimpleNamespace(generate=lambda tokens: iter([5, 6, 0]), _model=types.SimpleNamespace(vocab=None))
    generate, usage = u.counted(llm), u.Usage()
    token = u.USAGE.set(usage)
    list(generate([1, 2, 3]))
    list(generate([1, 2, 3, 5, 6]))
    u.USAGE.reset(token)
    assert usage.as_openai_has_it() == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
