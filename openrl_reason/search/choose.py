"""Which of the answers that a search found is the answer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from openrl_reason.search.candidates import Candidate

RULES = ("value", "vote", "majority")


def choose(answers: Sequence[Candidate], rule: str, parsed: Sequence[str | None] = ()) -> int:
    """Place of the chosen answer. Ties go to the one found first.

    Args:
        rule: ``value``: the highest value. ``vote``: equal answers add up their values (those below 0 count as 0; if none is above, every answer
            counts alike), and the answer with most is given by its response of highest value. ``majority``: the same, every response counting 1, and
            given by its first response.
        parsed: canonical answer of each response, for the votes; None abstains, unless all do.

    Raises:
        ValueError: there are no answers, or the rule is unknown.
    """
    if not answers:
        raise ValueError("there is no answer to choose")
    if rule == "value":
        return _best(answers, range(len(answers)))
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; use one of {', '.join(RULES)}")
    voters = [place for place, answer in enumerate(parsed) if answer is not None] or list(range(len(answers)))
    weights = [1.0 if rule == "majority" else max(answers[place].value, 0.0) for place in voters]
    if not any(weights):
        weights = [1.0] * len(voters)
    votes: dict[str | None, list[float]] = {}
    for place, weight in zip(voters, weights, strict=True):
        votes.setdefault(parsed[place], []).append(weight)
    winner = max(votes, key=lambda answer: math.fsum(votes[answer]))  # the first of equals: dictionaries keep their order
    givers = [place for place in voters if parsed[place] == winner]
    return givers[0] if rule == "majority" else _best(answers, givers)


def _best(answers: Sequence[Candidate], places: Sequence[int]) -> int:
    return max(places, key=lambda place: (answers[place].value, -place))
