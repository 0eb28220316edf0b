"""Beam search over steps: what it finds, what it keeps, and that neither arrival order nor ties nor neighbours matter."""

import itertools
import math
import random

import pytest

from openrl_reason.core.steps import split_steps, stop_strings
from openrl_reason.core.trajectory import StopReason
from openrl_reason.errors import ConfigError, WorkerError
from openrl_reason.models.tiny import make_tokenizer
from openrl_reason.search.beam import BeamSettings, beam_search
from openrl_reason.search.candidates import Candidate, Finish, Problem, StepReader
from openrl_reason.workers.rollout_config import Completion
from tests.search.scripted import END, ScriptedPool, answers, by_number, ids_of, problem, reader, run, text_of


def search(script, value=lambda text: 0.0, *, kind="newline", prompt="Q:", budget=100, reads=(), step_tokens=0, value_eos=False, stop=(), **settings):
    """Outcome, pool and oracle of one beam search."""
    own = reader(kind, stop=tuple(stop), step_tokens=step_tokens, value_eos=value_eos)
    shape = BeamSettings(**{"beams": 2, **settings})
    (outcome,), pool, oracle = run([beam_search(problem(prompt, budget=budget), shape, own)], script, value, stop=own.stop)
    return outcome, pool, oracle


def random_script(letters="abc", end=0.2):
    """Lines of a few letters; what is written depends on the seed alone."""

    def script(text, sample, seed):
        rng = random.Random(seed)
        lines = []
        while not lines or (rng.random() > end and len(lines) < 30):
            lines.append("".join(rng.choices(letters, k=rng.randrange(4))))
        return "\n".join(lines) + END

    return script


def hashed(text):
    """A value that differs for any two texts."""
    return random.Random(text).random()


def test_the_best_path_is_found_where_values_know_it():
    target, letters = "dacb", "abcd"

    def script(text, sample, seed):
        done = text.count("\n")
        return f"{letters[sample % 4]}\n" if done < len(target) else f"#{END}"

    def oracle(text):
        path = text.removeprefix("Q:").replace("\n", "").rstrip("#")
        return len(path) / 9 if target.startswith(path) else 0.0

    for beams in (1, 2, 3):
        outcome, _, _ = search(script, oracle, beams=beams, expansions=4, first_expansions=4)
        best = max(outcome.finished, key=lambda one: one.value)
        assert text_of(best.response) == "d\na\nc\nb\n#" + END and best.step_values == tuple(n / 9 for n in (1, 2, 3, 4, 4))
    assert text_of(search(script, lambda text: -oracle(text), beams=1, expansions=4)[0].finished[0].response) != "d\na\nc\nb\n#" + END


def test_a_wrong_turn_is_left_when_values_see_it_later():
    """Greedy by value goes wrong at the first step; two beams do not."""
    script = by_number("x\n", "y\n")

    def oracle(text):
        return {"Q:x\n": 0.6, "Q:y\n": 0.5}.get(text, 0.9 if text.startswith("Q:y") else 0.1)

    def starts(beams):
        outcome, _, _ = search(script, oracle, beams=beams, expansions=2, first_expansions=2, max_steps=3)
        return {text_of(one.response)[0] for one in outcome.unfinished}

    assert starts(1) == {"x"} and starts(2) == {"y"}


def test_one_beam_and_one_continuation_is_plain_greedy_decoding():
    def greedy(text, sample, seed):  # a function of the text alone, that goes on from wherever it is cut
        whole = "first\n\nthen 1. 2 \n= 3\nso #### 3" + END
        return whole[len(text) - 2 :]

    outcome, pool, _ = search(greedy, beams=1)
    assert answers(outcome) == [greedy("Q:", 0, 0)] and len(outcome.finished[0].step_values) == 5
    for kind in ("newline_sentence", "fixed:3", "gsm8k", "math", "response"):
        assert answers(search(greedy, beams=1, kind=kind)[0]) == [greedy("Q:", 0, 0)]
    assert answers(search(greedy, beams=1, step_tokens=2)[0]) == [greedy("Q:", 0, 0)]
    assert sum(len(r.prompt_ids) > 2 for r in pool.requests) == 4


