"""Reads that fail, memory and threads that there are not. Each ends in a clear exception or just works, and the object is usable
afterwards."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from faults import run
from models import tiny


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copy(tiny("mixtral", "Q8_0"), tmp_path / "model.gguf"))


# ---- reads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 40], ids=["token", "streamed batch"])
def test_eio_in_mid_token_says_where_and_the_object_goes_on(model: Path, chunk: int) -> None:
    run(
        """
        llm = open_model(model)
        tokens = words(llm, 40)
        want = logits(llm, tokens, chunk)
        before = tasks(), fds()
        for skip in (0, 1, 7, 40):
            llm.reset()
            fail_reads(model, errno.EIO, skip=skip, count=1)
            e = raises(ReadError, logits, llm, tokens, chunk)
            assert hits() == 1 and e.errno == e.os_errno == errno.EIO, e
            offset = re.search(r"at offset (\\d+) of " + re.escape(model) + " failed: Input/output error", str(e))
            assert offset and int(offset[1]) < os.path.getsize(model), e
            # What was complete stays; what failed is not there.
            done = llm.n_tokens
            assert done % chunk == 0 and done < 40
            llm.eval(tokens[done : done + chunk])
            assert np.array_equal(llm.scores[done : done + chunk], want[done : done + chunk])
            assert np.array_equal(logits(llm, tokens, chunk), want)
        fail_reads(model, errno.EIO)
        for _ in range(3):
            raises(ReadError, logits, llm, tokens, chunk)
        good_reads()
        assert np.array_equal(logits(llm, tokens, chunk), want)
        assert (tasks(), fds()) == before
        llm.close()
        """,
        model=model,
        chunk=chunk,
    )


def test_a_row_of_the_embeddings_that_cannot_be_read(model: Path) -> None:
    run(
        """
        llm = open_model(model, OffloadParams(exact=True, embeddings_on_disk=True))
        assert llm._session.embeddings_on_disk
        llm.eval([5, 6])
        fail_reads(model, errno.EIO, count=1)  # the first read of a token
        e = raises(ReadError, llm.eval, [7])
        assert hits() == 1 and e.errno == errno.EIO and llm.n_tokens == 2
        llm.eval([7])
        got = np.ctypeslib.as_array(llm._ctx.get_logits(), (llm.n_vocab(),)).copy()
        llm.close()
        stock = load(Llama, model, 1)
        stock.eval([5, 6])
        stock.eval([7])
        assert np.array_equal(got, np.ctypeslib.as_array(stock._ctx.get_logits(), (stock.n_vocab(),)))
        """,
        model=model,
    )


def test_eio_in_completions_and_streams(model: Path) -> None:
    run(
        """
        llm = open_model(model)
        want = llm.create_completion("the expert", max_tokens=12, temperature=0)["choices"][0]["text"]
        for stream in (False, True):
            fail_reads(model, errno.EIO, skip=200, count=1)
            raises(ReadError, lambda: list(llm.create_completion("the expert", max_tokens=40, temperature=0, stream=stream)))
            good_reads()
            assert llm.create_completion("the expert", max_tokens=12, temperature=0)["choices"][0]["text"] == want
        """,
        model=model,
    )


def test_failing_prefetches_are_silent_and_exact_stays_exact(model: Path) -> None:
    """Of all reads every other fails once, prefetches and demands: those that nobody waited for are nobody's error."""
    run(
        """
        params = OffloadParams(exact=True, prefetch_depth=2, prefetch_always=True, io_threads=2)
        llm = open_model(model, params, pool=3 * smallest(model))
        tokens = words(llm, 60)
        want = logits(llm, tokens, 1)
        failed = 0
        for round in range(30):
            llm.reset()
            fail_reads(model, errno.EIO, skip=round, count=1 + round % 5)
            at = 0
            while at < 60:
                try:
                    llm.eval(tokens[at : at + 1])
                except ReadError:
                    failed += 1
                else:
                    at += 1
            assert np.array_equal(llm.scores[:60], want)
            s = llm.offload_stats()
            assert s.prefetches_useful + s.prefetches_late + s.prefetches_wasted <= s.prefetches
        assert s.prefetches > 0
        llm.close()
        """,
        model=model,
    )


def test_short_reads_and_interrupted_reads_just_work(model: Path) -> None:
    run(
        """
        llm = open_model(model, OffloadParams(exact=True, prefetch_depth=1, prefetch_always=True))
        tokens = words(llm, 40)
        want = logits(llm, tokens, 8)
        for begin in (lambda: halve_reads(model), lambda: fail_reads(model, errno.EINTR, count=20)):
            begin()
            assert np.array_equal(logits(llm, tokens, 8), want)
            assert hits() > 0
        # An end of file that is none: the file is whole, a read says otherwise.
        end_reads(model, count=1)
        e = raises(ReadError, logits, llm, tokens, 8)
        assert e.os_errno is None and "short read" in str(e) and model in str(e)
        good_reads()
        assert np.array_equal(logits(llm, tokens, 8), want)
        """,
        model=model,
    )


