"""Who runs in a benchmark: names, settings, and commands of other programs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any, Dict, List, Optional, Tuple

from hobbit_cpp.errors import ParameterError
from hobbit_cpp.params import OffloadParams

__all__ = ["DEFAULT_REGEX", "Contender", "parse_command", "parse_contenders"]

DEFAULT_REGEX = r"([0-9]+(?:\.[0-9]+)?)\s*(?:tok(?:en)?s?/s\b|tok(?:en)?s? per second|t/s\b)"
"""Finds the speed in the output of most engines; the last match counts."""

USUAL_READ_AHEAD = 128
"""KiB: what block devices ordinarily have."""

_OPTIONS = {f.name: f for f in fields(OffloadParams)}


@dataclass(frozen=True)
class Contender:
    """One column of the comparison.

    Attributes:
        name: as in the table.
        kind: "offload" (the engine), "stock" (llama.cpp without it), or "command" (another program).
        mode: of the engine.
        options: further `OffloadParams`.
        mmap: of stock llama.cpp: weights are mapped (else: read into memory, and then no cap is set).
        read_ahead: of the block device, in KiB; None: as it is.
        command: for the shell; {model}, {memory} (bytes), {tokens}, {prompt_tokens}, {threads} and {text} are filled in.
        regex: its first group is tokens a second; the last match in the output counts.
        everything: every expert is cached and there is no cap: what the cores can do.
    """

    name: str
    kind: str
    mode: str = ""
    options: Dict[str, Any] = field(default_factory=dict)
    mmap: bool = True
    read_ahead: Optional[int] = None
    command: str = ""
    regex: str = DEFAULT_REGEX
    everything: bool = False

    @property
    def capped(self) -> bool:
        """Whether it is to run within the memory that is measured."""
        return self.mmap and not self.everything


RESIDENT = Contender("resident", "offload", mode="hobbit", options={"exact": True}, everything=True)


def _known(name: str) -> Optional[Contender]:
    if name == "exact":
        return Contender(name, "offload", mode="hobbit", options={"exact": True})
    if name == "resident":
        return RESIDENT
    if name == "none":
        return Contender(name, "stock", mmap=False)
    found = re.fullmatch(r"mmap(?:-(\d+))?", name)
    if found:
        return Contender(name, "stock", read_ahead=int(found[1]) if found[1] else None)
    # A mode of the engine: which there are, the engine knows.
    return Contender(name, "offload", mode=name) if re.fullmatch(r"[a-z][a-z0-9_-]*", name) else None


def parse_contenders(text: str) -> List[Contender]:
    """ "mmap,lru,hobbit:prefetch_depth=0:low_share=0.1" -> contenders, in this order.

    A name is `mmap` (stock llama.cpp), `mmap-128` (the same with the block device reading 128 KiB ahead), `none` (stock
    llama.cpp with the whole model in memory), `exact`, `resident`, or a mode of the engine; `:key=value` sets an
    `OffloadParams`.

    Raises:
        ParameterError: an unknown name or setting, or one twice.
    """
    out: List[Contender] = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, *settings = item.split(":")
        known = _known(name)
        if known is None:
            raise ParameterError(
                f"{name!r} is no contender: use mmap, mmap-128, none, exact, resident, or a mode such as lru or hobbit"
            )
        options = dict(known.options)
        for setting in settings:
            if known.kind != "offload":
                raise ParameterError(f"{item!r}: {name} has no settings")
            key, value = _setting(item, setting)
            options[key] = value
        OffloadParams(mode=known.mode or "hobbit", **options)  # says what is wrong
        out.append(Contender(**{**known.__dict__, "name": item, "options": options}))
    return _distinct(out)


def _setting(item: str, setting: str) -> Tuple[str, Any]:
    key, equals, text = setting.partition("=")
    if not equals or key not in _OPTIONS or key in ("mode", "eviction_weights"):
        raise ParameterError(f"{item!r}: {setting!r} is no setting; there are: {', '.join(sorted(_OPTIONS.keys() - {'mode'}))}")
    kind = str(_OPTIONS[key].type)
    try:
        if "bool" in kind:
            return key, {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}[text.lower()]
        if "int" in kind:
            return key, int(text)
        if "float" in kind:
            return key, float(text)
    except (KeyError, ValueError):
        raise ParameterError(f"{item!r}: {text!r} is no value of {key}") from None
    return key, text


def parse_command(text: str, regex: str = DEFAULT_REGEX) -> Contender:
    """ "NAME=shell command" -> a contender.

    Raises:
        ParameterError: no name, no command, or a regular expression without a group.
    """
    name, equals, command = text.partition("=")
    if not equals or not name.strip() or not command.strip():
        raise ParameterError(f"--command {text!r}: write 'NAME=shell command'")
    try:
        groups = re.compile(regex).groups
    except re.error as e:
        raise ParameterError(f"--command-regex {regex!r}: {e}") from None
    if groups < 1:
        raise ParameterError(f"--command-regex {regex!r}: put the figure in parentheses")
    return Contender(name.strip(), "command", command=command.strip(), regex=regex)


def _distinct(contenders: List[Contender]) -> List[Contender]:
    names = [c.name for c in contenders]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ParameterError(f"{', '.join(twice)}: given twice")
    if not contenders:
        raise ParameterError("no contenders: give some with --against")
    return contenders
