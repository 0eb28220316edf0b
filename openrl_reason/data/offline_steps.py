"""The step that each token of a response belongs to, for text that was tokenised here: by the bytes that tokens add, or by decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from openrl_reason.core.steps import split_steps, steps_of_tokens
from openrl_reason.data.token_text import token_byte_lengths, token_pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class StepMap:
    """Cuts responses by one kind of steps and maps the cuts onto tokens.

    ``kind`` is one of ``core.steps``, where a token belongs to the step of its first character, or "oreo", the published rule (arXiv
    2412.16145): lines, or with ``sentences`` also after ". " and ".$ "; a token belongs to the step of its *last* character, and behind a line
    feed at the very end a step begins (in lines only). On tokens of one character the rules differ in that last step alone."""

    def __init__(self, kind: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.kind, self._tokenizer = kind, tokenizer
        self._bytes_of = token_byte_lengths(tokenizer)

    def steps(self, token_ids: Sequence[int], response: str, tail: str, *, sentences: bool = False) -> np.ndarray | None:
        """int32 [T]: the step of each token of ``response + tail``; the tail (a space, an end-of-turn token) extends the last step unless it is a
        blank, which the kind may cut off. None where the tokenizer cannot tell which characters a token stands for."""
        ids = np.asarray(token_ids, np.int64)
        if self._bytes_of is not None:
            lengths = self._bytes_of[ids]
            if int(lengths.sum()) == len((response + tail).encode("utf-8", "surrogatepass")):
                return self._of_lengths(lengths, response, tail, sentences, as_bytes=True)
        text = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        pieces = token_pieces(self._tokenizer, token_ids, text)
        if pieces is None:
            return None
        ended = tail if tail and text.endswith(tail) else ""
        lengths = np.array([len(piece) for piece in pieces], np.int64)
        return self._of_lengths(lengths, text[: len(text) - len(ended)], ended, sentences, as_bytes=False)

    def _of_lengths(self, lengths: np.ndarray, response: str, tail: str, sentences: bool, *, as_bytes: bool) -> np.ndarray:
        starts_T = lengths.cumsum() - lengths
        if self.kind == "oreo":
            first_of_step = _published_starts(response, sentences, as_bytes)
            last_T = starts_T + np.maximum(lengths, 1) - 1
            return (np.searchsorted(first_of_step, last_T, side="right") - 1).astype(np.int32)
        steps = split_steps(response + (tail if tail.isspace() else ""), self.kind)
        return steps_of_tokens([_encoded(step) for step in steps] if as_bytes else steps, starts_T)


def _published_starts(response: str, sentences: bool, as_bytes: bool) -> np.ndarray:
    """int64 [S]: where each step begins, in bytes or characters; the first is 0."""
    if sentences:
        steps = split_steps(response, "newline_sentence")[:-1]
    else:
        steps = [line + "\n" for line in response.split("\n")[:-1]]
    lengths = [len(_encoded(step)) if as_bytes else len(step) for step in steps]
    return np.array([0, *lengths], np.int64).cumsum()


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
