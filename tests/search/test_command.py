"""What the command makes of searches: answers, budgets, results that compare reads, a search that goes on, and what it refuses."""

import itertools
import json
import math
from concurrent.futures import Future

import pytest

from openrl_reason.config import parse_config
from openrl_reason.errors import ConfigError, DataError
from openrl_reason.evaluation.compare import compare_results, read_result
from openrl_reason.evaluation.config import EvalSetConfig
from openrl_reason.evaluation.evaluate import result_record, write_result
from openrl_reason.evaluation.intervals import IntervalConfig
from openrl_reason.evaluation.recording import RecordingPool
from openrl_reason.evaluation.sets import SetDefaults, prepare_sets
from openrl_reason.rewards.base import RewardResult
from openrl_reason.search.command import _check_tokenizer, _compare, _metrics, _search, plan, search_model
from openrl_reason.search.config import SearchConfig
from openrl_reason.search.results import Grader
from openrl_reason.search.run import SearchRun, nearest
from openrl_reason.search.serving import BatchedValuer
from openrl_reason.tasks.base import Task, TaskConfig
from openrl_reason.workers.rollout_config import RolloutConfig, SamplingConfig
from tests.evaluation.conftest import Characters
from tests.search.scripted import END, TOKENIZER, ScriptedPool, text_of
from tests.search.test_beam import hashed

ROLLOUT = RolloutConfig(max_model_len=200)


class Sums(Task):
    """1+1=? ... 4+4=?; the last one is long."""

    name = "sums"
    grade_kind = "gsm8k"
    default_prompt_template = "{question}"

    def load_split(self, split):
        return [self.make_item(f"{n}+{n}=?" + " " * (170 if n == 5 else 0), gold=str(2 * n), info={"level": n % 2}) for n in range(1, 6)]


class Rewarder:
    """Reads what follows the mark; right if it is the gold answer. Counts what it is asked."""

    def __init__(self):
        self.asked = []

    def submit(self, sample):
        self.asked.append((sample.item.task_id, sample.response))
        _, mark, answer = sample.response.rpartition("#### ")
        future: Future[RewardResult] = Future()
        right = float(answer == sample.item.gold)
        future.set_result(RewardResult(right, "ok" if mark else "no_answer", answer if mark else None))
        return future


def script(text, sample, seed):
    """Lines of reasoning, then an answer that is right, off by one, missing, or never comes, by the seed. 4+4 always runs on."""
    question, _, written = text.partition("?")
    n = int(question[0])
    lines = written.strip(" ").count("\n")
    kind = seed % 5
    if n == 4:
        return "round and round\n" * 30
    if kind == 4 and not lines:
        return "hm\n" * 40
    return "so\n" * max(0, 1 + seed % 3 - lines) + {0: f"#### {2 * n}", 1: f"#### {2 * n + 1}", 2: "no idea", 3: f"#### {2 * n}", 4: "?"}[kind] + END


def oracle(states):
    """Knows the answer, and likes short texts."""
    values = []
    for state in map(text_of, states):
        n = int(state[0])
        values.append(float(state.endswith(f"#### {2 * n}")) - 0.001 * len(state) + 1e-6 * hashed(state))
    return values


def prepared(**settings):
    config = SearchConfig(
        **{"sampling": SamplingConfig(max_new_tokens=40), "rollout": ROLLOUT, "intervals": IntervalConfig(num_resamples=200)} | settings
    )
    task = Sums(TaskConfig()).cut_by(config.step_kind or "newline")
    defaults = SetDefaults(config.split, config.num_items, 1, config.sampling)
    (chosen,) = prepare_sets((EvalSetConfig(),), default_task=task, tokenizer=TOKENIZER, defaults=defaults, max_model_len=200)
    return config, chosen


def searched(pool=None, values=oracle, **settings):
    config, chosen = prepared(**settings)
    rewarder = Rewarder()
    with BatchedValuer(values) as valuer:
        run = SearchRun(config, chosen, TOKENIZER, pool or ScriptedPool(script, order=3, max_model_len=200), valuer)
        pairs = list(_search(config, run, Grader(chosen, TOKENIZER, rewarder, config.intervals)))
    return config, pairs, rewarder


