"""Models that tests share: made once, kept in a cache folder outside of the clone."""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any, Callable

import gguf

import hobbit_cpp.convert
import tiny_models
from hobbit_cpp._build_info import UPSTREAM_COMMIT
from hobbit_cpp.convert import convert

# Now, since tests change these.
_CACHE = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
_BASE = Path(os.environ.get("HOBBIT_CACHE_DIR") or os.path.join(_CACHE, "hobbit-cpp"))


@functools.cache
def cache_dir() -> Path:
    # What the models are made by is part of the name: a change of generator, converter or llama.cpp makes new ones.
    made_by = hashlib.sha256(UPSTREAM_COMMIT.encode())
    quantisers = Path(__file__).resolve().parents[2].glob("csrc/ggml/*.cpp")
    converter = Path(hobbit_cpp.convert.__file__).parent.glob("*.py")
    for source in sorted([Path(__file__), *Path(tiny_models.__file__).parent.glob("*.py"), *converter, *quantisers]):
        made_by.update(source.read_bytes())
    folder = _BASE / "test-models" / made_by.hexdigest()[:12]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="hobbit-test-models-"))
    return folder


def _once(path: Path, make: Callable[[Path], object]) -> Path:
    """`path`, made if it is not there; it appears whole."""
    if not path.is_file():
        partial = path.with_suffix(f".{os.getpid()}")
        make(partial)
        partial.rename(path)
    return path


@functools.cache
def tiny(shape: str, expert_type: str = "F16") -> Path:
    """A random model of a few MB with the routing of `shape`."""
    path = cache_dir() / f"{shape}-{expert_type.lower()}.gguf"
    return _once(path, lambda partial: tiny_models.write_tiny(partial, shape, expert_type=expert_type))


@functools.cache
def tiny_wordy() -> Path:
    """A vocabulary of 50,000, and 200 MB of experts."""
    sizes: Any = {"n_unused": 50_000, "n_layer": 8, "n_expert": 32, "n_ff_exp": 512}
    return _once(cache_dir() / "wordy-f16.gguf", lambda partial: tiny_models.write_tiny(partial, "mixtral", **sizes))


@functools.cache
def tiny_dense() -> Path:
    """A model without routed experts: the first expert of each layer of tiny("mixtral") is its feed-forward network."""
    import gguf

    path = cache_dir() / "dense-f16.gguf"
    if not path.is_file():
        partial = path.with_suffix(f".{os.getpid()}")
        reader = gguf.GGUFReader(tiny("mixtral"))
        writer = gguf.GGUFWriter(partial, "llama")
        for field in reader.fields.values():
            if not field.name.startswith(("GGUF.", "general.architecture", "llama.expert_")):
                sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub_type)
        for tensor in reader.tensors:
            if tensor.name.endswith("_exps.weight"):
                writer.add_tensor(tensor.name.replace("_exps", ""), tensor.data[0])
            elif "ffn_gate_inp" not in tensor.name:
                writer.add_tensor(tensor.name, tensor.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.rename(path)
    return path


@functools.cache
def tiny_dual(shape: str, high: str = "Q8_0", low: str = "Q4_0") -> Path:
    """The same with a low-precision copy of each expert."""
    path = cache_dir() / f"{shape}-{high.lower()}-{low.lower()}.gguf"
    return _once(path, lambda partial: convert(tiny(shape), partial, high=high, low=low, progress=False))


@functools.cache
def tiny_architecture(name: str, high: str = "F16", low: str = "none") -> Path:
    """The model of a row of `tiny_models.ARCHITECTURES`, its experts in a type, and copies in a lower one."""
    path = cache_dir() / f"arch-{name}-{high.lower()}-{low.lower()}.gguf"
    if (high, low) == ("F16", "none"):
        return _once(path, lambda partial: tiny_models.write_architecture(partial, name))
    if high == low:  # which `hobbit convert` would refuse
        return _once(path, lambda part: tiny_models.write_architecture(part, name, expert_type=high, twice=True))
    plain = tiny_architecture(name)
    return _once(path, lambda partial: convert(plain, partial, high=high, low=low, progress=False))


_CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@functools.cache
def tiny_chat(shape: str = "qwen3moe", template: str | None = _CHAT) -> Path:
    """`tiny` with a chat template, or without. It never ends by itself, nor says a byte that is not ASCII or steers a
    terminal: what it says is valid text of any length."""
    made = hashlib.sha256(f"{template} 2".encode()).hexdigest()[:8]  # the number: of this function
    path = cache_dir() / f"{shape}-chat-{made}.gguf"
    if not path.is_file():
        partial = path.with_suffix(f".{os.getpid()}")
        _copy_with_template(tiny(shape), partial, template)
        reader = gguf.GGUFReader(partial, "r+")
        output = next(t for t in reader.tensors if t.name == "output.weight")
        texts = reader.fields["tokenizer.ggml.tokens"].contents()
        for i, text in enumerate(texts):
            # a logit of 0 is far below the best of the others
            if text in ("<unk>", "<s>", "</s>") or (text.startswith("<0x") and not "20" <= text[3:5] <= "7E"):
                output.data[i] = 0
        reader.data.flush()
        partial.rename(path)
    return path


def _copy_with_template(source: Path, target: Path, template: str | None) -> None:
    from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

    reader = gguf.GGUFReader(source)
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, arch=arch, use_temp_file=False)
    new = {}
    if template is not None:
        new["tokenizer.chat_template"] = MetadataDetails(gguf.GGUFValueType.STRING, template)
    copy_with_new_metadata(reader, writer, new, [])
