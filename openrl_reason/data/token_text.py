"""The text of each sampled token, so that text positions (steps, highlights) can be mapped onto the ids that were sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from openrl_reason.core.steps import steps_of_pieces


def token_pieces(tokenizer: Any, token_ids: Sequence[int], text: str) -> list[str] | None:
    """Text that each token adds to ``text``, the decoded ids without special tokens; ``"".join(result) == text``.

    A character of several tokens appears with the last of them, and the others add nothing. None where the tokenizer cannot say: it has no
    streaming decoder, or cleans up text in a way that is not a concatenation.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not len(token_ids):
        return None if len(token_ids) else []
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=True)
    try:
        pieces = [stream.step(backend, int(token)) or "" for token in token_ids]
    except Exception:  # noqa: BLE001  the decoder raises bare Exceptions for byte sequences it cannot stream; the text itself is still right
        return None
    joined = "".join(pieces)
    if not text.startswith(joined):
        return None
    pieces[-1] += text[len(joined) :]  # bytes that never became a character
    return pieces


def token_steps(steps: Sequence[str], pieces: Sequence[str]) -> np.ndarray:
    """int32 [T]: the step that each token belongs to, by the first character it adds."""
    return steps_of_pieces(steps, pieces)
