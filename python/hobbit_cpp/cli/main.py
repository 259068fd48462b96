"""Reads the arguments, calls the command, turns what goes wrong into one line and an exit code.

Exit codes: 0; 1 for an error; 2 for wrong usage; 130 after Ctrl-C; 141 when the reader of a pipe went away.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from . import bench, calibrate, chat, convert, evaluate, imatrix, inspect, plan, replay, report, run, serve, trace
from .output import debugging, one_line
from .signals import sigint_is_heard

__all__ = ["build_parser", "main"]

EXIT_ERROR, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 1, 130, 141


class _VersionAction(argparse.Action):
    """--version. Loads the libraries, to say what really runs, so only on demand."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from .version import version_text

        print(version_text())
        parser.exit(0)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands. Commands import what they need when they run, so that this is quick."""
    parser = argparse.ArgumentParser(prog="hobbit", description="Runs Mixture-of-Experts GGUF models larger than memory.")
    parser.add_argument("--version", action=_VersionAction, nargs=0, help="versions of the package and of llama.cpp")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for module in (chat, convert, imatrix, inspect, run, serve, plan, bench, evaluate, calibrate, trace, replay, report):
        module.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit code."""
    parser = build_parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else EXIT_ERROR
    except Exception as e:  # --version, in an installation that is not whole
        return _complain(e, debug=debugging())
    if args.command is None:
        parser.print_usage(sys.stderr)
        print("hobbit: a command is missing: hobbit --help lists them", file=sys.stderr)
        return 2
    command: Callable[[argparse.Namespace], int] = args.function
    try:
        with sigint_is_heard(), warnings.catch_warnings():
            warnings.showwarning = _warn
            code = command(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print(f"hobbit: interrupted{getattr(args, 'when_interrupted', '')}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Python would flush stdout again at exit, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except Exception as e:
        return _complain(e, debug=debugging() or getattr(args, "verbose", False))


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    """A warning is one line too, without the source line that Python shows."""
    print(f"hobbit: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _complain(e: Exception, debug: bool) -> int:
    """One line on stderr; the traceback as well when asked for."""
    if debug:
        import traceback

        traceback.print_exc()
    print(f"hobbit: {one_line(e)}", file=sys.stderr)
    return EXIT_ERROR
