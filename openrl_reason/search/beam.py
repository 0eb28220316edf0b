"""Step-level beam search guided by values (OREO, Wang et al. 2024, arXiv 2412.16145, section 4.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from openrl_reason.config import require
from openrl_reason.search.candidates import Candidate, Finish, Outcome, Problem, StepReader
from openrl_reason.search.drive import Expand, Search


@dataclass(frozen=True)
class BeamSettings:
    """The shape of a beam search."""

    beams: int
    """States that are kept after each step."""
    expansions: int = 0
    """Continuations of each of them. 0: as many as there are beams."""
    first_expansions: int = 0
    """Continuations of the prompt. 0: as many as there are beams, as in the published code."""
    max_steps: int = 20
    """Steps of a response."""
    merge_duplicates: bool = True
    """Keep one of several candidates with the same tokens, so that beams differ."""

    def __post_init__(self) -> None:
        require(self.beams >= 1, "beams", self.beams, "at least 1")
        require(self.max_steps >= 1, "max_steps", self.max_steps, "at least 1")
        for name in ("expansions", "first_expansions"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "use 0 for as many as there are beams, or 1 and more")


def beam_search(problem: Problem, settings: BeamSettings, reader: StepReader) -> Search:
    """Returns an ``Outcome``.

    Each step samples ``expansions`` continuations of every beam, and keeps the ``beams`` of highest value among those that go on. What has finished
    is put aside and takes no beam's place. Ties go to the better beam's continuation, then to the earlier sample.
    """
    outcome, beams = Outcome(), [Candidate()]
    first, later = (count or settings.beams for count in (settings.first_expansions, settings.expansions))
    for depth in range(settings.max_steps):
        prefixes = [problem.prefix(beam.response, f"{depth}/{place}", reader.step_tokens) for place, beam in enumerate(beams)]
        expanded = yield Expand(
            prefixes, later if depth else first, lambda place, completion, beams=tuple(beams): reader.read(problem, beams[place], completion)
        )
        candidates = []
        for beam, row in zip(beams, expanded.found, strict=True):
            for one in row:
                outcome.count(one, len(one.response) - len(beam.response))
                candidates.append(_valued(one, expanded.values))
        candidates = _distinct(candidates, outcome) if settings.merge_duplicates else candidates
        for one in candidates:
            if one.finish is not None:
                outcome.end(one)
        going_on = sorted((one for one in candidates if one.finish is None), key=lambda one: -one.value)  # stable: ties keep their order
        beams = going_on[: settings.beams]
        outcome.counts["pruned"] += len(going_on) - len(beams)
        if not beams:
            return outcome
    for beam in beams:
        outcome.end(replace(beam, finish=Finish.STEP_CAP))
    return outcome


def _valued(candidate: Candidate, values: dict) -> Candidate:
    """With the value of its one state; a candidate that has ended without an answer keeps its parent's."""
    if not candidate.states:
        return candidate
    value = values[candidate.states[-1]]
    return replace(candidate, value=value, step_values=(*candidate.step_values, value), states=())


def _distinct(candidates: Sequence[Candidate], outcome: Outcome) -> list[Candidate]:
    kept: dict[tuple[int, ...], Candidate] = {}
    for one in candidates:
        kept.setdefault(one.response, one)
    outcome.counts["merged"] += len(candidates) - len(kept)
    return list(kept.values())
