"""A model file that is damaged, or is replaced, removed or unmounted while a model runs from it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Iterator

import pytest

from faults import run
from models import tiny


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copy(tiny("mixtral", "Q8_0"), tmp_path / "model.gguf"))


def test_a_file_that_is_replaced_or_removed(model: Path) -> None:
    run(
        """
        import shutil
        llm = open_model(model)
        tokens = words(llm, 40)
        want = logits(llm, tokens, 8)
        # Renamed over and unlinked: the open one is read on.
        shutil.copy(other, model + ".new")
        os.replace(model + ".new", model)
        assert np.array_equal(logits(llm, tokens, 8), want)
        os.unlink(model)
        assert np.array_equal(logits(llm, tokens, 8), want)
        llm.close()
        # Overwritten in place by another: would be wrong numbers.
        shutil.copy(whole, model)
        llm = open_model(model)
        assert np.array_equal(logits(llm, tokens, 8), want)
        for content in (open(other, "rb").read(), os.urandom(os.path.getsize(model)), b""):
            with open(model, "r+b") as f:
                f.truncate(len(content))
                f.write(content)
            for _ in range(2):
                e = raises(ReadError, logits, llm, tokens, 8)
                assert model in str(e) and ("overwritten" in str(e) or "short read" in str(e)), e
        with open(model, "r+b") as f:
            f.write(open(whole, "rb").read())
        assert np.array_equal(logits(llm, tokens, 8), want)
        """,
        model=model,
        whole=tiny("mixtral", "Q8_0"),
        other=tiny("qwen3moe", "Q8_0"),
    )


@contextlib.contextmanager
def loop_mount(tmp_path: Path) -> Iterator[Path]:
    """A file system in a file, mounted."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    image, folder = tmp_path / "disk.img", tmp_path / "disk"
    with open(image, "wb") as f:
        f.truncate(64 << 20)
    folder.mkdir()
    tool = shutil.which("mkfs.ext4", path=os.environ["PATH"] + ":/sbin:/usr/sbin")
    if tool is None:
        pytest.skip("no mkfs.ext4 here")
    subprocess.run([tool, "-q", "-O", "^has_journal", str(image)], check=True)
    mount = subprocess.run(["mount", "-o", "loop", str(image), str(folder)], capture_output=True, text=True)
    if mount.returncode != 0:
        pytest.skip(f"no loop mount here: {mount.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def test_a_disk_that_is_unmounted_or_dies(tmp_path: Path) -> None:
    with loop_mount(tmp_path) as disk:
        path = Path(shutil.copy(tiny("mixtral", "Q8_0"), disk / "model.gguf"))
        os.sync()
        run(
            """
            import subprocess
            llm = open_model(model)
            tokens = words(llm, 40)
            want = logits(llm, tokens, 8)
            disk = os.path.dirname(model)
            assert subprocess.run(["umount", disk], capture_output=True).returncode != 0, "it is in use"
            assert subprocess.run(["umount", "-l", disk]).returncode == 0
            assert not os.path.exists(model)
            assert np.array_equal(logits(llm, tokens, 8), want)  # lives until it is closed
            # The disk below loses its end.
            size = os.path.getsize(image)
            whole = open(image, "rb").read()
            os.truncate(image, 1 << 20)
            e = raises(ReadError, logits, llm, tokens, 8)
            assert model in str(e) and (e.errno == errno.EIO or "short read" in str(e)), e
            with open(image, "r+b") as f:
                f.write(whole)
            os.sync()
            assert np.array_equal(logits(llm, tokens, 8), want)
            llm.close()
            """,
            model=path,
            image=tmp_path / "disk.img",
        )


def test_damaged_headers_are_refused_and_crash_nobody(model: Path) -> None:
    """Bytes of metadata and tensor table changed at random. What gets through our checks goes on to llama.cpp, in a child."""
    out = run(
        """
        import random
        good = bytearray(open(model, "rb").read())
        end = good.find(b"blk.3.ffn_up_exps.weight") + 60
        counts = {}
        for seed in range(60):
            rng = random.Random(seed)
            data = bytearray(good)
            table = data.find(b"token_embd.weight") - 8
            for _ in range(rng.choice((1, 2, 8))):
                at = rng.randrange(table, end) if rng.random() < 0.7 else rng.randrange(0, table)
                data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            with open(model, "wb") as f:
                f.write(data)
            pid = os.fork()
            if pid == 0:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                try:
                    Session(model, OffloadParams())
                    code = 0
                except (ModelFormatError, ModelFileError, UnsupportedModelError, NotMoeError) as e:
                    code = 1 if model in str(e) else 3
                except BaseException:
                    code = 4
                os._exit(code)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if sys.version_info >= (3, 9) else 0
            counts[status] = counts.get(status, 0) + 1
        print(counts)
        assert set(counts) <= {0, 1} and counts[1] > 20, counts
        """,
        model=model,
    )
    assert out


def test_a_file_system_that_takes_o_direct_and_reads_through_the_page_cache(model: Path) -> None:
    run(
        """
        llm = open_model(model)
        tokens = words(llm, 40)
        want, direct = logits(llm, tokens, 8), llm.offload_stats().direct_io
        llm.close()
        not_direct()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            llm = open_model(model)
        if direct:  # else there is none where the tests run
            assert any("without direct I/O" in str(w.message) for w in said), said
        assert not llm.offload_stats().direct_io
        assert np.array_equal(logits(llm, tokens, 8), want)
        llm.close()
        """,
        model=model,
    )
