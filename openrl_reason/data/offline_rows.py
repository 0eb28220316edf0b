"""From rows to the sequences that are kept: parse, encode, fit into the length limit, map the reward. Whatever is left out is counted."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from openrl_reason.core.trajectory import StopReason, Trajectory
from openrl_reason.data.offline_config import OfflineDataConfig
from openrl_reason.data.offline_encode import Encoded, Encoder
from openrl_reason.data.offline_formats import MAX_REWARD, BadRow, Example, Layout, parse_row, prompts_of
from openrl_reason.data.readers import Row
from openrl_reason.errors import DataError
from openrl_reason.tasks.leakage import TEST_QUESTION, asks_a_test_question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_RECORDS_PER_CALL = 256
"""Records that are tokenised in one call, which is many times quicker than one by one."""


class LeftOut(Exception):
    """A record that the settings leave out; ``reason`` is what it is counted under."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class TooLong(DataError):
    """A sequence that is too long where that is an error; it is never skipped as a bad row."""


_Parsed = list[Example] | Encoded | Exception
"""Examples that are to be encoded, a sequence that is there already, or what speaks against the record."""


class RowEncoder:
    """Turns the rows of sources of one layout into sequences.

    ``counts`` says what became of them: ``rows`` = kept + bad (and of these, ``bad/<reason>``) + empty + prompt_too_long + too_long +
    truncated_left_out + identical (pairs whose sides are equal). Of the kept, ``truncated`` were cut here, ``cut_off`` when they were sampled;
    ``reward_unknown`` have no reward, ``with_replies_read_only`` begin with replies of the assistant that are context, ``steps_not_told`` are one
    step because the tokenizer cannot map steps onto tokens."""

    def __init__(self, config: OfflineDataConfig, tokenizer: PreTrainedTokenizerBase, layout: Layout) -> None:
        self.config, self.layout = config, layout
        self.encoder = Encoder(config, tokenizer)
        self.counts: Counter[str] = self.encoder.counts

    def records(self, rows: Iterable[Row]) -> Iterator[list[Encoded]]:
        """The sequences of each record that is kept, in order: chosen and rejected of a pair, else one.

        Raises DataError for a bad row unless they are to be skipped, and for one that is too long if that is an error."""
        rows = iter(rows)
        while block := list(itertools.islice(rows, _RECORDS_PER_CALL)):
            parsed = [self._parsed(row) for row in block]
            encoded = self._encoded(parsed)
            for row, sides in zip(block, encoded, strict=True):
                self.counts["rows"] += 1
                try:
                    kept = self._kept(row, sides)
                except LeftOut as left_out:
                    self.counts[left_out.reason] += 1
                except DataError as error:
                    self.bad(error)
                else:
                    self.counts["kept"] += 1
                    yield kept

    def bad(self, error: DataError, reason: str = "template") -> None:
        """Counts a bad row under the error's own reason, or ``reason``; raises the error where bad rows are errors."""
        if isinstance(error, TooLong):
            raise error
        if self.config.bad_rows == "error":
            raise DataError(f"{error} (--data.bad_rows skip leaves such rows out, counted)") from error
        self.counts["bad"] += 1
        self.counts[f"bad/{getattr(error, 'reason', reason)}"] += 1

    def unread(self, error: DataError) -> None:
        """Counts a record that could not even be read."""
        self.counts["rows"] += 1
        self.bad(error, "malformed")

    def _parsed(self, row: Row) -> _Parsed:
        try:
            parsed = parse_row(row, self.layout, self.config)
            if isinstance(parsed, Trajectory):
                taken = self.encoder.take(parsed, row.where)
                self._refuse_test_question(row, [self.encoder.prompt_of(parsed)])
                return LeftOut("empty") if self.config.empty == "drop" and self.encoder.says_nothing(parsed) else taken
            if not all(example.prompt or example.messages for example in parsed):
                raise BadRow("empty_prompt", row.where, "the prompt is empty, so nothing stands before the first token of the response")
            for example in parsed:
                _check_unicode(row, example)
                self._refuse_test_question(row, prompts_of(example))
        except DataError as error:
            return error
        if self.config.empty == "drop" and any(map(self.encoder.says_nothing, parsed)):
            return LeftOut("empty")
        return parsed

    def _refuse_test_question(self, row: Row, prompts: Sequence[str]) -> None:
        if not self.config.allow_test_data and any(map(asks_a_test_question, prompts)):
            raise BadRow("test_question", row.where, f"{TEST_QUESTION}. --data.allow_test_data true if this is meant")

    def _encoded(self, parsed: Sequence[_Parsed]) -> list[list[Encoded | Exception]]:
        sequences = iter(self.encoder.encode([example for record in parsed if isinstance(record, list) for example in record]))
        return [[next(sequences) for _ in record] if isinstance(record, list) else [record] for record in parsed]

    # ---- what the settings make of a record ----------------------------------------------------------------------------------------------

    def _kept(self, row: Row, found: list[Encoded | Exception]) -> list[Encoded]:
        for side in found:
            if isinstance(side, Exception):
                raise side
        sides = [side for side in found if isinstance(side, Encoded)]
        cut = [self._fitted(row, side) for side in sides]
        if len(sides) == 2 and np.array_equal(sides[0].token_ids, sides[1].token_ids):
            raise LeftOut("identical")
        for side, was_cut in zip(sides, cut, strict=True):
            self.counts["truncated"] += was_cut
            self.counts["cut_off"] += not was_cut and side.stop_reason == StopReason.LENGTH
            self.counts["with_replies_read_only"] += side.has_replies_read_only
            if self.layout.kind != "sft":
                self._map_reward(side)
                self.counts["reward_unknown"] += not side.has_reward
        return sides

    def _fitted(self, row: Row, side: Encoded) -> bool:
        """Cuts a sequence that is too long, if that is asked for; whether it did."""
        limit, overlong, length = self.config.max_length, self.config.overlong, len(side.token_ids)
        is_action = side.step_ids >= 0
        if not is_action.any():
            raise LeftOut("empty")
        if is_action[0]:
            raise BadRow("empty_prompt", row.where, "the first token is the policy's, and nothing stands before it: there is no state to act in")
        if length > limit:
            no_room = side.num_prompt_tokens >= limit
            if overlong == "error":
                what = f"its prompt alone has {side.num_prompt_tokens}" if no_room else "use truncate or drop, or a higher limit"
                raise TooLong(f"{row.where}: {length} tokens, more than --data.max_length {limit} (--data.overlong error): {what}")
            if no_room or overlong == "drop":
                raise LeftOut("prompt_too_long" if no_room else "too_long")
            self._cut(side, limit)
        if side.stop_reason == StopReason.LENGTH and self.config.truncated_reward != "keep":
            if self.config.truncated_reward == "drop":
                raise LeftOut("truncated_left_out")
            side.has_reward = False
        return length > limit

    def _cut(self, side: Encoded, limit: int) -> None:
        end = int(np.flatnonzero(side.step_ids[:limit] >= 0)[-1]) + 1  # what follows the last action tells nobody anything
        side.token_ids, side.step_ids = side.token_ids[:end], side.step_ids[:end]
        if side.behaviour_logprobs is not None:
            side.behaviour_logprobs = side.behaviour_logprobs[:end]
        total, num_steps = float(side.rewards.sum()), int(side.step_ids[-1]) + 1
        side.rewards = side.rewards[:num_steps].copy()
        if self.layout.kind != "steps":  # an outcome reward stays one; a step that is gone takes its own reward along
            side.rewards[-1] += total - float(side.rewards.sum())
        side.stop_reason = StopReason.LENGTH

    def _map_reward(self, side: Encoded) -> None:
        """The affine map: of every step's own label, else of the whole."""
        scale, shift = self.config.reward_scale, self.config.reward_shift
        if not side.has_reward:
            side.rewards = np.zeros_like(side.rewards)
        elif self.layout.kind == "steps":
            side.rewards = (side.rewards * scale + shift).astype(np.float32)
        else:
            side.rewards = (side.rewards * scale).astype(np.float32)
            side.rewards[-1:] += np.float32(shift)
        if not np.abs(side.rewards).max(initial=0.0) <= MAX_REWARD:
            how = f"--data.reward_scale {scale:g} and --data.reward_shift {shift:g}"
            raise BadRow("reward_not_a_number", side.where, f"with {how} the reward is beyond {MAX_REWARD:g}")


def _check_unicode(row: Row, example: Example) -> None:
    """Raises BadRow for half of a character, as cut texts have it: no tokenizer takes that."""
    for text in (example.prompt, example.response, *example.steps, *(message["content"] for message in example.messages)):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            cut = ascii(text[max(error.start - 20, 0) : error.end])
            raise BadRow("not_unicode", row.where, f"half of a character (a lone surrogate) at {error.start}: ...{cut}") from None
