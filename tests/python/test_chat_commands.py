"""Commands of a chat, and conversations in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fake_chat import Ears, FakeChatModel, chat_with, no_threads_left  # noqa: F401
from hobbit_cpp.cli.chat import commands
from hobbit_cpp.cli.chat.conversation import Conversation, load, save
from hobbit_cpp.cli.chat.terminal import fit


@pytest.fixture
def ears() -> Ears:
    return Ears()


def command(line: str, chat: Any, ears: Ears) -> bool:
    found, argument = commands.find(line)
    return found.run(chat, ears, argument)


# ---- saved conversations ---------------------------------------------------------------------------------


def test_a_saved_conversation_goes_on(tmp_path: Path, ears: Ears) -> None:
    file = tmp_path / "a b.json"
    model = FakeChatModel(["grüß dich 😀", "two"])
    chat = chat_with(model, system="sys")
    chat.send("hi", ears)
    assert command(f"/save {file}", chat, ears)
    assert json.loads(file.read_text(encoding="utf-8")) == {
        "format": "hobbit-chat",
        "model": "fake.gguf",
        "system": "sys",
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "grüß dich 😀"}],
    }
    assert [p.name for p in tmp_path.iterdir()] == ["a b.json"]
    other = chat_with(model)
    assert command(f'/load "{file}"', other, ears)
    other.send("ho", ears)
    assert model.prompts[-1] == "S:sys|U:hi|A:grüß dich 😀|U:ho|A:"
    # the new one replaces the old one
    command(f"/save {file}", other, ears)
    assert len(json.loads(file.read_text(encoding="utf-8"))["messages"]) == 4


def test_a_message_without_answer_is_saved_too(tmp_path: Path, ears: Ears) -> None:
    model = FakeChatModel([RuntimeError("disk"), "one"])
    chat = chat_with(model)
    with pytest.raises(RuntimeError):
        chat.send("hi", ears)
    command(f"/save {tmp_path / 'c.json'}", chat, ears)
    other = chat_with(model)
    command(f"/load {tmp_path / 'c.json'}", other, ears)
    assert "/retry asks for it" in ears.notes[-1]
    command("/retry", other, ears)
    assert model.prompts[-1] == "U:hi|A:"


def test_a_plain_list_of_messages_loads_too(tmp_path: Path) -> None:
    file = tmp_path / "m.json"
    messages = [{"role": r, "content": r} for r in ("system", "user", "assistant")]
    file.write_text(json.dumps(messages))
    assert load(file) == Conversation("system", messages[1:])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is not a saved conversation"),
        ("{", "is not a saved conversation"),
        ("[" * 100_000, "is not a saved conversation"),
        ("7", "no list of messages"),
        ('{"messages": 7}', "no list of messages"),
        ('{"system": 7, "messages": []}', "system message is not a text"),
        ('["x"]', "message 1 is not an object"),
        ('[{"role": "user"}]', "message 1 has no role and content"),
        ('[{"role": "user", "content": ["x"]}]', "message 1 has no role and content"),
        ('[{"role": "assistant", "content": "x"}]', "message 1 is of 'assistant'"),
        ('[{"role": "user", "content": "x"}, {"role": "user", "content": "x"}]', "message 2 is of 'user'"),
    ],
)
def test_what_is_no_conversation_is_refused(tmp_path: Path, content: str, says: str, ears: Ears) -> None:
    file = tmp_path / "bad.json"
    file.write_text(content)
    chat = chat_with(FakeChatModel(["one"]))
    chat.send("hi", ears)
    with pytest.raises(ValueError, match=says) as e:
        command(f"/load {file}", chat, ears)
    assert str(file) in str(e.value)
    assert len(chat.conversation.messages) == 2


def test_saving_replaces_no_other_file(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF\x00\xff")
    with pytest.raises(ValueError, match="not a saved conversation"):
        save(file, Conversation(), "m")
    assert file.read_bytes() == b"GGUF\x00\xff"
    with pytest.raises(ValueError, match="is a folder"):
        save(tmp_path, Conversation(), "m")
    with pytest.raises(ValueError, match="is not a folder"):
        save(tmp_path / "no" / "x.json", Conversation(), "m")


# ---- commands --------------------------------------------------------------------------------------------


def test_commands(ears: Ears) -> None:
    chat = chat_with(FakeChatModel(["one", "two"]))
    command("/help", chat, ears)
    assert all(name in ears.notes[-1] for name in commands.COMMANDS)
    command("/system  be brief ", chat, ears)
    assert chat.conversation.system == "be brief"
    command("/system", chat, ears)
    assert "be brief" in ears.notes[-1]
    chat.send("hi", ears)
    command("/stats", chat, ears)
    assert "2 messages" in ears.notes[-1] and "memory" in ears.notes[-1]
    command("/reset", chat, ears)
    assert chat.conversation == Conversation("be brief")
    command('/system ""', chat, ears)
    assert chat.conversation.system is None
    assert not command("/exit", chat, ears)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/nonsense x", "unknown command /nonsense"),
        ("/", "unknown command /"),
        ("/exit now", "/exit takes nothing more"),
        ("/save", "/save needs the name of a file"),
        ("/load", "/load needs the name of a file"),
        ('/load "x', "/load"),
        ("/load /no/such/file", "no such file"),
        ("/retry", "no message"),
    ],
)
def test_wrong_commands_say_so(line: str, says: str, ears: Ears) -> None:
    chat = chat_with(FakeChatModel([]))
    with pytest.raises(ValueError, match=says):
        command(line, chat, ears)


def test_the_status_line_fits_the_terminal() -> None:
    parts = ["37.6 tok/s", "hit 96%", "9.4 MB/tok"]
    assert fit(parts, 80) == "37.6 tok/s · hit 96% · 9.4 MB/tok"
    assert fit(parts, 21) == "37.6 tok/s · hit 96%"
    assert fit(parts, 5) == "37.6 tok/s"
