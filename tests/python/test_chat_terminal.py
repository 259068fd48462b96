"""`hobbit chat` as it is used: in a pipe and in a terminal, with a real (tiny) model."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import models

SCRIPT = Path(__file__).parents[2] / "scripts" / "chat.py"
# One thread: the threads of llama.cpp wait for each other by spinning, which is slow on a busy machine.
FLAGS = ["--temp", "0", "-c", "512", "-b", "64", "-ub", "64", "-t", "1", "-tb", "1"]
# What a terminal is sent when the prompt begins to read: that pasted text be marked.
READS = "\x1b[?2004h"


def piped(text: str | bytes, *flags: str, model: Path | None = None) -> subprocess.CompletedProcess[bytes]:
    data = text.encode() if isinstance(text, str) else text
    command = [sys.executable, "-m", "hobbit_cpp", "chat", str(model or models.tiny_chat()), *FLAGS, *flags]
    return subprocess.run(command, input=data, capture_output=True, timeout=120)


# ---- a pipe ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", ["hobbit", "none"])
def test_a_line_is_a_message_and_nothing_is_evaluated_twice(tmp_path: Path, offload: str) -> None:
    stats = tmp_path / "stats.json"
    done = piped("the expert\n\nof that\nlayer\n", "-n", "24", "--offload", offload, "--json-stats", str(stats))
    assert done.returncode == 0, done.stderr
    assert b"\x1b" not in done.stdout + done.stderr
    assert done.stdout.endswith(b"\n")
    turns = json.loads(stats.read_text())["turns"]
    assert len(turns) == 3
    context = 0
    for turn in turns:
        assert turn["reused"] == context  # all of it
        new, said = turn["prompt"]["tokens"], turn["decode"]["tokens"]
        # the message and the template around it: a character is at most a token
        assert 0 < new <= len("x</s>\n<s>user\nthe expert</s>\n<s>assistant\n")
        context += new + said
        assert turn["context"] == context
        if offload == "hobbit":
            assert turn["prompt"]["offload"]["n_tokens"] == new
            assert turn["decode"]["offload"]["n_tokens"] == said


def test_an_answer_is_a_line_whatever_the_model_says(tmp_path: Path) -> None:
    done = piped("the\n", "-n", "1")
    assert (done.returncode, done.stdout.count(b"\n")) == (0, 1)
    assert b"cut off after 1 tokens (-n)" in done.stderr


def test_commands_in_a_pipe(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    done = piped(f"the\n/save {file}\n/reset\n/stats\n /stats\n/etc/hosts\n/exit\nmore\n", "-n", "4", "-sys", "token")
    assert done.returncode == 0, done.stderr
    assert b"0 messages" in done.stderr  # /stats after /reset
    saved = json.loads(file.read_text())
    assert saved["system"] == "token" and [m["role"] for m in saved["messages"]] == ["user", "assistant"]
    again = piped(f"/load {file}\n/save {tmp_path / 'again.json'}\n/load {tmp_path / 'none.json'}\nx\n")
    assert again.returncode == 1 and again.stdout == b""
    assert again.stderr.endswith(b"none.json: no such file\n")
    assert json.loads((tmp_path / "again.json").read_text()) == saved


def test_what_fails_in_a_pipe(tmp_path: Path) -> None:
    done = piped(b"the\n\xff\xfe\nof\n", "-n", "4")
    assert done.returncode == 1
    assert b"hobbit: line 2 of the input is not UTF-8 text (byte 0)\n" in done.stderr
    (tmp_path / "first.txt").write_bytes(b"caf\xe9")
    done = piped("", "-f", str(tmp_path / "first.txt"))
    assert done.returncode == 1 and b"first.txt is not UTF-8 text (byte 3)" in done.stderr
    # one that is too long leaves its line empty, and the others are answered
    done = piped("the\n" + "x" * 600 + "\nof\n", "-n", "1")
    lines = done.stdout.split(b"\n")
    assert done.returncode == 1 and len(lines) == 4 and lines[1] == b""
    assert b"hobbit: the message is too long" in done.stderr


def test_a_full_context_in_a_pipe() -> None:
    done = piped("the expert of the layer\n" * 6, "-n", "16", "-c", "128")
    assert done.returncode == 0
    assert b"no longer sees" in done.stderr
    assert b"(-n)" in done.stderr and b"Traceback" not in done.stderr


def test_without_template() -> None:
    model = models.tiny_chat(template=None)
    done = piped("the\n", "-n", "4", model=model)
    assert done.returncode == 0
    assert b"this model has no chat template: a plain one is used" in done.stderr
    broken = models.tiny_chat(template="{{ raise_exception('never') }}")
    assert b"the chat template of this model fails (never)" in piped("the\n", "-n", "4", model=broken).stderr
    done = piped("the\nof\n", "-n", "4", "-no-cnv", model=model)
    assert (done.returncode, b"template" in done.stderr) == (0, False)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["-no-cnv", "-sys", "x"], b"--system-prompt needs the chat template"),
        (["--exact", "--precision-rule", "miss"], b"--exact"),
        (["-p", " "], b"the first message is empty"),
        (["--load", "/no/such/file"], b"no such file"),
    ],
)
def test_wrong_flags(flags: list[str], says: bytes) -> None:
    done = piped("", *flags)
    assert done.returncode == 1 and says in done.stderr and done.stderr.count(b"\n") == 1


def test_the_script_is_the_command(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(models.tiny_chat()), *FLAGS, "-n", "4"]
    done = subprocess.run(command, input=b"the\n", capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stdout == piped("the\n", "-n", "4").stdout


# ---- a terminal ------------------------------------------------------------------------------------------


class Screen:
    """The chat in a pseudo-terminal."""

    def __init__(self, process: subprocess.Popen[bytes], fd: int) -> None:
        self.process = process
        self._fd = fd
        self._all = ""

    def type(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def until(self, text: str, seconds: float = 60) -> str:
        """What came up to that text."""
        end = time.monotonic() + seconds
        while text not in self._all:
            assert time.monotonic() < end, f"no {text!r} in {self._all!r}"
            if select.select([self._fd], [], [], 0.1)[0]:
                try:
                    data = os.read(self._fd, 65536)
                except OSError:  # the other side is closed
                    data = b""
                assert data, f"ended without {text!r}: {self._all!r}"
                self._all += data.decode(errors="replace")
        before, _, self._all = self._all.partition(text)
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[>=]", "", before)

    def prompt(self) -> str:
        """What came up to the next prompt."""
        return self.until(READS)

    def ends(self) -> int:
        """The exit code."""
        with contextlib.suppress(OSError):
            while os.read(self._fd, 65536):
                pass
        return self.process.wait(60)

    def echoes(self) -> bool:
        return bool(termios.tcgetattr(self._fd)[3] & termios.ECHO)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """start(*flags): a chat in a terminal of 80 columns, with a state folder of its own."""
    started: list[Screen] = []

    def run(*flags: str, columns: int = 80) -> Screen:
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        env = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
        process = subprocess.Popen(
            [sys.executable, "-m", "hobbit_cpp", "chat", str(models.tiny_chat()), *FLAGS, *flags],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=env,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0) and None,
        )
        os.close(slave)
        started.append(Screen(process, master))
        return started[-1]

    yield run
    for screen in started:
        if screen.process.poll() is None:
            screen.process.kill()
            screen.process.wait()
        os.close(screen._fd)


def test_a_conversation_in_a_terminal(start: Any, tmp_path: Path) -> None:
    screen = start("-n", "8")
    screen.prompt()
    screen.type("the expert\r")
    answer = screen.prompt()
    assert "cut off after 8 tokens (-n)" in answer and "tok/s" in answer and "/512" in answer
    screen.type("/sta\t")
    screen.until("ts")  # completed
    screen.type("\r")
    assert "2 messages" in screen.prompt()
    screen.type("/nonsense\r")
    assert "unknown command /nonsense" in screen.prompt()
    screen.type("of\x1b\rthat\\\rlayer\r")  # Alt-Enter, and a backslash
    assert "tok/s" in screen.prompt()
    # pasted lines are one message
    screen.type("\x1b[200~token\nthe\x1b[201~")
    screen.type("\r")
    assert "tok/s" in screen.prompt()
    file = tmp_path / "talk.json"
    screen.type(f"/save {file}\r")
    assert "saved:" in screen.prompt()
    users = [m["content"] for m in json.loads(file.read_text())["messages"] if m["role"] == "user"]
    assert users == ["the expert", "of\nthat\nlayer", "token\nthe"]
    screen.type("\x04")
    assert screen.ends() == 0


def test_earlier_lines_come_back(start: Any, tmp_path: Path) -> None:
    screen = start("-n", "2")
    screen.prompt()
    screen.type("/system remembered\r")
    screen.prompt()
    screen.type("/exit\r")
    assert screen.ends() == 0
    file = tmp_path / "hobbit-cpp" / "chat-history"
    assert "/system remembered" in file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    before = file.read_text()
    screen = start("-n", "2", "--no-history")
    screen.prompt()
    screen.type("/stats\r")
    screen.prompt()
    screen.type("/exit\r")
    assert screen.ends() == 0 and file.read_text() == before
    screen = start("-n", "2")
    screen.prompt()
    screen.type("\x1b[A\x1b[A\r")  # up, up
    assert "the system message holds" in screen.prompt()
    screen.type("/exit\r")
    assert screen.ends() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(start: Any) -> None:
    screen = start("-c", "8192")
    screen.prompt()
    screen.type("the expert\r")
    time.sleep(0.3)
    assert not screen.echoes()  # what is typed meanwhile does not show in the answer
    screen.type("\x03")
    assert "stopped" in screen.prompt()
    screen.type("of\r")
    time.sleep(0.3)
    screen.type("\x03")
    assert "tok/s" in screen.prompt()
    # at the prompt: the first clears the line, two at the empty one leave
    screen.type("half a line\x03")
    screen.type("\x03")
    assert "Ctrl-C again, or Ctrl-D, leaves" in screen.prompt()
    screen.type("\x03")
    assert screen.ends() == 0


@pytest.mark.parametrize("offload", ["hobbit", "none"])
def test_ctrl_c_stops_the_reading_of_a_prompt(start: Any, offload: str) -> None:
    screen = start("-c", "16384", "--offload", offload)
    screen.prompt()
    screen.type("\x1b[200~" + "a b c d e\n" * 1500 + "\x1b[201~")
    screen.type("\r")
    assert "tok/s" not in screen.until("reading ")
    screen.type("\x03")
    assert "stopped before the answer began" in screen.prompt()
    # what was evaluated is reused, and what was not is not
    screen.type("/reset\r")
    screen.prompt()
    screen.type("the expert\r")
    time.sleep(0.5)
    screen.type("\x03")
    said = screen.prompt()
    assert "stopped" in said and "tok/s" in said
    screen.type("\x04")
    assert screen.ends() == 0


def test_a_chat_that_is_terminated_leaves_the_terminal_in_order(start: Any, tmp_path: Path) -> None:
    stats = tmp_path / "stats.json"
    screen = start("-c", "16384", "--json-stats", str(stats))
    screen.prompt()
    screen.type("the expert\r")
    screen.until("the expert")
    time.sleep(0.5)
    assert not screen.echoes()
    screen.process.terminate()
    assert screen.process.wait(60) == 128 + signal.SIGTERM
    assert screen.echoes()
    assert json.loads(stats.read_text())["turns"] == []


def test_a_second_ctrl_c_after_the_answer_leaves(start: Any) -> None:
    screen = start("-c", "8192")
    screen.prompt()
    screen.type("the expert\r")
    time.sleep(0.3)
    screen.type("\x03")
    assert "stopped" in screen.prompt()
    time.sleep(0.7)
    screen.type("\x03")
    assert screen.ends() == 0


def test_a_narrow_terminal(start: Any) -> None:
    screen = start("-n", "4", columns=20)
    screen.prompt()
    screen.type("the\r")
    assert len(screen.prompt().strip().splitlines()[-1]) < 20
    screen.process.send_signal(signal.SIGWINCH)
    screen.type("grüße 😀 " * 10 + "\r")
    screen.until("tok/s")  # a prompt that changes its size is painted anew
    screen.prompt()
    screen.type("\x04")
    assert screen.ends() == 0
