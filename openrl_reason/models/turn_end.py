"""Which tokens end what a policy says: the EOS token, and where a chat template closes the assistant's message with another token, that one.

Base models often have both: an EOS token that ends texts (<|endoftext|>), and a chat template that ends turns (<|im_end|>). A policy that is
fine-tuned on chats learns the second, so whoever samples from it must stop there.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "41+1=42"


KNOWN_ENDS = ("<|im_end|>", "<|eot_id|>")
"""What ends a turn where there is no chat template to tell, but the vocabulary has the token: base models have those of their families."""


def find_end(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, str] | None:
    """(place, token) of the token that ends a turn in the ``text`` that a chat template wrote behind it: the first one of EOS and the tokens that
    were added to the vocabulary; None without any."""
    added = (str(token) for token in (*tokenizer.get_added_vocab(), tokenizer.eos_token) if token)
    return min(((text.find(token), token) for token in added if token.strip() and token in text), default=None)  # some add line feeds


def turn_end_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token with which the tokenizer's chat template ends a message of the assistant; empty without a template, or where it has none."""
    return _turn_end(tokenizer, str(tokenizer.chat_template)) if tokenizer.chat_template else ""


@functools.lru_cache(maxsize=16)
def _turn_end(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    from jinja2 import TemplateError

    messages = [{"role": "user", "content": "41+1=?"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, TypeError, ValueError):  # a template for other messages than these; what is wrong is told where it is used
        return ""
    found = find_end(text.rpartition(_PROBE)[2], tokenizer) if _PROBE in text else None
    return found[1] if found else ""


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The tokens that end a response: EOS, and the chat template's end of turn if it is another."""
    return _end_tokens(tokenizer, str(tokenizer.chat_template or ""))


@functools.lru_cache(maxsize=16)
def _end_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, ...]:
    turn_ends = (_turn_end(tokenizer, template),) if template else tuple(token for token in KNOWN_ENDS if token in tokenizer.get_added_vocab())
    return tuple(dict.fromkeys(token for token in (tokenizer.eos_token, *turn_ends) if token))


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Their ids."""
    return tuple(tokenizer.convert_tokens_to_ids(list(end_tokens(tokenizer))))


def without_end(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """(text, the token that ends it): a reply that is written with its end, which nobody samples anything behind; ("...", "") for any other."""
    said = text.rstrip()
    return next(((said.removesuffix(end), end) for end in end_tokens(tokenizer) if said.endswith(end)), (text, ""))


def early_end(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What is wrong with a reply in whose text a token stands that ends a reply: no policy could have written what follows. Empty where all is
    well."""
    for end in end_tokens(tokenizer):
        place = text.find(end)
        if place >= 0:
            return f"{end!r}, which ends a response, stands in the text of one: {text[max(place - 20, 0) : place + len(end) + 20]!r}"
    return ""
