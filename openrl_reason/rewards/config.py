"""Settings of the rewards: which terms a reward has, how functions and servers are called, and what a failure is worth."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from openrl_reason.config import require
from openrl_reason.errors import ConfigError, did_you_mean
from openrl_reason.rewards.judge_config import JudgeConfig, check_judge, with_options
from openrl_reason.rewards.penalties import PENALTIES, check_options

BUILT_IN = ("task", "judge", "format", *PENALTIES)
"""Names that ``source`` may hold; anything else is a path, a module or URLs."""
FORMS = ("auto", "batch", "columns", "sample")
FAILURES = ("timeout", "memory", "crashed", "error")
"""Statuses that mean that the reward failed, not the answer."""


@dataclass(frozen=True)
class RewardTermConfig:
    """One term of the reward."""

    source: str = "task"
    """task (its grader), length, overlong, repetition, format, judge, path/to/file.py:function, module:function, or
    http(s)://host:port/path (several: with commas)."""
    name: str = ""
    """Its name in metrics and rollouts. Empty: the source's or the function's own; of servers "server"."""
    weight: float = 1.0
    """Factor of its score in the sum."""
    required: bool = True
    """A failure of this term is a failure of the reward. false: the sum goes on without the term, and the failure is only counted."""
    form: str = "auto"
    """How a function is called: batch (queries, prompts, labels), columns (prompts, completions, ...), sample (one response, by name), or
    auto (its parameters tell)."""
    options: dict[str, Any] = field(default_factory=dict)
    """length: shape (linear or cosine), target, max_length. overlong: max_length, cache. repetition: ngram. format: pattern, dotall. Servers:
    send. Functions: further keyword arguments."""

    @property
    def urls(self) -> tuple[str, ...]:
        """Addresses of the servers; empty for any other source."""
        return tuple(url.strip() for url in self.source.split(",")) if self.source.startswith(("http://", "https://")) else ()

    @property
    def label(self) -> str:
        """``name``, or the one that the source suggests."""
        if self.name or self.source in BUILT_IN:
            return self.name or self.source
        return "server" if self.urls else split_function(self.source)[1]


@dataclass(frozen=True)
class RewardServerConfig:
    """How reward servers are called."""

    batch_size: int = 32
    """Responses of one request."""
    max_concurrent: int = 4
    """Requests under way at once on one server."""
    timeout_s: float = 60.0
    """Seconds that one attempt may take, connecting and reading included."""
    deadline_s: float = 180.0
    """Seconds that a request may take with all its attempts; then its samples have the status timeout. Waiting for servers that are merely
    busy does not count."""
    retries: int = 8
    """Further attempts, on the least busy server, after a refused or broken connection, a timeout, or HTTP 408, 425, 429 and 5xx."""
    backoff_s: float = 0.5
    """Longest wait before the first retry; it doubles with each, up to 30 s, and the wait is drawn at random below it."""
    max_response_mb: int = 16
    """Largest response that is read."""
    token_variable: str = ""
    """Name of the environment variable that holds a bearer token for the servers. Empty: none is sent."""


