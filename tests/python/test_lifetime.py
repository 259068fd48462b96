"""The end of a model while something is under way: closed, collected, used by several threads, at the exit of the interpreter."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from faults import run
from models import tiny, tiny_dual


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copy(tiny("mixtral", "Q8_0"), tmp_path / "model.gguf"))


def test_close_and_collection_while_reads_and_prefetches_run(model: Path) -> None:
    run(
        """
        gc.disable()
        clean = None
        for round in range(8):
            llm = open_model(model, OffloadParams(prefetch_depth=3, prefetch_always=True, io_threads=4), pool=3 * smallest(model))
            tokens = words(llm, 12)
            for token in tokens:
                llm.eval([token])
            slow_reads(model, 30)
            llm.eval(tokens[:1])  # leaves prefetches behind
            begin = time.time()
            if round % 2:
                llm.close()
                llm.close()
            else:
                del llm  # the last reference: freed at once, without the collector
            assert time.time() - begin < 5
            good_reads()
            clean = clean or (tasks(), fds())
            assert (tasks(), fds()) == clean
        """,
        model=model,
    )


def test_compute_threads_stay_from_token_to_token_and_go_with_the_model(model: Path) -> None:
    run(
        """
        before = None
        for n in (1, 3, 1, 3):
            llm = open_model(model, "lru", pool=3 * smallest(model), threads=n)
            llm.eval(words(llm, 4))
            here = set(os.listdir("/proc/self/task"))
            llm.eval(words(llm, 2))
            assert set(os.listdir("/proc/self/task")) == here
            before = before or len(here)
            assert len(here) == before + n - 1
            llm.close()
        """,
        model=model,
    )


def test_close_while_other_threads_decode(model: Path) -> None:
    run(
        """
        for round in range(6):
            llm = open_model(model, "hobbit", pool=2 * smallest(model), threads=2)
            tokens = words(llm, 60)
            ended = []
            def work():
                try:
                    while True:
                        logits(llm, tokens, 4)
                except HobbitError as e:
                    ended.append(e)
            threads = [threading.Thread(target=work) for _ in range(3)]
            for t in threads: t.start()
            time.sleep(0.05 * round)
            slow_reads(model, 20 * (round % 2))
            closers = [threading.Thread(target=llm.close) for _ in range(2)]
            for t in closers: t.start()
            for t in closers + threads: t.join(60)
            assert not any(t.is_alive() for t in closers + threads)
            assert len(ended) == 3, ended
            good_reads()
        """,
        model=model,
    )


def test_one_model_from_several_threads_crashes_nobody(model: Path) -> None:
    run(
        """
        llm = open_model(model, "hobbit", pool=2 * smallest(model))
        def work(i):
            for n in range(4):
                try:
                    if i % 2: llm.create_completion("the expert of the layer", max_tokens=8)
                    else: list(llm.create_completion("the token", max_tokens=8, stream=True))
                    llm.offload_stats(); llm.reset_offload_stats()
                except HobbitError:
                    pass  # a stream that another call has ended says so
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for t in threads: t.start()
        for t in threads: t.join(90)
        assert not any(t.is_alive() for t in threads)
        assert np.isfinite(logits(llm, words(llm, 20), 4)).all()
        """,
        model=model,
    )


def test_a_fork_while_another_thread_uses_the_model(model: Path) -> None:
    """The child is told to load its own; it does not wait for locks of threads that stayed in the parent."""
    run(
        """
        llm = open_model(model, "hobbit", pool=2 * smallest(model))
        taken, leave = threading.Event(), threading.Event()
        def hold():
            with llm._calls._lock, llm._calls.gate, llm._session._resizing:
                taken.set()
                leave.wait()
        holder = threading.Thread(target=hold, daemon=True)
        holder.start()
        taken.wait()
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)
            resize = lambda: llm.resize_expert_cache("50%")
            json = lambda: llm._session.lend(1000)
            for call in (llm.offload_stats, lambda: llm.eval([1]), lambda: llm.create_completion("the"), resize, json):
                raises(StateError, call)
            llm.cancel()
            llm.close()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        leave.set()
        holder.join()
        llm.eval([1])
        """,
        model=model,
    )


AT_EXIT = {
    "open": "",
    "closed": "llm.close()",
    "in a cycle": "class A: pass\na = A(); a.me, a.llm = a, llm; del llm",
    "sys.exit": "sys.exit(0)",
    "exception in a thread": "threading.Thread(target=lambda: llm.eval(tokens)).start()",
    "a stream half read": "s = llm.create_completion('the', max_tokens=30, stream=True); next(s)",
    "daemon decodes": "daemon(forever)",
    "daemon waits for the disk": "slow_reads(model, 2000)\ndaemon(forever)",
    "daemon closes": "daemon(llm.close)",
}


@pytest.mark.parametrize("how", AT_EXIT)
def test_interpreter_exit(model: Path, how: str) -> None:
    run(
        f"""
llm = open_model(model, "hobbit", pool=2 * smallest(model))
tokens = words(llm, 40)
logits(llm, tokens[:8], 4)
def forever():
    try:
        while True: logits(llm, tokens, 1)
    except HobbitError: pass
def daemon(what):
    threading.Thread(target=what, daemon=True).start()
    time.sleep(0.3)
{AT_EXIT[how]}
        """,
        model=model,
        timeout=60,
    )


def test_two_models_one_fails_and_the_other_does_not_notice(model: Path, tmp_path: Path) -> None:
    run(
        """
        a, b = open_model(model), open_model(other, "hobbit", exact=True)
        tokens = words(a, 30)
        want = [logits(m, tokens, 4) for m in (a, b)]
        fail_reads(model, errno.EIO)
        raises(ReadError, logits, a, tokens, 4)
        assert np.array_equal(logits(b, tokens, 4), want[1])
        good_reads()
        a.close()
        assert np.array_equal(logits(b, tokens, 4), want[1])
        """,
        model=model,
        other=tiny_dual("qwen3moe"),
    )