def test_a_beam_search_and_its_baseline_become_results_that_compare_reads(tmp_path):
    config, pairs, rewarder = searched(beams=(2, 4))
    results = [one for pair in pairs for one in pair]
    names = [one.eval_set.name for one in results]
    assert names == ["sums/beam-2", "sums/beam-2/majority", "sums/beam-4", "sums/beam-4/majority", "sums/greedy"]
    metrics = _metrics(results)
    assert metrics["num_items"] == 4 and metrics["num_overlong"] == 1
    # The oracle finds the right answers of the three that end; the fourth never finishes, which is wrong, and counted as such.
    assert metrics["eval/sums/beam-4/pass@1"] == 0.75 and metrics["search/sums/beam-4/unanswered"] == 1
    assert metrics["eval/sums/beam-4/no_answer_rate"] == metrics["eval/sums/beam-4/truncated_rate"] == 0.25
    assert metrics["search/sums/beam-4/found_right_rate"] >= metrics["eval/sums/beam-4/pass@1"]
    json_one = results[2].as_json(("level",))
    assert json_one["search"]["unanswered_by_reason"] == {"length": 1} and json_one["estimates"]["gsm8k"]["pass@1"]["method"] == "wilson"
    assert [row["group"] for row in json_one["tables"]["level"]] == ["0", "1"]
    path = tmp_path / "r.json"
    write_result(path, result_record(config, {"path": "m"}, results, metrics), results)
    read = read_result(str(path))
    assert [one.ties for one in compare_results(read, read, config=config.intervals)] == [4] * 5
    comparison = _compare(*pairs[1], config)
    assert comparison.name == "sums/beam-4" and comparison.first == 0.75 and comparison.test == "McNemar, exact"
    records = [json.loads(line) for line in (tmp_path / "r.samples.jsonl").read_text().splitlines()]
    assert len(records) == 5 * 4
    by_source = {(record["source"], record["task_id"]): record for record in records}
    lost = by_source["eval/sums/beam-4", results[0].eval_set.items[3].task_id]
    assert lost["search"]["unanswered"] == "length" and lost["status"] == "no_answer" and lost["response"].startswith("round and round\n")
    won = by_source["eval/sums/beam-4", results[0].eval_set.items[0].task_id]
    assert won["response"].endswith("#### 2") and won["search"]["value"] == won["search"]["step_values"][-1]
    assert len(rewarder.asked) == len(set(rewarder.asked)), "an answer is graded once, whichever method found it"


def test_the_baseline_has_nearly_as_many_tokens_as_the_search():
    _, pairs, _ = searched(beams=(2, 3, 5))
    for search, baseline in pairs[:3]:
        wanted, got, n = search.found.cost.generated_tokens, baseline.found.cost.generated_tokens, baseline.found.num_samples
        assert got == sum(outcome.counts["generated_tokens"] for outcome in baseline.found.outcomes)
        assert abs(got - wanted) <= got / n and n >= 1
        assert all(outcome.counts["candidates"] == n for outcome in baseline.found.outcomes)
    counts = [pair[1].found.num_samples for pair in pairs[:3]]
    assert counts == sorted(counts) and counts[0] < counts[-1]


@pytest.mark.parametrize(
    ("totals", "wanted", "expected"), [([10, 20, 30], 20, 2), ([10, 20, 30], 14, 1), ([10, 20, 30], 15, 1), ([10], 99, 1), ([10, 20], 0, 1)]
)
def test_the_nearest_total(totals, wanted, expected):
    assert nearest(totals, wanted) == expected


def test_tokens_are_those_that_the_engines_generated():
    pool = ScriptedPool(script, order=1, max_model_len=200)
    _, pairs, _ = searched(pool, beams=(3,), baseline=False, greedy=False, step_kind="fixed:5")
    cost = pairs[0][0].found.cost
    assert cost.generated_tokens == pool.generated_tokens and cost.tokens_per_second == pytest.approx(pool.generated_tokens / cost.seconds)
    numbers = pairs[0][0].search_numbers
    assert numbers["candidates"]["discarded_tokens"] > 0 and numbers["states_valued"] > 0 and 0 < numbers["value_calls"] <= numbers["states_valued"]


