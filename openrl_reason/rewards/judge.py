"""Judges: a language model reads a response and says what it is worth, as a score, as answers to yes-or-no questions, or in words.

Whatever the judge does not answer as asked is a status with its cause, never a 0. See docs/rewards_judge.md.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from openrl_reason.core.seeds import content_id, derive_seed
from openrl_reason.core.trajectory import StopReason
from openrl_reason.errors import ConfigError
from openrl_reason.rewards.answers import failure
from openrl_reason.rewards.base import RewardResult, RewardSample
from openrl_reason.rewards.judge_config import JudgeConfig, check_judge, load_prompts, with_options
from openrl_reason.rewards.judge_engines import Job, JobFailed, JudgeEngines
from openrl_reason.rewards.judge_prompt import DoesNotFit, EncodedPrompt, PromptEncoder
from openrl_reason.workers.placement import Role
from openrl_reason.workers.rollout_config import Completion, Request, SamplingConfig

if TYPE_CHECKING:
    from openrl_reason.workers.placement import Placement
    from openrl_reason.workers.rollout import RolloutPool

GROUPS = 1024
"""The pool remembers every group until its weights change, which a judge's never do: so there is a fixed number of them."""
_SCORE_LINE = re.compile(r"Score: ([0-9]{1,9})")


@dataclass(frozen=True)
class _Question:
    """One request of a job: a prompt about the response, or about one of its steps."""

    name: str
    """The criterion, or "score"."""
    step: int
    """Index among the judged units; 0 for a whole response."""


