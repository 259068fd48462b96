"""A vocabulary of any size that can spell any text: bytes, ASCII, and pieces that never occur."""

from __future__ import annotations

import struct
from typing import Dict, List

from hobbit_cpp.convert.header import Value, string_value, u32_value

__all__ = ["vocabulary"]

_I32, _F32, _BOOL, _STRING, _ARRAY = 5, 6, 7, 8, 9
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6


def vocabulary(size: int) -> Dict[str, Value]:
    """The tokenizer's keys, for `size` (at least 512) tokens of the SentencePiece kind."""
    texts: List[str] = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [_UNKNOWN, _CONTROL, _CONTROL] + [_BYTE] * 256
    texts += ["\u2581", *map(chr, range(0x21, 0x7F))]
    texts += [f"\u2581<{i}>" for i in range(len(texts), size)]
    types += [_NORMAL] * (size - len(types))
    scores = [0.0 if kind != _NORMAL else -float(i) for i, kind in enumerate(types)]
    return {
        "tokenizer.ggml.model": string_value("llama"),
        "tokenizer.ggml.pre": string_value("default"),
        "tokenizer.ggml.tokens": _array(_STRING, size, b"".join(string_value(text).raw for text in texts)),
        "tokenizer.ggml.scores": _array(_F32, size, struct.pack(f"<{size}f", *scores)),
        "tokenizer.ggml.token_type": _array(_I32, size, struct.pack(f"<{size}i", *types)),
        "tokenizer.ggml.unknown_token_id": u32_value(0),
        "tokenizer.ggml.bos_token_id": u32_value(1),
        "tokenizer.ggml.eos_token_id": u32_value(2),
        "tokenizer.ggml.add_bos_token": Value(_BOOL, b"\1"),
        "tokenizer.ggml.add_eos_token": Value(_BOOL, b"\0"),
    }


def _array(kind: int, n: int, data: bytes) -> Value:
    return Value(_ARRAY, struct.pack("<IQ", kind, n) + data)
