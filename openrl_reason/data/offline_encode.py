"""Examples to token ids, many at a time: what the policy was given and what it said are tokenised apart and joined, the way it meets them when
it samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from openrl_reason.core.trajectory import StopReason, Trajectory
from openrl_reason.data.offline_config import OfflineDataConfig
from openrl_reason.data.offline_formats import BOXED_INSTRUCTION, BadRow, Example, asks_for_box
from openrl_reason.data.offline_steps import StepMap
from openrl_reason.data.templates import Message, resolve_template, template_turns
from openrl_reason.data.token_text import ANCHOR_CHARACTERS, marks_beginnings
from openrl_reason.errors import ConfigError, DataError
from openrl_reason.models.turn_end import early_end, end_token_ids, end_tokens, without_end

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BREAK = "\n"
_BLANK_TOKENS = 32
"""More tokens than this are not looked at for whether they are all blanks."""


class Piece(NamedTuple):
    """Some text of a sequence that is tokenised on its own."""

    text: str
    is_action: bool = False
    tail: str = ""
    """What follows the text, tokenised together with it, but is not what the policy said: a space, an end-of-turn token."""
    closed: bool = False
    """Whether the EOS token follows."""
    split: bool = False
    """Whether the text is cut into steps; otherwise it is one."""


@dataclass
class Encoded:
    """A sequence in token ids, before it has a place in a store."""

    where: str
    token_ids: np.ndarray
    step_ids: np.ndarray
    rewards: np.ndarray
    question: str
    has_reward: bool = True
    label: bool = False
    has_replies_read_only: bool = False
    stop_reason: StopReason = StopReason.OFFLINE
    policy_version: int = -1
    behaviour_logprobs: np.ndarray | None = None
    ids: tuple[str, str, str] | None = None
    """trajectory_id, task_id, group_id where the file has them."""
    info: dict = field(default_factory=dict)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens before the first action."""
        return int((self.step_ids >= 0).argmax()) if (self.step_ids >= 0).any() else len(self.token_ids)