class JudgeReward:
    """A judge as a source of rewards (``rewards.base.Rewarder``).

    Args:
        engines: may serve several judges.

    Raises:
        ConfigError: settings that cannot work, or labels that are not one token each in the judge's vocabulary.
    """

    def __init__(self, config: JudgeConfig, engines: JudgeEngines) -> None:
        check_judge(config)
        self.config, self._engines, self._tokenizer = config, engines, engines.tokenizer
        self._prompts = load_prompts(config.prompts)
        key = derive_seed(engines.seed, "judge fence").to_bytes(8, "big")
        self._encoder = PromptEncoder(self._tokenizer, key)
        self._labels = find_labels(config, self._tokenizer)
        self._answer_prefix = self._find_answer_prefix()
        self._lock = threading.Lock()
        self._tally: dict[str, list[float]] = {}

    def _find_answer_prefix(self) -> str:
        """End of a prompt without chat template: with a space behind it unless the vocabulary has the labels with their space in one token."""
        if self.config.mode == "verdict":
            return "Verdict:\n"
        prefix = "Score:" if self.config.mode == "expected_score" else "Answer:"
        spaced = [index for ids in self._labels for index in ids if self._tokenizer.decode([index]).startswith(" ")]
        return prefix if spaced else prefix + " "

    # --- the interface of a reward source ---

    def submit(self, sample: RewardSample) -> Future[RewardResult]:
        """Queue one response."""
        units = self._units(sample)
        questions = [_Question(name, index) for index in range(len(units)) for name in self._asked()]
        encoded: list[EncodedPrompt] = []

        def prepare() -> list[Request]:
            encoded.extend(self._encode(sample, units, questions))
            return [self._request(sample, question, prompt) for question, prompt in zip(questions, encoded, strict=True)]

        def finish(completions: list[Completion]) -> RewardResult:
            return self._result(sample, units, questions, completions, encoded)

        return self._engines.submit(Job(prepare, finish))

    def flush(self) -> None:
        """With the policy's own engines: judge now."""
        self._engines.flush()

    def metrics(self) -> dict[str, Any]:
        """Since the last call: ``judged``, ``requests``, ``cut_rate`` (responses that were too long), ``broken_rate`` (responses with control
        tokens), and ``label_mass/mean`` and ``/min`` (probability of all labels together)."""
        with self._lock:
            tally, self._tally = self._tally, {}
        if not tally:
            return {}
        mean = {name: math.fsum(values) / len(values) for name, values in tally.items() if values}
        numbers = {"judged": float(len(tally["requests"])), "requests": math.fsum(tally["requests"])}
        numbers |= {"cut_rate": mean["cut"], "broken_rate": mean["broken"]}
        if tally.get("mass"):
            numbers |= {"label_mass/mean": mean["mass"], "label_mass/min": min(tally["mass"])}
        return numbers

    def close(self) -> None:
        """End the judge's engines, unless they are the policy's. May be called twice."""
        self._engines.close()

    # --- requests ---

    def _units(self, sample: RewardSample) -> list[int]:
        """Indices of the steps to judge; [0] stands for a whole response."""
        if not self.config.per_step:
            return [0]
        return [index for index, step in enumerate(sample.steps) if step.strip()]

    def _asked(self) -> list[str]:
        return list(self._prompts.criteria) if self.config.mode == "yes_no" else ["score"]

    def _encode(self, sample: RewardSample, units: Sequence[int], questions: Sequence[_Question]) -> list[EncodedPrompt]:
        config = self.config
        if config.per_step and len(units) > config.max_steps:
            self._count(0, [])
            # Its author chose the number of steps: were this an error, which is left out of training, a policy could choose not to be judged.
            raise JobFailed(failure("no_answer", f"the response has {len(units)} steps, more than --reward.judge.max_steps {config.max_steps}"))
        new_tokens = config.max_new_tokens if config.mode == "verdict" else 1
        try:
            return [
                self._encoder.encode(
                    self._template(question.name), self._material(sample, units[question.step]), answer_prefix=self._answer_prefix,
                    room=self._engines.max_model_len - new_tokens, limit=config.max_response_tokens, may_cut=config.too_long == "cut",
                )
                for question in questions
            ]  # fmt: skip
        except DoesNotFit as error:
            self._count(0, [])
            raise JobFailed(failure("error", f"the judge cannot read the response: {error}")) from None

    def _template(self, asked: str) -> str:
        """The mode's prompt with everything filled in but the material."""
        config, name = self.config, ("step_" if self.config.per_step else "") + self.config.mode
        words = {
            "labels": ", ".join(config.labels), "worst": config.labels[0], "best": config.labels[-1], "yes": config.yes, "no": config.no,
            "lowest": str(config.lowest), "highest": str(config.highest), "criterion": self._prompts.criteria.get(asked, ""),
        }  # fmt: skip
        return re.sub(r"\{(" + "|".join(words) + r")\}", lambda match: words[match[1]], getattr(self._prompts, name))

    def _material(self, sample: RewardSample, step: int) -> dict[str, str]:
        prompt = sample.item.prompt
        question = prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)
        if self.config.per_step:
            work = {"previous": "".join(sample.steps[:step]), "step": sample.steps[step]}
        else:
            work = {"response": sample.response}
        return {"question": question, "gold": sample.item.gold} | work

    def _request(self, sample: RewardSample, question: _Question, prompt: EncodedPrompt) -> Request:
        config = self.config
        if config.mode == "verdict":
            sampling, labels = SamplingConfig(temperature=config.temperature, max_new_tokens=config.max_new_tokens), ()
        else:
            sampling, labels = SamplingConfig(temperature=0.0, max_new_tokens=1), tuple(index for ids in self._labels for index in ids)
        identity = sample.item.task_id, content_id(sample.response), question.step, question.name
        seed = derive_seed(self._engines.seed, "judge", *identity)
        group = f"judge/{int(content_id(sample.item.task_id), 16) % GROUPS}"  # one engine for one item: its prompts begin alike
        return Request("", prompt.ids, seed=seed, sampling=sampling, group=group, label_ids=labels)

    # --- results ---

    def _result(
        self, sample: RewardSample, units: Sequence[int], questions: Sequence[_Question], completions: Sequence[Completion],
        encoded: Sequence[EncodedPrompt],
    ) -> RewardResult:  # fmt: skip
        masses: list[float] = []
        scores: dict[str, list[float]] = {}
        problem = "" if units else "the response has no step to judge"
        for question, completion in zip(questions, completions, strict=True):
            score, cause = self._read(completion, masses)
            scores.setdefault(question.name, []).append(score)
            where = f"step {units[question.step] + 1}, " if self.config.per_step else ""
            problem = problem or (cause and f"{where}{question.name}: {cause}")
        self._count(len(questions), masses, encoded)
        logs = {name: math.fsum(values) / len(values) for name, values in scores.items() if not any(map(math.isnan, values))}
        logs = logs if self.config.mode == "yes_no" else {}
        if masses:
            logs["label_mass"] = min(masses)
        if problem:
            return RewardResult(math.nan, "error" if units else "no_answer", None, problem, logs=logs)
        by_unit = [self.config.scale * math.fsum(column) / len(column) for column in zip(*scores.values(), strict=True)]
        if not self.config.per_step:
            return RewardResult(by_unit[0], logs=logs)
        share = len(units) if self.config.step_worth == "share" else 1
        worth = dict(zip(units, by_unit, strict=True))
        steps = tuple(worth.get(index, 0.0) / share for index in range(len(sample.steps)))
        return RewardResult(math.fsum(steps), step_scores=steps, logs=logs)

    def _read(self, completion: Completion, masses: list[float]) -> tuple[float, str]:
        """(score between 0 and 1, "") or (NaN, cause)."""
        config = self.config
        if config.mode == "verdict":
            text = self._tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            return read_verdict(text, completion.stop_reason, config.lowest, config.highest)
        logprobs = iter(completion.label_logprobs)
        shares = [math.fsum(math.exp(next(logprobs)) for _ in ids) for ids in self._labels]
        mass = math.fsum(shares)
        masses.append(mass)
        if not mass > config.min_label_mass:
            said = self._tokenizer.decode(completion.token_ids)
            return math.nan, (
                f"the labels have a probability of {mass:.3g} together, not above --reward.judge.min_label_mass {config.min_label_mass:g}: the judge"
                f" wants to begin with {said!r}"
            )
        # From worst to best, 0 to 1; of (yes, no) the first is the best.
        worth = (1.0, 0.0) if config.mode == "yes_no" else tuple(index / (len(shares) - 1) for index in range(len(shares)))
        return math.fsum(value * share for value, share in zip(worth, shares, strict=True)) / mass, ""

    def _count(self, requests: int, masses: Sequence[float], encoded: Sequence[EncodedPrompt] = ()) -> None:
        with self._lock:
            for name, values in {
                "requests": [float(requests)],
                "cut": [float(any(prompt.num_cut for prompt in encoded))],
                "broken": [float(any(prompt.num_broken for prompt in encoded))],
                "mass": list(masses),
            }.items():
                self._tally.setdefault(name, []).extend(values)


