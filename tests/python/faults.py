"""Programs in a process of their own, in which reads and threads fail when told to (tests/cpp/faults.c).

out = run('''
    llm = open_model(model)
    fail_reads(model, errno.EIO, count=1)
    ...
    print("done")
''', model=path)
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from unpatched import lib_for_tests

# What programs find ready. `model` and the like are the keyword arguments of run().
PRELUDE = """
import ctypes, errno, faulthandler, gc, os, re, resource, signal, sys, threading, time, warnings
faulthandler.enable()
faulthandler.dump_traceback_later(100, exit=True)
warnings.simplefilter("ignore")
import numpy as np
from hobbit_cpp import *
from hobbit_cpp._session import Session
from decode import load, logits, words

_lib = ctypes.CDLL(os.environ["HOBBIT_FAULTS"])
_lib.faults_set.argtypes = [ctypes.c_char_p, *[ctypes.c_int] * 2, ctypes.c_longlong, ctypes.c_long, ctypes.c_long]
_lib.faults_hits.restype = ctypes.c_long
_lib.faults_threads.argtypes = [ctypes.c_long]

def fail_reads(path, code, skip=0, count=-1, beyond=0): _lib.faults_set(path.encode(), 1, code, beyond, skip, count)
def halve_reads(path): _lib.faults_set(path.encode(), 2, 0, 0, 0, -1)
def end_reads(path, count=-1): _lib.faults_set(path.encode(), 3, 0, 0, 0, count)
def slow_reads(path, ms): _lib.faults_set(path.encode(), 4, ms, 0, 0, -1)
def good_reads(): _lib.faults_set(b"", 0, 0, 0, 0, 0)
def hits(): return _lib.faults_hits()
def not_direct(): _lib.faults_not_direct()
def no_threads_after(n): _lib.faults_threads(n)

def smallest(path): return Session(path, OffloadParams()).info.pool_min
def open_model(path, offload="lru", pool=None, **kwargs):
    return load(Llama, path, kwargs.pop("threads", 1), offload=offload, expert_cache=pool or smallest(path), **kwargs)
def tasks(): return len(os.listdir("/proc/self/task"))
def fds(): return len(os.listdir("/proc/self/fd"))
def resident(): return int(open("/proc/self/statm").read().split()[1]) * 4096
def raises(error, call, *args):
    try: call(*args)
    except error as e: return e
    raise AssertionError(f"{error} was not raised")
"""


def run(program: str, timeout: float = 150, **names: Any) -> str:
    """What the program printed. It must end well, and Python must not complain on stderr (llama.cpp may)."""
    library = lib_for_tests("libhobbit-faults.so")
    preload = f"{os.environ.get('LD_PRELOAD', '')} {library}".strip()
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    env = dict(os.environ, HOBBIT_FAULTS=str(library), LD_PRELOAD=preload, PYTHONPATH=path)
    given = "".join(f"{name} = {(str(v) if isinstance(v, Path) else v)!r}\n" for name, v in names.items())
    source = PRELUDE + given + textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-c", source], env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    complaints = ("Traceback", "Exception ignored", "Fatal", "terminate called")
    assert not any(text in done.stderr for text in complaints), done.stderr
    return done.stdout
