"""Turns of a chat: what the model is sent, what it evaluates, what is dropped."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode import load as load_model
from decode import logits
from fake_chat import Ears, FakeChatModel, chat_with, no_threads_left  # noqa: F401
from hobbit_cpp import Llama
from hobbit_cpp.cli.chat.session import Chat, TooLongError
from hobbit_cpp.cli.chat.template import Template, respell
from hobbit_cpp.cli.worker import Worker
from hobbit_cpp.llama import llama_cpp
from models import tiny_chat

llama_chat_format: Any = llama_cpp.llama_chat_format


@pytest.fixture
def ears() -> Ears:
    return Ears()


# ---- turns -----------------------------------------------------------------------------------------------


def test_a_turn_sends_what_was_said_before(ears: Ears) -> None:
    model = FakeChatModel(["Hello.", "Fine."])
    chat = chat_with(model, system="be brief")
    assert chat.send("hi", ears).text == "Hello."
    turn = chat.send("how are you?", ears)
    assert model.prompts == ["S:be brief|U:hi|A:", "S:be brief|U:hi|A:Hello.|U:how are you?|A:"]
    # only what is new: the end of the answer, the message, and where the model begins
    assert model.evaluated[1] == turn.answer.prompt.tokens == len("|U:how are you?|A:")
    assert turn.reused == len("S:be brief|U:hi|A:Hello.")
    assert ears.said == "Hello.Fine."
    assert ears.notes == []


def test_a_template_without_system_role_says_it_in_the_first_message(ears: Ears) -> None:
    model = FakeChatModel(["a"], system_role=False)
    chat_with(model, system="be brief").send("hi", ears)
    assert model.prompts == ["U:be brief\n\nhi|A:"]


def test_an_answer_with_the_space_of_the_template_is_reused(ears: Ears) -> None:
    model = FakeChatModel([" one", " two", " three"], space=" ")
    chat = chat_with(model)
    for message in ("hi", "ho", "hu"):
        turn = chat.send(message, ears)
    assert model.prompts[-1] == "U:hi|A: one|U:ho|A: two|U:hu|A:"
    assert turn.reused == len("U:hi|A: one|U:ho|A: two")


def test_an_answer_with_a_space_that_the_template_strips_is_reused(ears: Ears) -> None:
    model = FakeChatModel([" one\n", "two", " three"], trims=True)
    chat = chat_with(model)
    for message in ("hi", "ho", "hu"):
        turn = chat.send(message, ears)
    assert model.prompts[-1] == "U:hi|A: one\n|U:ho|A:two|U:hu|A:"
    assert turn.reused == len("U:hi|A: one\n|U:ho|A:two")


def test_the_space_before_an_answer_is_not_shown(ears: Ears) -> None:
    chat = chat_with(FakeChatModel(["\n\n  one two"]))
    chat.send("hi", ears)
    assert ears.said == "one two"
    assert chat.conversation.messages[-1]["content"] == "\n\n  one two"


def test_retry_answers_again_with_another_seed(ears: Ears) -> None:
    model = FakeChatModel(["one", "two", "three"])
    chat = chat_with(model)
    assert chat.retry(ears) is None
    chat.send("hi", ears)
    turn = chat.retry(ears)
    assert turn is not None and turn.text == "two"
    assert [m["content"] for m in chat.conversation.messages] == ["hi", "two"]
    assert model.prompts[0] == model.prompts[1]
    assert [a["seed"] for a in model.asked] == [0, 1]
    chat.send("ho", ears)
    assert model.asked[2]["seed"] == 0


@pytest.mark.parametrize("fails", [RuntimeError("disk"), "\x03"])
def test_a_retry_that_fails_leaves_the_old_answer(ears: Ears, fails: Any) -> None:
    chat = chat_with(FakeChatModel(["one", fails, "two"]))
    chat.send("hi", ears)
    with contextlib.suppress(RuntimeError):
        chat.retry(ears)
    assert [m["content"] for m in chat.conversation.messages] == ["hi", "one"]
    chat.retry(ears)
    assert [m["content"] for m in chat.conversation.messages] == ["hi", "two"]


def test_a_failed_message_counts_as_not_sent(ears: Ears) -> None:
    model = FakeChatModel(["one", RuntimeError("disk"), "two"])
    chat = chat_with(model)
    chat.send("hi", ears)
    with pytest.raises(RuntimeError, match="disk"):
        chat.send("ho", ears)
    assert [m["content"] for m in chat.conversation.messages] == ["hi", "one"]
    chat.retry(ears)
    assert model.prompts[-1] == "U:hi|A:one|U:ho|A:"


def test_a_stopped_answer_stays_as_far_as_it_was(ears: Ears) -> None:
    model = FakeChatModel(["one tw\x03", "x"])
    chat = chat_with(model)
    turn = chat.send("hi", ears)
    assert turn.answer.interrupted and turn.text == "one tw"
    chat.send("ho", ears)
    assert model.prompts[-1] == "U:hi|A:one tw|U:ho|A:"


def test_a_message_stopped_before_the_answer_can_be_sent_again(ears: Ears) -> None:
    model = FakeChatModel(["one", "\x03", "two"])
    chat = chat_with(model)
    chat.send("hi", ears)
    assert chat.send("ho", ears).answer.interrupted
    assert len(chat.conversation.messages) == 2
    turn = chat.retry(ears)
    assert turn is not None and turn.text == "two"
    assert model.prompts[-1] == "U:hi|A:one|U:ho|A:"


def test_ctrl_c_while_the_prompt_is_read_cancels_the_evaluation(ears: Ears) -> None:
    model = FakeChatModel(["one"])
    chat = chat_with(model)
    model.slow.set()
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    turn = chat.send("hi", ears)
    assert turn.answer.interrupted and turn.text == ""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    model.slow.clear()
    again = chat.retry(ears)
    assert again is not None and again.text == "one"


def test_without_history_each_text_stands_alone(ears: Ears) -> None:
    model = FakeChatModel(["a", "b"])
    chat = chat_with(model, history=False)
    chat.send("one", ears)
    chat.send("two", ears)
    assert model.prompts == ["U:one|A:", "U:two|A:"]


# ---- the context is full ---------------------------------------------------------------------------------


def test_the_oldest_turns_are_dropped_and_it_is_said(ears: Ears) -> None:
    model = FakeChatModel([c * 20 for c in "abcdef"], n_ctx=160)
    chat = chat_with(model, system="sys")
    for i in range(6):
        turn = chat.send(f"message {i}", ears)
        assert turn.text == "abcdef"[i] * 20  # there was room for it
        assert model.prompts[-1].startswith("S:sys|U:message")
        assert f"U:message {i}|A:" in model.prompts[-1]
    assert len(chat.conversation.messages) == 12  # all are kept for /save
    assert chat.conversation.first > 0
    assert all("no longer sees" in note for note in ears.notes)
    # a drop makes room for more than one turn, since the rest has to be evaluated anew
    assert 1 <= len(ears.notes) < 4


def test_a_message_too_long_is_refused_and_the_chat_goes_on(ears: Ears) -> None:
    model = FakeChatModel(["one", "two"], n_ctx=100)
    chat = chat_with(model)
    chat.send("hi", ears)
    with pytest.raises(TooLongError, match=r"it takes 20\d tokens, and the context has 100"):
        chat.send("x" * 200, ears)
    assert chat.conversation.first == 0 and chat.conversation.unanswered is None
    chat.send("ho", ears)
    assert model.prompts[-1] == "U:hi|A:one|U:ho|A:"


def test_an_answer_that_fills_the_context_says_so(ears: Ears) -> None:
    chat = chat_with(FakeChatModel(["x" * 200], n_ctx=100))
    chat.send("hi", ears)
    assert ears.notes == ["the answer was cut off: the context of 100 tokens is full"]
    chat = chat_with(FakeChatModel(["x" * 200], n_ctx=100), max_tokens=5)
    assert chat.send("hi", ears).text == "xxxxx"
    assert ears.notes[1:] == ["the answer was cut off after 5 tokens (-n)"]


# ---- tokens that are there already -----------------------------------------------------------------------


@given(st.data())
def test_respelling_changes_tokens_and_no_text(data: st.DataObject) -> None:
    pieces = [b"a", b"b", b"c", b"ab", b"bc", b"abc", b"ca", b"aab"]
    tokens = st.lists(st.integers(0, len(pieces) - 1), max_size=12)
    evaluated = data.draw(tokens)
    # often the same text in other tokens
    start = data.draw(st.integers(0, len(evaluated)))
    text = b"".join(pieces[t] for t in evaluated[:start]) + b"".join(pieces[t] for t in data.draw(tokens))
    wanted = []
    left = text
    while left:
        fitting = [t for t, p in enumerate(pieces) if left.startswith(p)]
        wanted.append(data.draw(st.sampled_from(fitting)))
        left = left[len(pieces[wanted[-1]]) :]

    out = respell(evaluated, wanted, pieces.__getitem__)
    assert b"".join(pieces[t] for t in out) == text
    kept = 0
    while kept < min(len(out), len(evaluated)) and out[kept] == evaluated[kept]:
        kept += 1
    # nothing that could have been kept was dropped: no later place where a token ends in both
    ends = {len(b"".join(pieces[t] for t in wanted[:n])) for n in range(len(wanted) + 1)}
    longest = 0
    for n in range(len(evaluated) + 1):
        joined = b"".join(pieces[t] for t in evaluated[:n])
        if text.startswith(joined) and len(joined) in ends:
            longest = n
    assert kept >= longest


# ---- the thread ------------------------------------------------------------------------------------------


def test_work_that_is_not_yet_cancellable_is_cancelled_later() -> None:
    """A cancel that comes before the evaluation begins is lost: it is said again."""
    worker, cancels = Worker(), threading.Semaphore(0)

    def work() -> None:
        for _ in range(3):
            assert cancels.acquire(timeout=10)

    threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with worker.stoppable(cancels.release), pytest.raises(KeyboardInterrupt):
        worker.do(work)


def test_nothing_is_made_while_an_item_is_looked_at() -> None:
    worker, made = Worker(), []

    def items() -> Iterator[int]:
        for i in range(3):
            made.append(i)
            yield i

    for item in worker.each(items()):
        time.sleep(0.02)
        assert made[-1] == item


# ---- a real model ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::hobbit_cpp.HobbitWarning")
@pytest.mark.parametrize("offload", [None, "lru"])
def test_the_context_is_what_its_tokens_say(offload: str | None, ears: Ears) -> None:
    """After turns, a retry and a drop, each token was evaluated where it stands: a model that reads them anew agrees."""
    from hobbit_cpp import Llama

    more = {"offload": offload, "exact": True} if offload else {}
    llm, fresh = (load_model(Llama, str(tiny_chat()), 1, **more) for _ in range(2))
    chat = Chat(llm, Template(llm), Worker(), lambda _: {"max_tokens": 8, "temperature": 0.0}, offload is not None)
    for message in ("the expert", "of that", "the layer is to the token"):
        chat.send(message, ears)
    chat.conversation.first = 2
    chat.send("of", ears)
    turn = chat.retry(ears)
    assert turn is not None
    tokens = llm.input_ids[: llm.n_tokens].tolist()
    text = "".join(f"<s>{m['role']}\n{m['content'].strip()}</s>\n" for m in chat.conversation.messages[2:])
    canonical = llm.tokenize(text.encode(), add_bos=False, special=True)
    # the last token was chosen, and not evaluated
    evaluated = llm.detokenize(tokens, special=True)
    assert llm.detokenize(canonical, special=True).startswith(evaluated) and len(evaluated) > len(text) - 20
    # the model chose other tokens than its text would have
    assert tokens != canonical[: len(tokens)]
    np.testing.assert_allclose(llm.scores[: len(tokens)], logits(fresh, tokens, 64), atol=2e-3)
    for model in (llm, fresh):
        model.close()


TEMPLATES = {
    "chatml": llama_chat_format.CHATML_CHAT_TEMPLATE,
    "mistral": llama_chat_format.MISTRAL_INSTRUCT_CHAT_TEMPLATE,
    "mixtral": llama_chat_format.MIXTRAL_INSTRUCT_CHAT_TEMPLATE,
    "llama3": llama_chat_format.LLAMA3_INSTRUCT_CHAT_TEMPLATE,
    "plain": None,
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_of_the_field_evaluate_only_what_is_new(name: str, ears: Ears) -> None:
    from hobbit_cpp import Llama

    llm: Any = Llama(str(tiny_chat(template=TEMPLATES[name])), n_ctx=1024, n_threads=1, n_threads_batch=1, verbose=False)
    chat = Chat(llm, Template(llm), Worker(), lambda _: {"max_tokens": 5, "temperature": 0.0}, offload=False)
    chat.conversation.system = "the token"
    context = 0
    for message in ("the expert", "of", "layer"):
        turn = chat.send(message, ears)
        assert turn.reused == context and turn.answer.prompt.tokens > 0
        context = turn.context
    text = llm.detokenize(llm.input_ids[:context].tolist(), special=True).decode()
    assert text.count("the token") == 1 and text.count("the expert") == 1
    assert not any("no longer" in note for note in ears.notes)
    llm.close()


def test_a_short_answer_needs_little_room() -> None:
    ears = Ears()
    chat = chat_with(FakeChatModel(["a", "b"], n_ctx=160), max_tokens=5)
    chat.send("x" * 60, ears)
    chat.send("y" * 60, ears)
    assert ears.notes == [] and chat.conversation.first == 0


def test_a_full_context_is_what_ended_the_answer() -> None:
    ears = Ears()
    llm: Any = Llama(str(tiny_chat()), n_ctx=64, n_threads=1, n_threads_batch=1, verbose=False)
    bias = {int(llm.token_eos()): -1000.0}
    chat = Chat(
        llm, Template(llm), Worker(), lambda _: {"max_tokens": None, "temperature": 0.0, "logit_bias": bias}, offload=False
    )
    chat.send("the expert", ears)
    assert ears.notes == [f"the answer was cut off: the context of {chat.n_ctx} tokens is full"]
    llm.close()