def test_what_has_finished_takes_no_beams_place():
    """Two of three continuations end at once and have the best values; the beams stay full all the same."""
    outcome, pool, _ = search(by_number(f"e{END}", "f\n", f"g{END}"), lambda text: float("f" not in text), beams=3, expansions=3, max_steps=4,
                              first_expansions=9, merge_duplicates=False)  # fmt: skip
    states = [text_of(request.prompt_ids) for request in pool.requests]
    assert [sum(state.count("\n") == depth for state in states) for depth in range(4)] == [9, 9, 9, 9]
    assert len(outcome.finished) == 4 * 6 and outcome.counts[Finish.STEP_CAP] == 3 and outcome.reason is None


def test_the_first_step_has_as_many_candidates_as_asked():
    for first, expected in ((0, 3), (9, 9)):
        _, pool, _ = search(random_script(end=0.01), hashed, beams=3, first_expansions=first, max_steps=2)
        at_prompt = sum(text_of(request.prompt_ids) == "Q:" for request in pool.requests)
        assert at_prompt == expected and len(pool.requests) == expected + 9


def test_values_are_taken_at_the_last_token_the_stop_string_included():
    _, _, oracle = search(by_number("ab\n", f"cd. e{END}"), kind="newline", max_steps=1)
    assert sorted(oracle.asked) == ["Q:ab\n", "Q:cd. e"]
    _, _, oracle = search(by_number("ab\n", f"cd{END}"), value_eos=True, max_steps=1)
    assert sorted(oracle.asked) == ["Q:ab\n", "Q:cd" + END]
    _, _, oracle = search(by_number("x. y\n", "z is $1.$ so\n"), kind="newline_sentence", max_steps=1)
    assert sorted(oracle.asked) == ["Q:x. ", "Q:z is $1.$ "]


@pytest.mark.parametrize("value", [lambda text: 0.0, hashed, lambda text: float(len(text) % 2)], ids=["all alike", "all different", "many ties"])
@pytest.mark.parametrize("merge", [True, False])
def test_neither_order_of_arrival_nor_concurrency_nor_neighbours_change_what_is_found(value, merge):
    names, shape = "abcdefgh", BeamSettings(3, max_steps=5, merge_duplicates=merge)

    def found(chosen, **how):
        searches = [beam_search(problem(name), shape, reader()) for name in chosen]
        outcomes, pool, _ = run(searches, random_script(), value, **how)
        return dict(zip(chosen, outcomes, strict=True)), pool

    first, pool = found(names)
    assert sum(len(one.finished) for one in first.values()) > 10
    for order, concurrent in itertools.product(range(3), (0, 3)):
        assert found(names, order=order, concurrent=concurrent)[0] == first
    assert found(names[::-1])[0] == first
    assert all(found(name, order=7)[0][name] == first[name] for name in names)
    assert found(names, seed=(1, "search"))[0] != first
    assert len({request.seed for request in pool.requests}) == len(pool.requests)


def test_a_slow_problem_holds_up_no_other():
    class Slow(ScriptedPool):
        def poll(self):
            quick = [request for request in self._waiting if not text_of(request.prompt_ids).startswith("slow")]
            now = quick or self._waiting
            self._waiting = [request for request in self._waiting if request not in now]
            return [self.complete(request) for request in now]

    pool = Slow(lambda text, sample, seed: "x\n" if text.count("\n") < 6 else END)
    run([beam_search(problem(name), BeamSettings(2), reader()) for name in ("slow", "a", "b")], pool)
    submitted = [text_of(request.prompt_ids)[0] for request in pool.requests]
    assert submitted.index("s", 2) > max(place for place, name in enumerate(submitted) if name in "ab")