@dataclass(frozen=True)
class RewardConfig:
    """What a response is worth."""

    function: str = ""
    """One reward instead of the task's grader: path/to/file.py:function, module:function, or http(s)://host:port/path[,http://...].
    Empty: see terms."""
    terms: tuple[RewardTermConfig, ...] = ()
    """Several rewards, summed with their weights. Empty (and no function): the task's grader alone."""
    processes: int = 1
    """Processes that call functions, for each function."""
    batch_size: int = 32
    """Responses of one call of a batched function, at most."""
    concurrency: int = 32
    """Calls of an async function that a process has under way at once."""
    deadline_s: float = 30.0
    """Seconds that one call of a function may take; then its process is killed, and its samples have the status timeout."""
    load_timeout_s: float = 120.0
    """Seconds that importing a function's file may take."""
    memory_mb: int = 16384
    """Address space of a process that calls functions, in MiB; importing torch takes 1 GB of it without CUDA, and several with. 0: no limit."""
    no_answer: float | None = 0.0
    """Worth of a response without an answer. null: it does not train."""
    timeout: float | None = None
    """Worth of a response whose reward took too long. null: it does not train."""
    memory: float | None = None
    """Worth of a response whose reward ran out of memory. null: it does not train."""
    crashed: float | None = None
    """Worth of a response whose reward killed its process. null: it does not train."""
    error: float | None = None
    """Worth of a response whose reward raised, was not finite, or had the wrong form. null: it does not train."""
    truncated: float | None = None
    """Worth of a response that the length limit cut off, whatever it says; it is not graded. null: it is graded like any other."""
    max_failed_rate: float = 0.5
    """Stop the run when more than this share of a collection's rewards failed (timeout, memory, crashed, error). 1: go on whatever fails."""
    server: RewardServerConfig = field(default_factory=RewardServerConfig)
    """Reward servers."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """The model behind terms whose source is judge."""

    def __post_init__(self) -> None:
        check_rewards(self)

    @property
    def all_terms(self) -> tuple[RewardTermConfig, ...]:
        """The terms, with the short forms spelt out."""
        return (RewardTermConfig(source=self.function),) if self.function else self.terms or (RewardTermConfig(),)

    @property
    def judges(self) -> tuple[RewardTermConfig, ...]:
        """The terms that a judge decides."""
        return tuple(term for term in self.all_terms if term.source == "judge")

    def worth(self, status: str) -> float | None:
        """What a status other than ok is worth."""
        return getattr(self, status)


def describe_rewards(config: RewardConfig) -> str:
    """One line on the terms, for the plan."""
    terms = [f"{term.weight:g} x {term.label}" + (f" ({term.source})" if term.source not in BUILT_IN else "") for term in config.all_terms]
    judge = f"; judge {config.judge.path or 'the policy itself'}, {config.judge.mode}" if config.judges else ""
    return " + ".join(terms) + judge


def split_function(source: str) -> tuple[str, str]:
    """``file.py:function`` or ``module:function`` in two; of a bare ``file.py`` the function is ``reward_func``."""
    if source.endswith(".py"):
        return source, "reward_func"
    place, _, function = source.rpartition(":")
    return place, function


def check_rewards(config: RewardConfig) -> None:
    """Refuses settings that cannot work. Files are looked for when the rewards are built."""
    both = config.function and config.terms
    require(not both, "reward.function", config.function, "with --reward.terms, put it there: {source: ..., weight: ...}")
    for name in ("processes", "batch_size", "concurrency"):
        require(getattr(config, name) >= 1, f"reward.{name}", getattr(config, name), "at least 1")
    for name in ("deadline_s", "load_timeout_s"):
        require(getattr(config, name) > 0, f"reward.{name}", getattr(config, name), "must be positive")
    require(config.memory_mb >= 0, "reward.memory_mb", config.memory_mb, "use 0 for no limit, or a number of MiB")
    require(0 <= config.max_failed_rate <= 1, "reward.max_failed_rate", config.max_failed_rate, "must lie between 0 and 1 (1: never stop)")
    for status in ("no_answer", *FAILURES):
        worth = config.worth(status)
        require(worth is None or abs(worth) < float("inf"), f"reward.{status}", worth, "use a finite number, or null: such a sample does not train")
    worth = config.truncated
    require(worth is None or abs(worth) < float("inf"), "reward.truncated", worth, "use a finite number, or null: it is graded like any other")
    server = config.server
    for name in ("batch_size", "max_concurrent", "max_response_mb"):
        require(getattr(server, name) >= 1, f"reward.server.{name}", getattr(server, name), "at least 1")
    for name in ("timeout_s", "deadline_s"):
        require(getattr(server, name) > 0, f"reward.server.{name}", getattr(server, name), "must be positive")
    for name in ("retries", "backoff_s"):
        require(getattr(server, name) >= 0, f"reward.server.{name}", getattr(server, name), "must not be negative")
    for term in config.all_terms:
        check_term(term, "function" if config.function else "terms")
        if term.source == "judge":
            check_judge(config.judge)
            with_options(config.judge, term.options)
    names = Counter(term.label for term in config.all_terms)
    twice = [name for name, count in names.items() if count > 1]
    require(not twice, "reward.terms", twice, "each term needs a name of its own: set name")


def check_term(term: RewardTermConfig, flag: str) -> None:
    """Refuses a term that cannot work."""
    where = f"reward.{flag}"
    require(bool(term.source), where, term.source, "a term needs a source")
    if not (term.source in BUILT_IN or term.urls or "://" not in term.source):
        raise ConfigError(f"--{where} holds {term.source!r}: that is no address of the form http(s)://host:port/path")
    require(abs(term.weight) < float("inf"), where, term.weight, "a weight must be a finite number")
    require(term.form in FORMS, where, term.form, f"form is one of {', '.join(FORMS)}")
    require("/" not in term.label and bool(term.label), where, term.label, "a term's name has no slash: it becomes part of the names of metrics")
    if term.source in BUILT_IN or term.urls:
        require(term.form == "auto", where, term.form, f"form is for functions; {term.source} has none")
    if term.source != "judge":  # whose options are settings of reward.judge
        check_options(term, where)
    for url in term.urls:
        check_url(url, where)
    if term.source in BUILT_IN or term.urls:
        return
    place, function = split_function(term.source)
    if not (place and function.isidentifier()):
        hint = did_you_mean(term.source, BUILT_IN)
        known = f"{', '.join(BUILT_IN)}, path/to/file.py:function, module:function, or http(s)://host:port/path"
        raise ConfigError(f"--{where}: reward {term.source!r} is unknown; use {known}{hint}")


def check_url(url: str, where: str) -> None:
    """Refuses an address that is none, or that holds a password."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good:
        raise ConfigError(f"--{where} holds {url.rpartition('@')[2]!r}: that is no address of the form http(s)://host:port/path")
    if parts.username is not None or parts.password is not None:
        remedy = "put a token into an environment variable and name it in --reward.server.token_variable"
        raise ConfigError(f"--{where}: the address of {parts.hostname} holds a user or password, which logs would show; {remedy}")