class Encoder:
    """Encodes examples by the settings. Raises ConfigError for a tokenizer that lacks what they need."""

    def __init__(self, config: OfflineDataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer has no EOS token, so no response could ever end; set eos_token in its tokenizer_config.json")
        self.config, self.tokenizer = config, tokenizer
        self.counts: Counter[str] = Counter()
        self._prefix_ids = _prefix_ids(tokenizer)
        self._needs_anchor = marks_beginnings(tokenizer)
        self._steps = StepMap(config.step_kind, tokenizer)
        self._ends, self._end_ids = end_tokens(tokenizer), end_token_ids(tokenizer)
        self._last_prompt = (b"", "")
        self._largest_id = max(tokenizer.get_vocab().values())

    def encode(self, examples: Sequence[Example]) -> list[Encoded | DataError]:
        """A sequence for each example, whatever its length, or the error that speaks against it."""
        laid_out: list[list[Piece] | DataError] = []
        for example in examples:
            try:
                laid_out.append(self._pieces(example))
            except DataError as error:
                laid_out.append(error)
        texts = [text for pieces in laid_out if isinstance(pieces, list) for text in self._texts(pieces)]
        unique = list(dict.fromkeys(texts))  # siblings share their prompt
        ids_of = dict(zip(unique, _ids(self.tokenizer, unique), strict=True)) if unique else {}
        return [
            pieces if isinstance(pieces, DataError) else self._assemble(example, pieces, ids_of)
            for example, pieces in zip(examples, laid_out, strict=True)
        ]

    def take(self, trajectory: Trajectory, where: str) -> Encoded:
        """A finished trajectory, its tokens and log-probs as they are, and its steps if it has several: a response that is one step was never cut,
        and is now. Raises BadRow for tokens that the tokenizer does not have."""
        if trajectory.num_tokens and int(trajectory.token_ids.max()) > self._largest_id:
            hint = "were these samples made with another tokenizer?"
            raise BadRow("unknown_token", where, f"token {trajectory.token_ids.max()} is beyond the tokenizer's {self._largest_id}; {hint}")
        known = np.isfinite(trajectory.behaviour_logprobs).any()
        step_ids, rewards = self._cut(trajectory)
        return Encoded(
            where, trajectory.token_ids, step_ids, rewards, trajectory.task_id,
            has_reward=trajectory.info.get("has_reward", True), label=trajectory.reward > 0, stop_reason=trajectory.stop_reason,
            policy_version=trajectory.policy_version, behaviour_logprobs=trajectory.behaviour_logprobs if known else None,
            ids=(trajectory.trajectory_id, trajectory.task_id, trajectory.group_id), info={"source": where} | trajectory.info,
        )  # fmt: skip

    def says_nothing(self, what: Trajectory | Example) -> bool:
        """Whether the policy's part has no text: nothing but blanks and the token that ends it."""
        if isinstance(what, Example):
            replies = [message["content"] for message in what.messages[what.first_turn :] if message["role"] == "assistant"]
            return all(text.strip() in ("", *self._ends) for text in replies or [what.response])
        trajectory = what
        said = trajectory.token_ids[trajectory.action_mask]
        said = said[~np.isin(said, self._end_ids)]
        return len(said) <= _BLANK_TOKENS and not self.tokenizer.decode(said, skip_special_tokens=False).strip()

    def prompt_of(self, trajectory: Trajectory) -> str:
        """The text of what the policy was given at first."""
        ids = trajectory.prompt_ids.tobytes()
        if ids != self._last_prompt[0]:  # siblings stand together
            self._last_prompt = ids, self.tokenizer.decode(trajectory.prompt_ids, skip_special_tokens=False)
        return self._last_prompt[1]

    def _cut(self, trajectory: Trajectory) -> tuple[np.ndarray, np.ndarray]:
        """Steps and their rewards."""
        step_ids, actions = trajectory.step_ids, np.flatnonzero(trajectory.action_mask)
        one_piece = len(actions) and actions[-1] - actions[0] + 1 == len(actions)
        if trajectory.num_steps > 1 or not one_piece or self.config.step_kind == "whole":
            return step_ids, trajectory.rewards
        ids = trajectory.token_ids[actions]
        closed = ids[-1] in self._end_ids
        said = ids[:-1] if closed else ids
        sentences = self.config.step_kind == "oreo" and BOXED_INSTRUCTION in self.tokenizer.decode(trajectory.prompt_ids, skip_special_tokens=True)
        text = self.tokenizer.decode(said, skip_special_tokens=False)
        steps = self._steps.steps(said, text, "", sentences=sentences) if len(said) else np.zeros(0, np.int32)
        if steps is None:
            self.counts["steps_not_told"] += 1
            return step_ids, trajectory.rewards
        if closed:
            steps = np.append(steps, self._step_of_end(Piece(text, True, split=True), steps, sentences))
        step_ids = step_ids.copy()
        step_ids[actions] = steps
        rewards = np.zeros(int(steps.max()) + 1, np.float32)
        rewards[-1] = trajectory.reward
        return step_ids, rewards

    # ---- layout --------------------------------------------------------------------------------------------------------------------------

    def _pieces(self, example: Example) -> list[Piece]:
        """The example as pieces of text, context and actions in turn."""
        template, tail = self.config.template, " " if self.config.eos == "space_eos" else ""
        closed = self.config.eos != "none"
        if not example.messages and template in ("auto", "plain"):
            said, end = without_end(example.response, self.tokenizer)
            self._check_end(example, said)
            tail, closed = ("", False) if end else (tail, closed)  # it is closed already
            steps = self._given_steps(example, said + end)
            return [Piece(example.prompt), *_action(steps, tail, closed, split=not example.steps)]
        messages = example.messages or ({"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.response})
        messages = [self._unended(message) for message in messages]
        first = example.first_turn if example.messages else 1
        for message in messages[first:]:
            if message["role"] == "assistant":
                self._check_end(example, message["content"])
        turns = template_turns(messages, first, resolve_template(template, self.tokenizer), self.tokenizer, example.where)
        split = not (example.steps or example.whole_turns)
        pieces: list[Piece] = []
        left_over = ""
        for turn in turns:
            end, ends_here = (tail, closed and turn is turns[-1]) if not turn.end else (turn.end, False)
            learned = self.config.train_turn_end or not turn.end
            steps = self._given_steps(example, turn.reply)
            pieces.append(Piece(left_over + turn.context))
            pieces += _action(steps, end if learned and (turn.end or ends_here) else "", ends_here, split=split)
            left_over = "" if learned else turn.end
        return pieces

    def _unended(self, message: Message) -> Message:
        """A reply without the end that its template writes behind it."""
        return {**message, "content": without_end(message["content"], self.tokenizer)[0]} if message["role"] == "assistant" else message

    def _check_end(self, example: Example, reply: str) -> None:
        if found := early_end(reply, self.tokenizer):
            raise BadRow("end_inside", example.where, found)

    def _given_steps(self, example: Example, reply: str) -> list[str]:
        """The reply in the steps that the file gives, fitted to what the template made of it; without such steps the reply itself."""
        steps = list(example.steps) or [reply]
        if "".join(steps) != reply:
            steps[0], steps[-1] = steps[0].lstrip(), steps[-1].rstrip()
            if "".join(steps) != reply.strip():
                raise BadRow("not_steps", example.where, "the chat template changes the completions, so their steps cannot be told apart")
        return steps

    # ---- tokens --------------------------------------------------------------------------------------------------------------------------

    def _texts(self, pieces: Sequence[Piece]) -> list[str]:
        alone = [piece.text + piece.tail for piece in pieces]
        if not self._needs_anchor:
            return alone
        anchors = [text[-ANCHOR_CHARACTERS:] for text in alone[:-1]]
        behind = [anchor + text for anchor, text in zip(anchors, alone[1:], strict=True)]
        return [*alone, _BREAK, *anchors, *behind, *(_BREAK + text for text in alone[1:])]

    def _piece_ids(self, piece: Piece, before: Piece | None, ids_of: dict[str, list[int]]) -> list[int]:
        """A tokenizer that marks the beginning of a text (a blank in front, as SentencePiece has it) must not do so in the middle of one: there
        a piece is tokenised behind the end of the piece before it, or, where the two would melt together, behind a line feed."""
        text = piece.text + piece.tail
        if self._needs_anchor and before is not None and text:
            for anchor in ((before.text + before.tail)[-ANCHOR_CHARACTERS:], _BREAK):
                behind, alone = ids_of[anchor + text], ids_of[anchor]
                if anchor and behind[: len(alone)] == alone:
                    return behind[len(alone) :]
        return ids_of[text]

    def _assemble(self, example: Example, pieces: Sequence[Piece], ids_of: dict[str, list[int]]) -> Encoded | DataError:
        token_ids: list[int] = []
        steps_of: list[np.ndarray] = []
        num_steps = 0
        sentences = self.config.step_kind == "oreo" and asks_for_box(example)
        for number, piece in enumerate(pieces):
            ids = self._piece_ids(piece, pieces[number - 1] if number else None, ids_of)
            if number == 0:
                ids = self._begin(piece.text, example) + ids
            if not piece.is_action:
                token_ids += ids
                steps_of.append(np.full(len(ids), -1, np.int32))
                continue
            steps = self._steps.steps(ids, piece.text, piece.tail, sentences=sentences) if piece.split else np.zeros(len(ids), np.int32)
            if steps is None:
                self.counts["steps_not_told"] += 1
                steps = np.zeros(len(ids), np.int32)
            if piece.closed and (not ids or ids[-1] != self.tokenizer.eos_token_id):
                ids = [*ids, self.tokenizer.eos_token_id]
                steps = np.append(steps, self._step_of_end(piece, steps, sentences))
            token_ids += ids
            steps_of.append(steps + num_steps)
            num_steps += int(steps.max(initial=0)) + 1
        step_ids = np.concatenate(steps_of).astype(np.int32)
        rewards = np.zeros(max(num_steps, 1), np.float32)
        if example.rewards:
            rewards[-len(example.rewards) :] = example.rewards
        return Encoded(
            example.where, np.asarray(token_ids, np.int32), step_ids, rewards, example.question, has_reward=bool(example.rewards),
            label=example.label, has_replies_read_only=example.read_only > 0, info={"source": example.where},
        )  # fmt: skip

    def _step_of_end(self, piece: Piece, steps: np.ndarray, sentences: bool) -> int:
        """The EOS token extends the last step; by the published rule it is a step of its own behind a line feed that ends the response."""
        last = int(steps.max(initial=0))
        alone = piece.split and self.config.step_kind == "oreo" and not sentences and not piece.tail and piece.text.endswith("\n")
        return last + alone

    def _begin(self, text: str, example: Example) -> list[int]:
        """What the tokenizer puts in front of a text (a BOS token), unless the text or a chat template of its own has it already."""
        own_template = self.config.template == "tokenizer" or (self.config.template == "auto" and example.messages)
        bos = self.tokenizer.bos_token
        return [] if own_template or (bos and text.startswith(bos)) else self._prefix_ids


def _action(steps: Sequence[str], tail: str, closed: bool, *, split: bool) -> Iterable[Piece]:
    for number, step in enumerate(steps):
        last = number + 1 == len(steps)
        yield Piece(step, True, tail if last else "", closed and last, split)


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    # What the tokenizer itself would call, without the masks and offsets that it makes of the result.
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def _prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts in front of a text."""
    whole = list(tokenizer("a")["input_ids"])  # which also switches off truncation and padding that tokenizer.json may ask for
    plain = _ids(tokenizer, ["a"])[0]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    return []