def test_a_response_without_room_is_no_answer():
    outcome, pool, oracle = search(by_number("abcdefgh" + END, "abc\n"), budget=6)
    assert outcome.finished == [] and outcome.reason is Finish.LENGTH and outcome.counts[Finish.LENGTH] == 2
    assert [text_of(one.response) for one in outcome.unfinished] == ["abcdef", "abc\nab"] and oracle.asked == ["Q:abc\n"]
    assert max(len(request.prompt_ids) - 2 + request.sampling.max_new_tokens for request in pool.requests) == 6
    complete, _, _ = search(by_number("abc\n"), budget=4)
    assert complete.reason is Finish.LENGTH and complete.finished == [], "a step that ends at the limit leaves no room to go on"
    exact, _, _ = search(by_number(f"abc{END}"), budget=4)
    assert exact.reason is None and answers(exact) == [f"abc{END}"]


@pytest.mark.parametrize("room", [0, -3])
def test_a_prompt_that_fills_the_context_is_unanswered(room):
    one = problem("Q" * (32 - room), max_model_len=32)
    (outcome,), pool, oracle = run([beam_search(one, BeamSettings(3), reader())], by_number("a\n"), max_model_len=32)
    assert pool.requests == [] and oracle.asked == [] and outcome.reason is Finish.LENGTH and outcome.finished == []
    one = problem("Q" * 31, max_model_len=32)
    assert one.budget == 1 and answers(run([beam_search(one, BeamSettings(2), reader())], by_number(END), max_model_len=32)[0][0]) == [END]


def test_the_cap_on_steps_is_no_answer():
    outcome, _, _ = search(by_number("a\n", "b\n"), hashed, max_steps=3)
    assert outcome.finished == [] and outcome.reason is Finish.STEP_CAP and outcome.counts[Finish.STEP_CAP] == 2
    assert all(one.response.count(ids_of("\n")[0]) == 3 and one.finish is Finish.STEP_CAP for one in outcome.unfinished)


def test_steps_without_text():
    """An empty line is a step; an end token alone finishes what stands; an engine that writes nothing is noticed."""
    outcome, _, oracle = search(lambda text, sample, seed: "\n" if text.count("\n") < 3 else END)
    assert set(answers(outcome)) == {"\n\n\n" + END} and sorted(set(oracle.asked)) == ["Q:\n", "Q:\n\n", "Q:\n\n\n"]
    silent, _, _ = search(by_number(""))
    assert silent.reason is Finish.EMPTY and silent.counts[Finish.EMPTY] == 1 and silent.counts["merged"] == 1
    at_once, _, oracle = search(by_number(END))
    assert answers(at_once) == [END] and oracle.asked == ["Q:"]


def test_equal_candidates_are_valued_once_and_merged_if_asked():
    script = by_number("a\n", "a\n", "b\n")
    for merge in (True, False):
        outcome, pool, oracle = search(
            script, lambda text: -text.count("b"), beams=2, expansions=3, first_expansions=3, max_steps=2, merge_duplicates=merge
        )
        assert len(oracle.asked) == len(set(oracle.asked))
        second = {text_of(request.prompt_ids) for request in pool.requests} - {"Q:"}
        assert second == ({"Q:a\n", "Q:b\n"} if merge else {"Q:a\n"}) and outcome.counts["merged"] == (1 + 2 if merge else 0)


def test_equal_beams_draw_different_samples():
    script = lambda text, sample, seed: "a\n" if "\n" not in text else f"{seed}\n"  # noqa: E731
    _, pool, _ = search(script, beams=2, max_steps=2, merge_duplicates=False)
    assert len({request.seed for request in pool.requests}) == len(pool.requests) == 2 + 4


@pytest.mark.parametrize("kind", ["newline", "newline_sentence", "response"])
def test_the_first_stop_string_of_a_text_ends_its_first_step(kind):
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choices("ab.$ \n", k=rng.randrange(1, 12)))
        ends = [text.find(stop) + len(stop) for stop in stop_strings(kind) if stop in text]
        assert split_steps(text, kind)[0] == text[: min(ends, default=len(text))]