def test_best_of_n_and_majority_share_their_samples():
    _, pairs, _ = searched(method="best_of_n", samples=(8, 3))
    assert [[one.eval_set.name for one in pair] for pair in pairs] == [
        ["sums/best-of-3", "sums/majority-3"], ["sums/best-of-8", "sums/majority-8"], ["sums/greedy"]
    ]  # fmt: skip
    few, many = (pair[0].found.outcomes for pair in pairs[:2])
    assert all(set(a.finished) <= set(b.finished) for a, b in zip(few, many, strict=True))
    assert pairs[1][0].metrics["eval/sums/best-of-8/pass@1"] == 0.75
    assert pairs[0][0].found.outcomes is pairs[0][1].found.outcomes and not pairs[0][1].found.cost.states_valued
    _, plain, _ = searched(method="majority", samples=(8,), values=lambda states: 1 / 0, greedy=False)
    assert [a.candidate.response for a in plain[0][0].answers] == [a.candidate.response for a in pairs[1][1].answers]


def test_a_search_that_was_cut_short_goes_on_and_ends_alike(tmp_path):
    class Dying(ScriptedPool):
        left = 40

        def poll(self):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
            return super().poll()

    def record(pool):
        recording = RecordingPool(tmp_path / "r.partial.jsonl", "id", resume=True)
        recording.pool = pool
        return recording

    def found(pairs):
        return [[answer.candidate for answer in result.answers] for pair in pairs for result in pair]

    _, straight, _ = searched(beams=(3,))
    with pytest.raises(KeyboardInterrupt):
        searched(record(Dying(script, order=5, max_model_len=200)), beams=(3,))
    recording = record(ScriptedPool(script, order=6, max_model_len=200))
    known = len(recording.known)
    _, again, _ = searched(recording, beams=(3,))
    assert known > 10 and found(again) == found(straight)
    assert not {request.request_id for request in recording.pool.requests} & set(list(recording.known)[:known])
    assert again[0][0].found.cost.generated_tokens == straight[0][0].found.cost.generated_tokens
    nothing = record(ScriptedPool(script, max_model_len=200))
    _, all_known, _ = searched(nothing, beams=(3,))
    assert nothing.pool.requests == [] and found(all_known) == found(straight) and math.isnan(all_known[0][0].found.cost.tokens_per_second)


def test_seeds_of_a_run_and_numbers_of_beams_are_independent():
    def seeds(**settings):
        pool = ScriptedPool(script, max_model_len=200)
        searched(pool, **settings)
        return {request.seed for request in pool.requests}

    first = seeds(beams=(2,))
    assert first == seeds(beams=(2,), concurrent=1) and not first & seeds(beams=(2,), seed=1)
    assert len(seeds(beams=(2, 3)) & first) == len(first), "what another number of beams draws does not change these"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--beams", "[0]"], "--beams is .0.: numbers of at least 1"),
        (["--beams", "[]"], "--beams is"),
        (["--beams", "[2, 2]"], "name every number once"),
        (["--beams", "[1, 3]", "--sampling.temperature", "0"], "--beams is .*at temperature 0 all continuations of a text are alike"),
        (["--beams", "[1]", "--expansions", "2", "--sampling.temperature", "0"], "at temperature 0"),
        (["--method", "best_of_n", "--samples", "[0]"], "--samples is"),
        (["--method", "beams"], "--method is 'beams': use one of beam, best_of_n, majority"),
        (["--method", "majority", "--critic", "c"], "--critic is 'c': --method majority"),
        (["--aggregate", "max"], "--aggregate is 'max'"),
        (["--answer", "best"], "--answer is 'best'"),
        (["--first_step", "some"], "--first_step is 'some': use beams or all"),
        (["--step_kind", "newlines"], "--step_kind: unknown step kind 'newlines'"),
        (["--max_steps", "0"], "--max_steps is 0"),
        (["--step_tokens", "-1"], "--step_tokens is -1"),
        (["--concurrent", "-1"], "--concurrent is -1"),
        (["--sampling.max_new_tokens", "1024"], "leaves no room for a prompt"),
        (["--scoring.dtype", "float16"], "--scoring: dtype is 'float16'"),
    ],
)
def test_settings_that_cannot_work_are_refused(words, expected):
    with pytest.raises(ConfigError, match=expected):
        parse_config(SearchConfig, words, prog="test")


