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


def find_end(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, str] | None:
    """(place, token) of the token that ends a turn in the ``text`` that a chat template wrote behind it: EOS if it is there, else the first
    special one; None without any."""
    if tokenizer.eos_token and tokenizer.eos_token in text:
        return text.find(tokenizer.eos_token), tokenizer.eos_token
    added = (str(token) for token in tokenizer.get_added_vocab())
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
    return tuple(dict.fromkeys(token for token in (tokenizer.eos_token, turn_end_token(tokenizer)) if token))


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Their ids."""
    return tuple(tokenizer.convert_tokens_to_ids(list(end_tokens(tokenizer))))
