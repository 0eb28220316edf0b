"""Prompts to a judge in which the judged text stays text: it cannot close its fence, and it cannot become a control token.

The fence of a text is a hash of that text (keyed, so that it differs from run to run): to contain its own fence, a text would have to contain
its own hash. The fence of a question is thus the same for all responses to it, and engines compute their common prefix once. What
looks like one of the tokenizer's control tokens (``<|im_end|>``) is broken up by a space before it is tokenised, and the ids are looked at again
afterwards.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openrl_reason.tasks.base import render_chat

MATERIAL = ("question", "gold", "response", "previous", "step")
"""Fields that come from elsewhere and are therefore fenced."""
_CUT_FIRST = {"previous": "its beginning", "response": "its middle", "step": "its middle"}
_FIELD = re.compile(r"\{(" + "|".join(MATERIAL) + r")\}")
_MARKER = "Q7zfield{}fieldZ7Q"  # survives any chat template, which sees markers instead of the material

_CODE = re.compile(_MARKER.format(f"code({'|'.join(MATERIAL)})"))


class DoesNotFit(Exception):
    """The prompt is longer than the judge can read, and may not (or cannot) be cut."""


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids of one prompt, and what had to be done to the material."""

    ids: list[int]
    num_cut: int
    """Tokens of the material that were left out."""
    num_broken: int
    """Control tokens in the material that were broken up."""


class PromptEncoder:
    """Makes token ids out of a template and material, for one tokenizer.

    Args:
        key: enters every fence.
    """

    def __init__(self, tokenizer: Any, key: bytes) -> None:
        self.tokenizer, self._key = tokenizer, key
        # Some vocabularies list runs of spaces among the added tokens: those are ordinary text.
        added = {text: index for text, index in tokenizer.get_added_vocab().items() if text.strip()}
        self._control_ids = frozenset(added.values()) | frozenset(tokenizer.all_special_ids)
        texts = sorted({*added, *(str(token) for token in tokenizer.all_special_tokens)} - {""}, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, texts))) if texts else None
        self._rendered: dict[tuple[str, str], list[str]] = {}

    def fences(self, material: Mapping[str, str]) -> dict[str, str]:
        """The code on the marker lines of each text: 16 hex digits that occur nowhere in the material."""
        return {name: self._fence(name, text, material.values()) for name, text in material.items()}

    def _fence(self, name: str, text: str, everything: Collection[str]) -> str:
        content = f"{name}={text}".encode("utf-8", "surrogatepass")
        counter = 0
        while True:
            code = hmac.new(self._key, content + counter.to_bytes(4, "big"), hashlib.blake2b).hexdigest()[:16]
            if not any(code in other.lower() for other in everything):
                return code
            counter += 1

    def break_up(self, text: str) -> tuple[str, int]:
        """The text with every control token's text broken by a space, and how many there were."""
        text = text.encode("utf-8", "replace").decode()  # lone surrogates, which no tokenizer takes
        if self._control is None:
            return text, 0
        return self._control.subn(lambda match: match[0][0] + " " + match[0][1:], text)

    def encode(
        self, template: str, material: Mapping[str, str], *, answer_prefix: str, room: int, limit: int = 0, may_cut: bool = True
    ) -> EncodedPrompt:
        """Token ids of ``template`` as a user's message (or, without a chat template, as plain text), ending where the answer begins.

        Args:
            answer_prefix: put at the end of plain text.
            room: the most ids.
            limit: the most tokens of a response or step; 0: no limit of its own.
            may_cut: leave out tokens of previous, then of response or step, where room or limit ask for it.

        Raises:
            DoesNotFit: see there.
        """
        fences, broken = self.fences(material), 0
        parts: list[tuple[str, list[int]]] = []  # (field or "", ids)
        for index, piece in enumerate(self._pieces(template, answer_prefix)):
            if index % 2 == 0:
                text = _CODE.sub(lambda match: fences[match[1]], piece)
                parts.append(("", self._tokenise(text, first=index == 0)))
            else:
                text, count = self.break_up(material[piece])
                broken += count
                ids = self._tokenise(text)
                if not self._control_ids.isdisjoint(ids):
                    raise DoesNotFit(f"the {piece} holds a control token of the judge that could not be broken up")
                parts.append((piece, ids))
        ids, cut = self._fit(parts, room, limit, may_cut)
        return EncodedPrompt(ids, cut, broken)

    def _pieces(self, template: str, answer_prefix: str) -> list[str]:
        """Text and field names in turn, the first and last a text. A field's marker lines belong to the texts, with markers for their codes."""
        key = (template, answer_prefix)
        if key not in self._rendered:
            marked = _FIELD.sub(lambda match: _MARKER.format(match[1]), template)
            if self.tokenizer.chat_template:
                text = render_chat([{"role": "user", "content": marked}], self.tokenizer)
            else:
                text = f"{marked}\n\n{answer_prefix}"
            pieces = re.split(_MARKER.format(f"({'|'.join(MATERIAL)})"), text)
            for index in range(1, len(pieces), 2):
                name, code = pieces[index], _MARKER.format("code" + pieces[index])
                pieces[index - 1] += f"<<<{name} {code}>>>\n"
                pieces[index + 1] = f"\n<<<end of {name} {code}>>>" + pieces[index + 1]
            self._rendered[key] = pieces
        return self._rendered[key]

    def _tokenise(self, text: str, *, first: bool = False) -> list[int]:
        plain_start = first and not self.tokenizer.chat_template  # a chat template writes its own BOS
        ids = list(self.tokenizer(text, add_special_tokens=plain_start)["input_ids"])
        if plain_start and len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()  # some tokenizers close every text
        return ids

    def _fit(self, parts: Sequence[tuple[str, list[int]]], room: int, limit: int, may_cut: bool) -> tuple[list[int], int]:
        """All ids in order; ``previous`` gives way first, then ``response`` or ``step``."""
        sizes = {name: len(ids) for name, ids in parts if name in _CUT_FIRST}
        notices = {name: self._tokenise(f" [... {where} is left out ...] ") for name, where in _CUT_FIRST.items()}
        total = sum(len(ids) for _, ids in parts)
        keep = {name: size if name == "previous" else min(size, limit or size) for name, size in sizes.items()}
        over = total - sum(sizes[name] - keep[name] for name in keep) - room
        over += sum(len(notices[name]) for name in keep if keep[name] < sizes[name])
        for name in _CUT_FIRST:
            if over > 0 and keep.get(name):
                over += 0 if keep[name] < sizes[name] else len(notices[name])
                taken = min(over, keep[name])
                keep[name] -= taken
                over -= taken
        cut = sum(sizes[name] - keep[name] for name in keep)
        if over > 0 or (cut and not may_cut) or any(sizes[name] and not keep[name] for name in ("response", "step") if name in keep):
            longest = max(sizes.values(), default=0)
            raise DoesNotFit(f"the prompt has {total} tokens, of which {longest} to be judged; the judge reads {room} (material: {limit or room})")
        ids: list[int] = []
        for name, piece in parts:
            ids += _shortened(name, piece, keep[name], notices[name]) if name in keep else piece
        return ids, cut


def _shortened(name: str, ids: list[int], keep: int, notice: list[int]) -> list[int]:
    if keep == len(ids):
        return ids
    tail = keep if name == "previous" else keep // 2
    return ids[: keep - tail] + notice + ids[len(ids) - tail :]