def test_one_beam_at_temperature_0_is_allowed_and_its_baseline_is_one_sample():
    greedy = lambda text, sample, seed: script(text, sample, int(text[0]))  # noqa: E731
    _, pairs, _ = searched(ScriptedPool(greedy, max_model_len=200), beams=(1,), sampling=SamplingConfig(temperature=0.0, max_new_tokens=40))
    ((search, baseline),) = pairs
    assert baseline.found.num_samples == 1 and [a.candidate.response for a in search.answers] == [a.candidate.response for a in baseline.answers]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    from openrl_reason.models.tiny import make_model
    from tests.helpers_models import write_tiny_model

    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "policy", hidden_size=64, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=64, max_position=256)
    write_tiny_model(folder / "other")
    return folder


@pytest.mark.parametrize(
    ("settings", "error", "expected"),
    [
        ({}, ConfigError, "--critic is '': --method beam ranks by values"),
        ({"critic": "policy"}, ConfigError, "--critic is .*without a scalar head"),
        ({"critic": "other"}, DataError, "--critic .*vocabularies differ"),
        ({"critic": "policy", "rollout": RolloutConfig(max_model_len=512)}, ConfigError, "--rollout.max_model_len is 512: the model has 256"),
        ({"method": "majority", "sampling": SamplingConfig(max_new_tokens=199)}, DataError, "all 5 prompts are longer than 1 tokens"),
    ],
)
def test_folders_and_prompts_that_cannot_work_are_refused_before_anything_starts(settings, error, expected, folders):
    settings = {"rollout": ROLLOUT, "sampling": SamplingConfig(max_new_tokens=40)} | settings
    critic = str(folders / settings.pop("critic")) if settings.get("critic") else ""
    with pytest.raises(error, match=expected):
        search_model(SearchConfig(policy=str(folders / "policy"), critic=critic, dry_run=True, **settings), Sums(TaskConfig()))


def test_the_plan_says_what_is_searched_and_starts_nothing(folders, tmp_path, capsys):
    config = SearchConfig(
        policy=str(folders / "policy"), method="majority", samples=(8, 2), rollout=ROLLOUT, sampling=SamplingConfig(max_new_tokens=40), dry_run=True,
        output=str(tmp_path / "r.json"),
    )  # fmt: skip
    assert search_model(config, Sums(TaskConfig())) == {} and list(tmp_path.iterdir()) == []
    printed = capsys.readouterr().out
    assert "sums: 4 test items of sums" in printed and "majority: 2, 8 samples" in printed and "1 prompts too long, left out" in printed
    config, chosen = prepared(beams=(3,), first_step="all", step_kind="math")
    lines = plan(config, chosen)
    assert "beam-3: 9 candidates for the first step, then 3 beams x 3; at most 20 steps, cut by 'math'" in lines[1] and "is discarded" in lines[2]
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(ConfigError, match="--output is .*there is a result of that name"):
        search_model(SearchConfig(policy="p", output=str(tmp_path / "r.json")))


def test_answers_by_vote_and_by_value_may_differ():
    """Two unsure responses agree against one of higher value."""
    answers = itertools.cycle(["#### 9" + END, "#### 2" + END, "#### 2" + END])

    def values(states):
        return [0.6 if text_of(state).endswith("9") else 0.4 for state in states]

    by_rule = {}
    for rule in ("value", "vote"):
        pool = ScriptedPool(lambda text, sample, seed: next(answers), max_model_len=200)
        _, pairs, _ = searched(pool, values, method="best_of_n", samples=(3,), answer=rule, greedy=False, num_items=1)
        by_rule[rule] = pairs[0][0].answers[0].result.parsed
    assert by_rule == {"value": "9", "vote": "2"}


@pytest.mark.parametrize(
    ("settings", "refused"),
    [({"step_kind": "math"}, True), ({"step_kind": "newline"}, False), ({"step_kind": "newline", "step_tokens": 5}, True),
     ({"method": "best_of_n", "aggregate": "mean"}, True), ({"method": "best_of_n", "step_kind": "math"}, False), ({"method": "majority"}, False)],
)  # fmt: skip
def test_steps_that_no_tokenizer_maps_onto_tokens_are_refused(settings, refused):
    config = SearchConfig(**settings)
    _check_tokenizer(config, config.step_kind or "newline", TOKENIZER)
    if refused:
        with pytest.raises(ConfigError, match="--step_kind is .*does not say which token wrote what"):
            _check_tokenizer(config, config.step_kind or "newline", Characters())
    else:
        _check_tokenizer(config, config.step_kind or "newline", Characters())