@pytest.mark.parametrize("kind", ["newline", "newline_sentence", "gsm8k", "sentence", "fixed:4", "math", "react"])
def test_steps_end_where_the_splitter_cuts(kind):
    """One continuation of one beam walks through a fixed text: its steps are the splitter's, and whatever was written beyond one is counted."""
    text = "Thought: 3 apples. They cost $2.$ each\nAction: sum 1.5 and more\n\nThought: all of it is \\(6\\).\n#### 6" + END
    outcome, pool, oracle = search(lambda before, sample, seed: text[len(before) - 2 :], beams=1, kind=kind, budget=200, max_steps=60)
    assert answers(outcome) == [text]
    states = [0, *(len(state) - 2 for state in oracle.asked)]
    found = [text[start:end] for start, end in itertools.pairwise(states)]
    expected = split_steps(text.removesuffix(END), kind)
    assert "".join(found) == text.removesuffix(END)
    if kind == "newline":
        assert outcome.counts["discarded_tokens"] == 0
    if kind in ("newline", "newline_sentence", "fixed:4", "react", "gsm8k"):  # a boundary of these does not move with what comes later
        assert found == expected
    assert outcome.counts["generated_tokens"] == pool.generated_tokens == len(text) + outcome.counts["discarded_tokens"]


def test_a_token_that_ends_one_delimiter_and_begins_the_next_hides_no_boundary():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([" ...", " b"])
    steps, parent, found = StepReader(tokenizer, "newline_sentence"), Candidate(), []
    for pieces, stopped in ((("a", ".", " ..."), ". "), ((" b", "c", "\n"), "\n")):  # " ..." ends the first ". ", and with " b" makes the next one
        ids = [tokenizer(piece, add_special_tokens=False)["input_ids"][0] for piece in pieces]
        completion = Completion("", ids, [0.0] * len(ids), StopReason.STOP_STRING, stopped, policy_version=0, num_cached_tokens=0)
        one = steps.read(Problem("", (5,), 100), parent, completion)
        found.append(tokenizer.decode(one.response[len(parent.response) :]))
        parent = one
    assert found == ["a. ...", " b"] and one.num_discarded == 2 and not one.is_open


def test_a_limit_of_a_steps_tokens_cuts_without_finishing():
    text = "abcde. fg\nh" + END
    outcome, _, oracle = search(lambda before, sample, seed: text[len(before) - 2 :], beams=1, kind="newline_sentence", step_tokens=3)
    assert answers(outcome) == [text] and outcome.counts["open_steps"] == 2
    # "abc" is cut; "de." is, too; the blank that ends the sentence stands alone, and what the engine wrote after it is sampled again.
    assert oracle.asked == ["Q:abc", "Q:abcde.", "Q:abcde. ", "Q:abcde. fg\n", "Q:abcde. fg\nh"]


def test_a_stop_string_of_responses_ends_them_even_across_steps():
    text = "a\n\nQ: next\nmore"
    outcome, _, oracle = search(lambda before, sample, seed: text[len(before) - 2 :], beams=1, stop=("\n\nQ:",))
    assert answers(outcome) == ["a\n\nQ:"] and outcome.finished[0].finish is Finish.STOP_STRING
    within, _, _ = search(by_number("ab STOP cd\n"), beams=1, stop=("STOP",))
    assert answers(within) == ["ab STOP"]


def test_log_probabilities_and_counts_belong_to_the_tokens_that_were_kept():
    outcome, pool, _ = search(random_script(), hashed, beams=3, kind="fixed:2")
    for one in outcome.finished:
        assert len(one.logprobs) == len(one.response)
    counts = outcome.counts
    assert counts["candidates"] == len(pool.requests) and counts["generated_tokens"] == pool.generated_tokens and counts["discarded_tokens"] > 0
    ended = sum(counts[reason] for reason in Finish)
    assert ended + counts["pruned"] + counts["merged"] <= counts["candidates"]


@pytest.mark.parametrize("settings", [{"beams": 0}, {"beams": -1}, {"beams": 2, "expansions": -1}, {"beams": 1, "max_steps": 0}])
def test_shapes_that_cannot_work_are_refused(settings):
    with pytest.raises(ConfigError, match="--(beams|expansions|max_steps) is "):
        BeamSettings(**settings)


def test_a_value_that_is_not_finite_stops_the_run():
    with pytest.raises(WorkerError, match="nan, which ranks nothing"):
        search(by_number("a\n"), lambda text: math.nan)