def read_verdict(text: str, stop_reason: str, lowest: int, highest: int) -> tuple[float, str]:
    """(score between 0 and 1, "") if the last line is exactly ``Score: N`` with a whole number in range, else (NaN, cause)."""
    if stop_reason == StopReason.LENGTH:
        return math.nan, "the verdict was cut off by --reward.judge.max_new_tokens"
    last = text.rstrip().rsplit("\n", 1)[-1]
    found = _SCORE_LINE.fullmatch(last)
    if found is None:
        return math.nan, f"the verdict ends with {last[-100:]!r}, not with a line of the form 'Score: N'"
    number = int(found[1])
    if not lowest <= number <= highest:
        return math.nan, f"the verdict's score is {number}, not from {lowest} to {highest}"
    return (number - lowest) / (highest - lowest), ""


def find_labels(config: JudgeConfig, tokenizer: Any) -> list[tuple[int, ...]]:
    """The tokens of each possible answer; none for verdicts. Raises ConfigError, as `label_tokens`."""
    if config.mode == "verdict":
        return []
    flag, words = ("labels", config.labels) if config.mode == "expected_score" else ("yes and --reward.judge.no", (config.yes, config.no))
    return label_tokens(words, tokenizer, f"--reward.judge.{flag}")


def label_tokens(words: Sequence[str], tokenizer: Any, flag: str) -> list[tuple[int, ...]]:
    """For each word the tokens that say it: alone, and with the space before it where the vocabulary has that as one token.

    Raises:
        ConfigError: a word is more than one token, or two words share one.
    """
    found = [_tokens_of(word, tokenizer) for word in words]
    if all(found) and len({index for ids in found for index in ids}) == sum(map(len, found)):
        return found
    split = {word: tokenizer.tokenize(word) for word, ids in zip(words, found, strict=True) if not ids}
    suggestions = [group for group in (("1 to 9", "123456789"), ("A to E", "ABCDE"), ("Yes, No", ("Yes", "No")), ("yes, no", ("yes", "no")))
                   if all(_tokens_of(word, tokenizer) for word in group[1])]  # fmt: skip
    what = "; ".join(f"{word!r} is {pieces}" for word, pieces in split.items()) or "two of them are the same token"
    remedy = f"with this tokenizer these work: {'; '.join(name for name, _ in suggestions)}" if suggestions else "use --reward.judge.mode verdict"
    raise ConfigError(f"{flag} {list(words)}: each must be one token of the judge, but {what}. {remedy}")


