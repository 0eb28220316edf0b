"""Settings of ``openrl-reason search``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from openrl_reason.algorithms.trainer import PlacementConfig
from openrl_reason.config import require
from openrl_reason.core.steps import check_step_kind
from openrl_reason.errors import ConfigError
from openrl_reason.evaluation.config import check_intervals
from openrl_reason.evaluation.intervals import IntervalConfig
from openrl_reason.evaluation.value_config import ScoringConfig
from openrl_reason.search.beam import BeamSettings
from openrl_reason.search.sampling import AGGREGATES
from openrl_reason.tasks.base import SPLITS, TaskConfig
from openrl_reason.workers.model_config import ModelConfig
from openrl_reason.workers.rollout_config import RolloutConfig, SamplingConfig

METHODS = ("beam", "best_of_n", "majority")


@dataclass(frozen=True)
class SearchConfig:
    """Accuracy of value-guided decoding on held-out items, against plain samples of as many tokens."""

    policy: str = ""
    """Folder of the model that writes."""
    critic: str = ""
    """Folder of a model with a scalar head that values what was written, for instance what PPO leaves in critic/. Not for --method majority."""
    output: str = ""
    """File for the result as JSON, as of evaluate; the answers go beside it as .samples.jsonl (empty: only print)."""
    overwrite: bool = False
    """Replace an existing result at output."""
    resume: bool = True
    """Go on with what a killed search left beside the output file (.partial.jsonl): nothing is generated twice. false: start anew."""
    method: str = "beam"
    """beam (over reasoning steps), best_of_n (whole responses, chosen by value) or majority (whole responses, most frequent answer, no critic)."""
    beams: tuple[int, ...] = (3,)
    """Beam search: states kept after each step. Several numbers are searched one after the other."""
    expansions: int = 0
    """Beam search: continuations of each state. 0: as many as beams."""
    first_step: str = "beams"
    """Beam search: candidates for the first step: beams (as many as beams, as in OREO's code) or all (beams x continuations)."""
    step_kind: str = ""
    """How responses are cut into steps (docs/steps.md). Empty: as the task says. newline and newline_sentence waste no tokens; of other kinds
    what is written beyond a step is discarded."""
    max_steps: int = 20
    """Beam search: steps of a response. One that is not finished by then is no answer."""
    step_tokens: int = 0
    """Beam search: longest step in tokens; one that reaches it is cut there and goes on. 0: what is left of sampling.max_new_tokens."""
    merge_duplicates: bool = True
    """Beam search: keep one of several candidates with the same tokens. false: as in OREO's code."""
    samples: tuple[int, ...] = (8,)
    """best_of_n and majority: responses to each item. Several numbers share their first responses."""
    aggregate: str = "last"
    """best_of_n: a response's value from those after each of its steps: last, min, mean, or advantage (the sum of the steps' advantages, which
    ranks as last)."""
    answer: str = "value"
    """Of the finished responses, the one of highest value (value), or the answer whose responses have the largest sum of values (vote)."""
    value_after_eos: bool = False
    """Value finished responses after their end-of-sequence token, which a reward model may want; critics have learnt values up to it."""
    baseline: bool = True
    """Beam search: also sample plain responses until they have as many tokens, and take their most frequent answer."""
    greedy: bool = True
    """Also one greedy response to each item."""
    value_cache_gib: float = 1.0
    """Memory of each rank of the critic for keys and values of states that it valued, so that only new steps go through it. 0: none. Not with
    flash_attention_2, where each state is read from its start: name --scoring.attention packed."""
    concurrent: int = 256
    """Items searched at the same time; 0: all."""
    split: str = "test"
    """test or train."""
    num_items: int = 0
    """The first so many items (0: all)."""
    ids: tuple[str, ...] = ()
    """Only these items: task ids, or ids in the data."""
    ids_file: str = ""
    """A file with one id a line, added to ids."""
    group_by: tuple[str, ...] = ("level", "type")
    """Tables by these entries of the items' info, where there are any."""
    seed: int = 0
    """Seed of the samples."""
    grader_processes: int = 1
    """Processes that grade."""
    grader_deadline_s: float = 5.0
    """Seconds one answer may take to grade."""
    intervals: IntervalConfig = field(default_factory=IntervalConfig)
    """Confidence intervals."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """What is being solved."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How responses are sampled; max_new_tokens is for a whole response, over all of its steps."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """The engines."""
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    """How the critic is run. It works beside the engines, so on one GPU leave it memory: rollout.gpu_memory_utilization."""
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    """Cluster and placement."""
    dry_run: bool = False
    """Print what would be done and stop."""

    def __post_init__(self) -> None:
        _check_search(self)
        require(self.split in SPLITS, "split", self.split, "use train or test")
        require(self.num_items >= 0, "num_items", self.num_items, "use 0 for all items")
        require(self.value_cache_gib >= 0, "value_cache_gib", self.value_cache_gib, "use 0 for none, or the GiB that the critic may have")
        require(self.concurrent >= 0, "concurrent", self.concurrent, "use 0 for all items, or a number of them")
        require(not self.ids_file or Path(self.ids_file).is_file(), "ids_file", self.ids_file, "there is no such file")
        require(self.grader_processes >= 1, "grader_processes", self.grader_processes, "at least 1")
        require(self.grader_deadline_s > 0, "grader_deadline_s", self.grader_deadline_s, "must be positive")
        budget, limit = self.sampling.max_new_tokens, self.rollout.max_model_len
        require(budget < limit, "sampling.max_new_tokens", budget, f"leaves no room for a prompt: it must be below --rollout.max_model_len {limit}")
        check_intervals(self.intervals, "intervals")
        try:
            ModelConfig(**vars(self.scoring))
        except ConfigError as error:
            raise ConfigError(f"--scoring: {error}") from None
        if self.step_kind:
            try:
                check_step_kind(self.step_kind)
            except ConfigError as error:
                raise ConfigError(f"--step_kind: {error}") from None

    def beam(self, beams: int) -> BeamSettings:
        """The shape of the search with so many beams."""
        first = beams * (self.expansions or beams) if self.first_step == "all" else beams
        return BeamSettings(beams, self.expansions, first, self.max_steps, self.merge_duplicates)


def _check_search(config: SearchConfig) -> None:
    require(config.method in METHODS, "method", config.method, f"use one of {', '.join(METHODS)}")
    needless = config.method == "majority" and config.critic
    require(not needless, "critic", config.critic, "--method majority takes the most frequent answer, without a critic: leave it out")
    require(config.first_step in ("beams", "all"), "first_step", config.first_step, "use beams or all")
    require(config.aggregate in AGGREGATES, "aggregate", config.aggregate, f"use one of {', '.join(AGGREGATES)}")
    require(config.answer in ("value", "vote"), "answer", config.answer, "use value or vote")
    for name in ("max_steps", "step_tokens", "expansions"):
        least = int(name == "max_steps")
        require(getattr(config, name) >= least, name, getattr(config, name), f"at least {least}")
    name = "beams" if config.method == "beam" else "samples"
    numbers: Sequence[int] = getattr(config, name)
    require(bool(numbers) and min(numbers) >= 1, name, list(numbers), "numbers of at least 1, as in '[1, 3, 5]'")
    require(len(set(numbers)) == len(numbers), name, list(numbers), "name every number once")
    repeated = max(config.expansions or 1, *numbers) if config.method == "beam" else max(numbers)
    alike = config.sampling.temperature == 0 and repeated > 1
    remedy = "at temperature 0 all continuations of a text are alike: use 1, or a --sampling.temperature above 0"
    require(not alike, name, list(numbers), remedy)
