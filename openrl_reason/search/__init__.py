"""Value-guided decoding: step-level beam search, best-of-N, best-of-K for agents (docs/search.md)."""

from openrl_reason.search.actions import Choice, best_of_k
from openrl_reason.search.beam import BeamSettings, beam_search
from openrl_reason.search.candidates import Candidate, Finish, Outcome, Problem, StepReader
from openrl_reason.search.choose import choose
from openrl_reason.search.drive import Expand, Expanded, Sampler, Valuer, run_searches
from openrl_reason.search.sampling import ResponseValue, outcome_of, sample_responses
from openrl_reason.search.serving import BatchedValuer, LocalCritic, PoolSampler

__all__ = [
    "BatchedValuer", "BeamSettings", "Candidate", "Choice", "Expand", "Expanded", "Finish", "LocalCritic", "Outcome", "PoolSampler", "Problem",
    "ResponseValue", "Sampler", "StepReader", "Valuer", "beam_search", "best_of_k", "choose", "outcome_of", "run_searches", "sample_responses",
]  # fmt: skip
