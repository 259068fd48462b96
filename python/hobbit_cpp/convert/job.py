"""convert(): from a checked start to verified, renamed files, or nothing."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

import threadpoolctl

from hobbit_cpp._memory import processors
from hobbit_cpp._progress import make_progress
from hobbit_cpp._sidecar import ARCHITECTURE as SIDECAR_ARCHITECTURE
from hobbit_cpp._sidecar import FINGERPRINT_KEY, sidecar_path

from .errors import ConvertError
from .ggtypes import TypeTable, load_types
from .header import ALIGNMENT_KEY, Value, string_value, u32_value
from .imatrix import Imatrix, imatrix_path
from .layout import make_layout
from .pairing import check_same_model, check_same_weights
from .plan import ALIGNMENT, LOW_PREFIX, Plan, counterparts, is_expert, make_plan
from .quantise import Quantiser
from .source import Source, Sources
from .target import check_targets, target_paths, writing
from .verify import verify
from .writer import write_data

__all__ = ["FORMAT_VERSION", "ConvertReport", "convert"]

FORMAT_VERSION = 1
# GGML_QNT_VERSION: readers expect it beside quantised tensors.
_QUANTISATION_VERSION = 2
_DEFAULT_LOW = "auto"


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion made."""

    path: Path
    """The new file; the first part of a split one."""
    paths: tuple[Path, ...]
    """All parts."""
    high_type: str
    low_type: str
    """The types, "mixed" where layers differ, "none" without low-precision copies."""
    bytes_dense: int
    bytes_high: int
    bytes_low: int
    bytes_source: int
    """Read from the source."""
    bytes_file: int
    """Of all parts."""
    n_layers: int
    """With routed experts."""
    n_experts: int
    """Of a layer."""
    fallbacks: tuple[str, ...]
    """What the user should know, a line each."""
    seconds: float


def convert(
    src: Path,
    dst: Path | None = None,
    *,
    high: str = "keep",
    low: str | None = _DEFAULT_LOW,
    low_from: Path | None = None,
    sidecar: bool = False,
    imatrix: Path | str | None = None,
    split_max_bytes: int | None = None,
    threads: int | None = None,
    force: bool = False,
    progress: bool | None = None,
) -> ConvertReport:
    """Makes a GGUF with high- and low-precision routed experts of a Mixture-of-Experts GGUF.

    Args:
        src: The model; of a split one any part.
        dst: The new file. It appears whole or not at all. With `sidecar` it may be left out: `model.low.gguf` beside
            `model.gguf`, where it is found when the model is loaded.
        high: Type of the experts, "keep" for that of the source.
        low: Type of the low-precision copies, None for no copies; "auto": what is worth reading beside the high precision
            (docs/low-types.md), for some types nothing.
        low_from: Another checkpoint of the same model, in a smaller precision: its experts are the copies, as they are.
        sidecar: Write only the low-precision copies, bound to `src` by a hash of its experts; `src` stays as it is.
        imatrix: An importance matrix of llama.cpp, used for all experts that are quantised. None: `model.imatrix.gguf` beside
            `model.gguf` (`hobbit imatrix`), if it is there; "none": none.
        split_max_bytes: Write parts of at most this size, `dst-00001-of-0000N.gguf`. A tensor is never divided.
        threads: How many; all processors by default.
        force: Replace `dst` if it exists.
        progress: True: on stderr; False: none; None: on a terminal.

    Raises:
        ConvertError: One line that says what to do.
    """
    start = time.monotonic()
    src = Path(src)
    _check_options(high, low, low_from, sidecar, dst, split_max_bytes, threads)
    dst = sidecar_path(src) if dst is None else Path(dst)
    quantises = high.lower() != "keep" or (low_from is None and low is not None and low.lower() != "none")
    found = imatrix is None and quantises and imatrix_path(src).is_file()
    matrix = imatrix_path(src) if found else None if imatrix in (None, "none") else Path(str(imatrix))
    types = load_types()
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(Source(src, types))
        if source.header.string("general.architecture") == SIDECAR_ARCHITECTURE:
            raise ConvertError(f"{src} is a sidecar, which has only low-precision copies: convert the model it was made for")
        others = []
        if low_from is not None:
            others.append(stack.enter_context(_open_low(Path(low_from), source, types)))
        sources = Sources(source, *others)
        weights: Imatrix | None = None
        notes: list[str] = []
        if matrix is not None:
            weights, notes = _open_imatrix(stack, matrix, source, found)
            # numpy's own threads would get in the way of ours; and its results are those of one thread when they are verified
            stack.enter_context(threadpoolctl.threadpool_limits(1))
        plan = make_plan(
            source.tensors,
            types,
            high,
            low,
            low_from=[t for other in others for t in other.tensors] if others else None,
            imatrix=None if weights is None else weights.names,
            sidecar=sidecar,
        )
        quantiser = Quantiser(weights)
        if others:
            experts = [t for t in source.tensors if is_expert(t.name, t.shape) and not t.name.startswith(LOW_PREFIX)]
            check_same_weights(list(zip(experts, counterparts(experts, others[0].tensors))), sources, quantiser)

        layout = make_layout(plan.outputs, _metadata(source, others, weights, plan, sidecar), split_max_bytes)
        paths = target_paths(dst, layout)
        inputs = [path for one in (source, *others) for path in one.paths]
        check_targets(paths, inputs if matrix is None else [*inputs, matrix], force)
        bytes_source = sum(t.n_bytes for t in {o.source for o in plan.outputs})
        with writing(paths, layout, force) as files:
            bar = make_progress("converting", "bytes", progress)
            try:
                write_data(sources, files, quantiser, threads or len(processors()), lambda done: bar.update(done, bytes_source))
            finally:
                bar.close()
            # before: what changed is not to be blamed on the disk; after: the samples were taken from what was converted
            for one in (source, *others):
                one.check_unchanged()
            verify(files, sources, types, quantiser)
            for one in (source, *others):
                one.check_unchanged()

    return ConvertReport(
        path=paths[0] if len(paths) > 1 else dst,
        paths=tuple(paths),
        high_type=plan.high_type,
        low_type=plan.low_type,
        bytes_dense=plan.role_bytes("dense"),
        bytes_high=plan.role_bytes("high"),
        bytes_low=plan.role_bytes("low"),
        bytes_source=bytes_source,
        bytes_file=sum(file.size for file in layout),
        n_layers=plan.n_layers,
        n_experts=plan.n_experts,
        fallbacks=(*plan.notes, *notes),
        seconds=time.monotonic() - start,
    )


