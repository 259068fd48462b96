"""What is decoded: real text, the same tokens for every contender."""

from __future__ import annotations

import contextlib
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional

from hobbit_cpp._texts import beginning_of, decoded, first_tokens
from hobbit_cpp.errors import ParameterError

__all__ = ["Tokens", "bundled_text", "tokens_of"]

# Of the bundled text; enough for any sensible run.
_BUNDLED_BYTES = 1 << 19


@dataclass(frozen=True)
class Tokens:
    """Token ids of the prompt and of what is decoded after it.

    Attributes:
        source: the file's name, or where the bundled text is from.
        sha256: of the text, the first 16 digits: the same text has the same perplexity.
    """

    ids: List[int]
    source: str
    sha256: str


def bundled_text() -> bytes:
    """English prose that comes with every Python: the language reference's topics."""
    import pydoc_data.topics

    topics = pydoc_data.topics.topics
    text = "\n".join(" ".join(topics[name].split()) for name in sorted(topics, key=lambda name: (-len(topics[name]), name)))
    return text.encode()[:_BUNDLED_BYTES]


def tokens_of(model: Path, n: int, text: Optional[Path]) -> Tokens:
    """The first `n` tokens of a text, in the model's vocabulary.

    Raises:
        ParameterError: the text is shorter.
    """
    from hobbit_cpp import Llama

    data = bundled_text() if text is None else text.read_bytes()
    source = "pydoc topics (bundled)" if text is None else text.name
    with contextlib.redirect_stderr(io.StringIO()):  # a context without a model is something that llama.cpp warns of
        vocabulary = Llama(str(model), vocab_only=True, verbose=False)
    try:
        ids = first_tokens(
            lambda part: vocabulary.tokenize(part.encode()), beginning_of(decoded(data, source, whole=text is not None)), n
        )
    finally:
        vocabulary.close()
    if len(ids) < n:
        raise ParameterError(
            f"{source} has {len(ids)} tokens, {n} are needed: give a longer text, fewer --tokens or --prompt-tokens"
        )
    return Tokens(list(ids[:n]), source, hashlib.sha256(data).hexdigest()[:16])
