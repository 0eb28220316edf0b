"""Conversations as text, cut exactly where the policy's turns begin and end.

Everything here is incremental: a turn's context is what the model would have been given to reply to, and what it replied must continue it to
the letter. A template that writes earlier turns differently once later ones follow (one that drops old thoughts, say) is refused with the number
of the turn, since such a conversation is no single sequence that a policy could have written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from openrl_reason.errors import ConfigError, DataError
from openrl_reason.models.turn_end import end_tokens, find_end, turn_end_token
from openrl_reason.tasks.prompts import render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
"""{role, content}."""


class Turn(NamedTuple):
    """One reply of the policy, and what stands between the reply before it and this one."""

    context: str
    """What the policy is given: other roles' messages, and the markup around them and around the reply."""
    reply: str
    """What the policy says."""
    end: str
    """The end-of-turn token behind it; empty where the template has none."""


@dataclass(frozen=True)
class Markup:
    """A template as the text around the messages of each role; ``{role}`` stands for the role's name."""

    opening: Mapping[str, str] = field(default_factory=dict)
    """In front of a message, by role; the entry "" is for the others."""
    closing: Mapping[str, str] = field(default_factory=dict)
    """Behind a message of another role than the assistant's."""
    turn_end: str = ""
    """The token that ends a message of the assistant; "{eos}" is the tokenizer's EOS token."""
    gap: str = ""
    """What a message of the assistant is followed by, after its end."""
    strip: bool = False
    """Whether blanks around a message are dropped, as the published template does."""


MARKUPS = {
    "chatml": Markup(
        opening={"": "<|im_start|>{role}\n"}, closing={"": "<|im_end|>\n"}, turn_end="<|im_end|>", gap="\n"
    ),
    "llama3": Markup(
        opening={"": "<|start_header_id|>{role}<|end_header_id|>\n\n"}, closing={"": "<|eot_id|>"}, turn_end="<|eot_id|>", strip=True
    ),
    "minicpm": Markup(opening={"user": "<用户>"}, closing={"user": "<AI>"}, strip=True),
    "plain": Markup(closing={"": "\n"}, turn_end="{eos}", gap="\n"),
}  # fmt: skip
"""The built-in templates. They begin with the BOS token where the tokenizer puts one in front of a text, and add no system message."""


def template_turns(messages: Sequence[Message], first_turn: int, template: str, tokenizer: PreTrainedTokenizerBase, where: str) -> list[Turn]:
    """The assistant's messages from index ``first_turn`` on, as turns; what follows the last of them is left out.

    ``template``: a name of ``MARKUPS``, or "tokenizer" for the tokenizer's own. ``where`` leads the errors. Raises DataError where the template
    does not extend by prefix or changes what the assistant says; ConfigError if the tokenizer has no template."""
    if template != "tokenizer":
        return list(_markup_turns(messages, first_turn, MARKUPS[template], tokenizer.eos_token))
    turns, carried = [], ""
    for index, context, text in incremental_turns(messages, first_turn, tokenizer, where):
        reply, end, rest = _split_reply(text, messages[index]["content"], tokenizer, f"{where}: message {index}")
        turns.append(Turn(carried + context, reply, end))
        carried = rest
    return turns


def incremental_turns(
    messages: Sequence[Message], first_turn: int, tokenizer: PreTrainedTokenizerBase, where: str
) -> Iterator[tuple[int, str, str]]:
    """(index, context, text) of each message of the assistant from index ``first_turn`` on, rendered by the tokenizer's template: what the model
    sees when it replies, and the reply with the token that ends it; the pieces join to the rendered conversation.

    Raises DataError, naming the message, where one rendering does not continue the one before."""
    done, end = "", turn_end_token(tokenizer)
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index < first_turn:
            continue
        if index == 0:
            raise DataError(f"{where}: message 0: the conversation begins with the assistant, and a tokenizer's template needs a message before it")
        try:
            before, after = _render(messages[:index], True, tokenizer), _render(messages[: index + 1], False, tokenizer)
        except DataError as error:
            raise DataError(f"{where}: message {index}: {error}") from None
        if not before.startswith(done) or not after.startswith(before):
            raise DataError(
                f"{where}: message {index}: the chat template writes earlier turns differently once later ones follow, so this conversation has "
                "no single token sequence; give one row per assistant turn, or use another template"
            )
        text = after[len(before) :]
        if end and (place := text.find(end, max(text.find(message["content"].strip()), 0))) >= 0:
            text = text[: place + len(end)]  # what a template writes behind the last turn alone (EOS) is not there once others follow
        yield index, before[len(done) :], text
        done = before + text


