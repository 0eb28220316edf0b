"""The text of each sampled token, so that text positions (steps, highlights) can be mapped onto the ids that were sampled."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from openrl_reason.core.steps import steps_of_pieces

ANCHOR_CHARACTERS = 16
"""So much of what stands before a text is tokenised along with it, where a tokenizer marks the beginning of texts."""


@functools.lru_cache(maxsize=16)
def marks_beginnings(tokenizer: Any) -> bool:
    """Whether a text has another first token than it would have behind a line feed: a blank in front, as SentencePiece has it."""
    alone, behind, line_feed = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "\na", "\n"))
    return behind != [*line_feed, *alone]


def continued_ids(text: str, tokenizer: Any, before: str) -> list[int]:
    """Token ids of a text that continues ``before``: a tokenizer that marks the beginning of a text must not do so in the middle of one."""
    for anchor in (before[-ANCHOR_CHARACTERS:], "\n") if before and text and marks_beginnings(tokenizer) else ():
        behind, alone = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (anchor + text, anchor))
        if behind[: len(alone)] == alone:
            return list(behind[len(alone) :])
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


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


def token_byte_lengths(tokenizer: Any) -> np.ndarray | None:
    """int64 [vocabulary]: how many bytes of UTF-8 each token stands for, special tokens included; None unless the vocabulary is byte-level.

    There a text's tokens join to exactly its bytes (after Unicode normalisation, where the tokenizer has one), so a sum over ids tells where in
    the text a token stands, many times faster than decoding them one by one."""
    from tokenizers.decoders import ByteLevel
    from tokenizers.pre_tokenizers import ByteLevel as ByteLevelAlphabet

    if not isinstance(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None), ByteLevel):
        return None
    alphabet = set(ByteLevelAlphabet.alphabet())
    vocabulary = tokenizer.get_vocab()
    lengths = np.zeros(max(vocabulary.values()) + 1, np.int64)
    for token, index in vocabulary.items():
        lengths[index] = len(token) if alphabet.issuperset(token) else len(token.encode("utf-8", "surrogatepass"))
    return lengths


def token_steps(steps: Sequence[str], pieces: Sequence[str]) -> np.ndarray:
    """int32 [T]: the step that each token belongs to, by the first character it adds."""
    return steps_of_pieces(steps, pieces)