def test_a_disk_that_fails_while_the_model_is_loaded(model: Path) -> None:
    """In the header, in the dense weights, nowhere."""
    run(
        """
        before, n, skip = None, 1, 0
        while n > 0:
            skip += 1 + skip // 6
            fail_reads(model, errno.EIO, skip=skip, count=1)
            try:
                llm = open_model(model, pool="50%")
            except HobbitError as e:
                assert model in str(e) and "Input/output error" in str(e) and e.os_errno == errno.EIO, e
                continue
            finally:
                n = hits()
                good_reads()
            llm.eval([1, 2, 3])
            llm.close()
            before = before or (tasks(), fds())
        gc.collect()
        assert skip > 20
        assert (tasks(), fds()) == before
        """,
        model=model,
    )


# ---- memory and threads ----------------------------------------------------------------------------------------------


@pytest.mark.no_asan
def test_no_memory_for_the_pool(model: Path) -> None:
    run(
        """
        llm = open_model(model)
        want = logits(llm, words(llm, 20), 4)
        llm.close()
        before = tasks(), fds()
        used = int(open("/proc/self/statm").read().split()[0]) * 4096
        pool = Session(model, OffloadParams()).info.pool_max
        # Everything but the pool still fits, or hardly anything.
        for extra in (pool + (24 << 20), pool // 2, 8 << 20, 1 << 20):
            resource.setrlimit(resource.RLIMIT_AS, (used + extra, resource.RLIM_INFINITY))
            try:
                open_model(model, pool="100%").close()
            except (HobbitError, ValueError, MemoryError) as e:
                assert str(e), repr(e)
            else:
                assert extra > pool
            finally:
                resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            gc.collect()
            assert (tasks(), fds()) == before
        llm = open_model(model)
        assert np.array_equal(logits(llm, words(llm, 20), 4), want)
        """,
        model=model,
    )


def test_threads_that_cannot_be_started(model: Path) -> None:
    run(
        """
        params = OffloadParams(io_threads=4, prefetch_depth=1)
        open_model(model, params).close()
        before = tasks(), fds()
        for n in range(6):
            session = Session(model, params)
            no_threads_after(n)
            error = session._ffi.new("hobbit_error *")
            status = session._lib.hobbit_session_start(session._handle, session.info.pool_max, error)
            no_threads_after(-1)
            message = session._ffi.string(error.message).decode()
            if n < 5:
                assert status == session._lib.HOBBIT_ERR_NO_MEMORY and error.os_errno == errno.EAGAIN, (n, status, message)
                assert "thread" in message, message
                assert tasks() == before[0]
                assert session._lib.hobbit_session_start(session._handle, session.info.pool_max, error) == 0  # later it can
            else:
                assert status == 0
            session.close()
        assert (tasks(), fds()) == before
        """,
        model=model,
    )


@pytest.mark.no_asan
def test_constructors_that_fail_leave_nothing(model: Path, tmp_path: Path) -> None:
    corrupt, cut = tmp_path / "corrupt.gguf", tmp_path / "cut.gguf"
    corrupt.write_bytes(model.read_bytes().replace(b"blk.1.attn_q.weight", b"blk.1.attn_z.weight"))
    cut.write_bytes(model.read_bytes()[:-1000])
    run(
        """
        def attempts():
            yield ParameterError, lambda: open_model(model, OffloadParams(io_threads=0))
            yield HobbitError, lambda: open_model(corrupt)
            yield ModelFormatError, lambda: open_model(cut)
            yield MemoryBudgetError, lambda: load(Llama, model, 1, offload="hobbit", memory="30MiB")
            yield Exception, lambda: load(Llama, model, 1, offload="hobbit", memory=resident() + (28 << 20))
            yield Exception, lambda: open_model(model, lora_path="/nowhere")
            yield Exception, lambda: open_model(model, chat_handler=1, n_ctx=-5)
        def round():
            for error, call in attempts():
                if error is Exception:
                    with __import__("contextlib").suppress(Exception): call()
                else:
                    raises(error, call)
            gc.collect()
        for _ in range(5):
            round()
        before = tasks(), fds()
        start = resident()
        for _ in range(45):
            round()
        assert (tasks(), fds()) == before
        growth = resident() - start
        assert growth < 8 << 20, growth
        """,
        model=model,
        corrupt=corrupt,
        cut=cut,
        timeout=300,
    )