def _check_options(
    high: str,
    low: str | None,
    low_from: Path | None,
    sidecar: bool,
    dst: Path | None,
    split_max_bytes: int | None,
    threads: int | None,
) -> None:
    if threads is not None and threads < 1:
        raise ConvertError("threads must be at least 1")
    if split_max_bytes is not None and split_max_bytes < 1:
        raise ConvertError("the size of a part must be positive")
    if low_from is not None and low != _DEFAULT_LOW:
        raise ConvertError("the low precision is either made (low) or taken from a file (low_from): give one of them")
    if sidecar and high.lower() != "keep":
        raise ConvertError("a sidecar leaves the model as it is: there is no high precision to choose")
    if sidecar and low_from is None and (low is None or low.lower() == "none"):
        raise ConvertError("a sidecar without low-precision copies would be empty: choose a type for them")
    if dst is None and not sidecar:
        raise ConvertError("the name of the new file is missing")


def _open_low(path: Path, source: Source, types: TypeTable) -> Source:
    low = Source(path, types, first_part=len(source.paths))
    try:
        check_same_model(source, low)
    except BaseException:
        low.close()
        raise
    return low


def _open_imatrix(stack: contextlib.ExitStack, path: Path, source: Source, found: bool) -> tuple[Imatrix, list[str]]:
    """An importance matrix, and what the user should know. `found`: nobody named it."""
    try:
        weights = stack.enter_context(Imatrix(path))
        notes = weights.check(t for t in source.tensors if is_expert(t.name, t.shape))
    except ConvertError as e:
        if found:
            raise ConvertError(f"{e} (it lies beside the model: --imatrix none ignores it)") from e
        raise
    if found:
        notes.append(f"{path} is used, the importance matrix that lies beside the model (--imatrix none: not)")
    return weights, notes


def _metadata(source: Source, others: list[Source], weights: Imatrix | None, plan: Plan, sidecar: bool) -> dict[str, Value]:
    """The metadata of the source, byte for byte, with ours in place of an earlier conversion's; a sidecar has only ours."""
    values = {k: v for k, v in source.values.items() if not k.startswith(("split.", "hobbit."))}
    if sidecar:
        values = {"general.architecture": string_value(SIDECAR_ARCHITECTURE)}
        values[FINGERPRINT_KEY] = string_value(_fingerprint(source))
    values[ALIGNMENT_KEY] = u32_value(ALIGNMENT)
    values.setdefault("general.quantization_version", u32_value(_QUANTISATION_VERSION))
    values["hobbit.version"] = u32_value(FORMAT_VERSION)
    if not sidecar:
        values["hobbit.high_type"] = string_value(plan.high_type)
    values["hobbit.low_type"] = string_value(plan.low_type)
    values["hobbit.source"] = _name_value(source.path)
    for other in others:
        values["hobbit.low_source"] = _name_value(other.path)
    if weights is not None:
        values["hobbit.imatrix"] = _name_value(weights.path)
    values["hobbit.converter"] = string_value(_package_version())
    return values


def _fingerprint(source: Source) -> str:
    from hobbit_cpp._handle import fingerprint
    from hobbit_cpp.errors import HobbitError

    try:
        return fingerprint(str(source.paths[0]))
    except ConvertError:
        raise
    except HobbitError as e:
        raise ConvertError(f"no sidecar can be made for this model: {e}") from e


def _name_value(path: Path) -> Value:
    return string_value(path.name.encode("utf-8", "replace").decode())


def _package_version() -> str:
    import hobbit_cpp

    return f"hobbit-cpp {hobbit_cpp.__version__}"