def _tokens_of(word: str, tokenizer: Any) -> tuple[int, ...]:
    word = word.strip()
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    candidates = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (word, " " + word)]
    # "\u2581" and "\u0120" are how SentencePiece and byte-level vocabularies write a space.
    candidates += [[vocabulary[text]] for text in (word, "\u2581" + word, "\u0120" + word) if text in vocabulary]
    return tuple(dict.fromkeys(ids[0] for ids in candidates if len(ids) == 1 and tokenizer.decode(ids).strip() == word))


def judge_role(config: JudgeConfig) -> Role | None:
    """The actors of a judge with a model of its own, for the run's ``Placement``; None if the policy judges itself."""
    return Role("judge", config.rollout.num_engines, config.rollout.tensor_parallel) if config.path else None


def prepare_judge(config: JudgeConfig, options: Sequence[Mapping[str, Any]], policy_tokenizer: Any) -> Any:
    """Checks what can be checked before an actor starts, for the ``options`` of each judge's reward term; returns the judges' tokenizer.

    Raises:
        ConfigError: a setting cannot work, or a label is more than one token.
        DataError: the judge's model has no tokenizer, or a file of prompts does not read.
    """
    check_judge(config)
    tokenizer = policy_tokenizer
    if config.path:
        from openrl_reason.models.loading import load_tokenizer

        tokenizer = load_tokenizer(config.path, trust_remote_code=config.rollout.trust_remote_code)
    for own in options:
        find_labels(with_options(config, own), tokenizer)
    return tokenizer


def start_judge(config: JudgeConfig, tokenizer: Any, *, placement: Placement, policy_pool: RolloutPool | None = None, seed: int = 0) -> JudgeEngines:
    """The engines of a run's judges: a pool of its own for ``path`` (its placement must hold ``judge_role``), else the policy's.

    Args:
        tokenizer: what ``prepare_judge`` returned.

    Raises:
        ConfigError: there is neither ``path`` nor a policy.
    """
    if not config.path:
        if policy_pool is None:
            raise ConfigError("--reward.judge.path is empty, and here are no engines of a policy that could judge: name a model")
        return JudgeEngines(policy_pool, tokenizer, shared=True, seed=seed)
    from openrl_reason.workers.rollout import RolloutPool

    return JudgeEngines(RolloutPool(config.rollout, config.path, placement=placement, seed=seed, role="judge"), tokenizer, seed=seed)


def judge_reward(config: JudgeConfig, engines: JudgeEngines, options: Mapping[str, Any]) -> JudgeReward:
    """The judge of one reward term, whose ``options`` go before the run's settings."""
    return JudgeReward(with_options(config, options), engines)


def build_judge(*_: Any, **__: Any) -> JudgeReward:
    """What a command without engines for judges gets. Raises ConfigError."""
    raise ConfigError("--reward.terms holds a judge, but this command starts no engines for one")
