"""Best-of-N: which states are valued, what they make, and who is chosen."""

import itertools

import pytest

from openrl_reason.errors import ConfigError
from openrl_reason.search.candidates import Candidate, Finish
from openrl_reason.search.choose import choose
from openrl_reason.search.sampling import AGGREGATES, ResponseValue, outcome_of, sample_responses
from tests.search.scripted import END, TOKENIZER, answers, by_number, problem, reader, run, text_of
from tests.search.test_beam import hashed, random_script


def in_turn(*options):
    """Each request gets the next of the options, in the order of the requests."""
    options = itertools.cycle(options)
    return lambda text, sample, seed: next(options)


def sample(script, numbers, aggregate="last", value=hashed, *, kind="newline", value_eos=False, budget=100, name="Q:", **pool):
    worth = ResponseValue(TOKENIZER, kind, aggregate, value_eos) if aggregate else None
    found, *more = run([sample_responses(problem(name, budget=budget), numbers, reader("response"), worth)], script, value, stop=(), **pool)
    return [outcome_of(samples) for samples in found], *more


@pytest.mark.parametrize(
    ("aggregate", "expected"),
    [("last", ["Q:a\n\nb"]), ("min", ["Q:a\n", "Q:a\n\n", "Q:a\n\nb"]), ("mean", ["Q:a\n", "Q:a\n\n", "Q:a\n\nb"]),
     ("advantage", ["Q:", "Q:a\n", "Q:a\n\n", "Q:a\n\nb"]), ("", [])],
)  # fmt: skip
def test_states_at_the_ends_of_steps_are_valued(aggregate, expected):
    (outcome,), _, oracle = sample(by_number("a\n\nb" + END), range(1), aggregate)
    assert oracle.asked == expected and len(outcome.finished) == 1
    if aggregate:
        (_,), _, after = sample(by_number("a\n\nb" + END), range(1), aggregate, value_eos=True)
        assert after.asked == [*expected[:-1], expected[-1] + END]


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_degenerate_responses_have_a_value(aggregate):
    (outcome,), _, _ = sample(in_turn(END, "\n" + END, "x" + END), range(3), aggregate)
    assert all(one.value == one.value for one in outcome.finished) and len(outcome.finished) == 3


def test_values_are_combined_as_their_names_say():
    values = (0.25, 0.5, 0.125, 1.0)
    combined = {name: ResponseValue(TOKENIZER, "newline", name).combine(values) for name in AGGREGATES}
    assert combined == {"last": 1.0, "min": 0.125, "mean": 0.46875, "advantage": 0.75}


def test_the_sum_of_advantages_ranks_as_the_last_value():
    ranks = []
    for aggregate in ("last", "advantage"):
        (outcome,), _, _ = sample(random_script(), range(12), aggregate)
        ranks.append(sorted(range(12), key=lambda place: outcome.finished[place].value))  # noqa: B023
    assert ranks[0] == ranks[1]


def test_a_sample_is_what_it_is_however_many_there_are_and_whenever_it_comes():
    few, many = (answers(sample(random_script(), range(count), order=count)[0][0]) for count in (3, 9))
    later = answers(sample(random_script(), range(3, 9))[0][0])
    assert many == few + later and len(set(many)) > 3


def test_a_sample_that_is_cut_off_is_no_answer_and_is_not_valued():
    (outcome,), _, oracle = sample(in_turn("abcdefgh" + END, "ab" + END), range(4), budget=5)
    assert answers(outcome) == ["ab" + END] * 2 and oracle.asked == ["Q:ab"] and outcome.counts[Finish.LENGTH] == 2
    (nothing,), _, _ = sample(by_number("abcdefgh" + END), range(2), budget=5)
    assert nothing.reason is Finish.LENGTH and [text_of(one.response) for one in nothing.unfinished] == ["abcde"] * 2


def candidates(*values):
    return [Candidate(response=(place,), finish=Finish.EOS, value=value) for place, value in enumerate(values)]


def test_the_highest_value_is_chosen_and_the_first_of_equals():
    assert choose(candidates(0.1, 0.7, 0.7, 0.2), "value") == 1
    assert choose(candidates(-2.0, -1.0), "value") == 1


@pytest.mark.parametrize(
    ("values", "parsed", "vote", "majority"),
    [
        ((0.9, 0.2, 0.3, 0.25), ["5", "7", "7", "7"], 0, 1),  # one sure answer against three unsure ones
        ((0.5, 0.2, 0.4, 0.25), ["5", "7", "7", "7"], 2, 1),  # the answer with most, by its best response
        ((0.9, 0.2), [None, "7"], 1, 1),  # who has no answer abstains
        ((0.1, 0.9), [None, None], 1, 0),  # unless all do
        ((-1.0, -2.0, -3.0), ["5", "7", "7"], 1, 1),  # no value above 0: all count alike
        ((0.5, -9.0, 0.4), ["5", "5", "7"], 0, 0),  # a value below 0 takes nothing from its answer
        ((0.4, 0.4), ["7", "5"], 0, 0),  # ties: the first
        ((0.0, 0.0, 0.1), ["7", "7", "5"], 2, 0),
    ],
)
def test_votes(values, parsed, vote, majority):
    pool = candidates(*values)
    assert choose(pool, "vote", parsed) == vote and choose(pool, "majority", parsed) == majority


def test_a_vote_does_not_depend_on_the_names_of_the_answers():
    values, parsed = (0.3, 0.2, 0.2, 0.1), ["a", "b", "b", None]
    for names in itertools.permutations("xyz", 2):
        renamed = [None if one is None else dict(zip("ab", names, strict=True))[one] for one in parsed]
        assert choose(candidates(*values), "vote", renamed) == 1


def test_what_cannot_be_chosen_from_is_refused():
    with pytest.raises(ValueError, match="no answer"):
        choose([], "value")
    with pytest.raises(ValueError, match="unknown rule 'best'"):
        choose(candidates(1.0), "best")
    with pytest.raises(ConfigError, match="--aggregate is 'median': use one of last"):
        ResponseValue(TOKENIZER, "newline", "median")