def refuse_what_is_lost(message: Mapping[str, Any], rendered: str, where: str) -> None:
    """Raises DataError for a message of the assistant that says more than its template wrote."""
    for part in ("tool_calls", "function_call", "reasoning_content"):
        if message.get(part) and not _mentions(rendered, message[part]):
            what = f"has {part}, which the policy wrote and the chat template leaves out: write it into 'content' as the policy is to write it"
            raise DataError(f"{where}: the message {what}")


def _mentions(text: str, value: Any) -> bool:
    """Whether every name and text in a value is in ``text``: a call's arguments may be written in another form."""
    if isinstance(value, Mapping):
        return all(_mentions(text, entry) for key, entry in value.items() if key not in ("id", "type", "arguments"))
    if isinstance(value, list | tuple):
        return all(_mentions(text, entry) for entry in value)
    return not isinstance(value, str) or value.strip() in text


def _markup_turns(messages: Sequence[Message], first_turn: int, markup: Markup, eos: str) -> Iterator[Turn]:
    turn_end, context = markup.turn_end.replace("{eos}", eos), ""
    for index, message in enumerate(messages):
        role = message["role"]
        content = message["content"].strip() if markup.strip else message["content"]
        context += markup.opening.get(role, markup.opening.get("", "")).replace("{role}", role)
        if role != "assistant":
            context += content + markup.closing.get(role, markup.closing.get("", ""))
        elif index < first_turn:
            context += content + turn_end + markup.gap
        else:
            yield Turn(context, content, turn_end)
            context = markup.gap


def _render(messages: Sequence[Message], reply_follows: bool, tokenizer: PreTrainedTokenizerBase) -> str:
    return render_chat([dict(message) for message in messages], tokenizer, add_generation_prompt=reply_follows)


def _split_reply(text: str, content: str, tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[str, str, str]:
    """(reply, end-of-turn token, rest) of what a template made of a message. The rest (a line feed, mostly) is nobody's: it is context."""
    said = content.strip()
    place = text.find(said)
    if place < 0 or text[:place].strip():
        raise DataError(
            f"{where}: the chat template changes what the assistant says ({text[:60]!r} for {content[:60]!r}), so it cannot be told which tokens are "
            "the policy's; use another template"
        )
    stop = place + len(said)
    blanks = content[len(content.rstrip()) :]
    if text[stop:].startswith(blanks):
        stop += len(blanks)
    reply, tail = text[:stop], text[stop:]
    found = find_end(tail, tokenizer)
    if found is None:
        return reply, "", tail
    start, token = found
    return reply, tail[: start + len(token)], tail[start + len(token) :]


def resolve_template(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """ "auto" for messages is the tokenizer's own template. Raises ConfigError if it has none, or lacks a built-in one's tokens."""
    if template in ("auto", "tokenizer"):
        if not tokenizer.chat_template:
            raise ConfigError(
                f"--data.template is {template!r}, and the data are chat messages, but the tokenizer has no chat template: name one of "
                f"{', '.join(MARKUPS)}, use an instruction-tuned model, or put a chat_template.jinja into the model's folder"
            )
        return "tokenizer"
    turn_end = MARKUPS[template].turn_end.replace("{eos}", tokenizer.eos_token)
    if turn_end and turn_end not in end_tokens(tokenizer):
        ends = " and ".join(map(repr, end_tokens(tokenizer)))
        raise ConfigError(
            f"--data.template {template} ends turns with {turn_end!r}, and of this tokenizer engines stop at {ends} alone: use its own template, or "
            "plain"
        )
    return template
