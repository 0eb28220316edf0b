"""The analysis on a process whose values are known exactly: a table of next tokens behind the pool's interface."""

import contextlib
import importlib
import json
import math
import random
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest

from openrl_reason.core.trajectory import StopReason
from openrl_reason.errors import ConfigError, DataError, WorkerError
from openrl_reason.evaluation.analyze_values import FORMAT, analyze_values, sample_study, write_output
from openrl_reason.evaluation.sets import SetDefaults, prepare_sets
from openrl_reason.evaluation.value_config import AnalyzeValuesConfig, ScoringConfig
from openrl_reason.evaluation.value_estimators import implicit_advantages, scalar_values
from openrl_reason.evaluation.value_partial import read_partial, rollouts_identity, write_partial
from openrl_reason.evaluation.value_states import StateRollouts, draw_states, next_steps
from openrl_reason.evaluation.value_study import summarise
from openrl_reason.models.tiny import make_model, make_tokenizer
from openrl_reason.rewards.base import RewardResult
from openrl_reason.rewards.config import RewardConfig
from openrl_reason.tasks.base import Task, TaskConfig
from openrl_reason.workers.rollout_config import Completion, RolloutConfig, SamplingConfig

TOKENIZER = make_tokenizer()
LETTERS = {"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1}
WORTH = {letter: place for place, letter in enumerate(LETTERS)}
LINES, MOST = 3, 12


def table(response, start):
    """Next tokens and their probabilities after ``response``: three lines of a letter each, then 1 or 0, then the end."""
    lines = response.split("\n")
    if lines[-1] and len(lines) <= LINES:
        return {"\n": 1.0}
    if len(lines) <= LINES:
        return LETTERS
    if lines[-1]:
        return {"": 1.0}
    chance = (start + sum(WORTH[letter] for letter in lines[:LINES])) / MOST
    return {"1": chance, "0": 1 - chance}


def exact_value(response, start):
    """Probability of the answer 1, by going through the table."""
    options = table(response, start)
    if "" in options:
        return float(response.endswith("1"))
    return sum(chance * exact_value(response + token, start) for token, chance in options.items() if chance)


class Starts(Task):
    """start=0 ... start=3, each several times."""

    name = "starts"
    default_prompt_template = "{question}"

    def load_split(self, split):
        return [self.make_item(f"{n}: start={n % 4}=", gold="1") for n in range(16)]


class TablePool:
    """Samples from the table; requests of any number, answered in a shuffled order."""

    def __init__(self):
        self.config, self.waiting, self.served = RolloutConfig(max_model_len=64), [], []

    def stats(self):
        return {"prompt_tokens": 0, "cached_prompt_tokens": 0, "generated_tokens": 0, "restarts": 0, "resubmitted": 0, "seconds_busy/engine-0": 0.0}

    def submit(self, requests):
        self.waiting += requests

    def generate(self, requests=()):
        self.submit(requests)
        while self.waiting:
            yield self.answer(self.waiting.pop(len(self.waiting) // 2))

    def answer(self, request):
        self.served.append(request)
        draw, text = random.Random(request.seed), TOKENIZER.decode(request.prompt_ids)
        head, _, response = text.rpartition("=")
        written, reason = "", StopReason.LENGTH
        ids = []
        while len(ids) < request.sampling.max_new_tokens:
            options = table(response + written, int(head[-1]))
            token = draw.choices(list(options), list(options.values()))[0]
            ids += TOKENIZER(token)["input_ids"] if token else [TOKENIZER.eos_token_id]
            written += token
            if not token:
                reason = StopReason.EOS
                break
        return Completion(request.request_id, ids, [-0.5] * len(ids), reason, None, 0, 0)


class LastLine:
    """1 for a finished response that ends in 1; ``failing``: a share of the responses, by hash, is not graded."""

    def __init__(self, failing=0.0):
        self.failing, self.samples = failing, []

    def submit(self, sample):
        self.samples.append(sample)
        future = Future()
        if random.Random(len(self.samples)).random() < self.failing:
            future.set_result(RewardResult(math.nan, "timeout", detail="too slow"))
        else:
            future.set_result(RewardResult(float(sample.stop_reason == "eos" and sample.response.endswith("1"))))
        return future

    def flush(self):
        pass

    def metrics(self):
        return {}


def config(**changes):
    words = {"model": "table", "num_items": 0, "samples_per_prompt": 4, "num_states": 60, "truth_rollouts": 100, "mc": (1, 4, 16),
             "ranking_states": 20, "ranking_actions": 8, "ranking_truth_rollouts": 100, "sampling": SamplingConfig(max_new_tokens=10),
             "rollout": RolloutConfig(max_model_len=64)}  # fmt: skip
    return AnalyzeValuesConfig(**words | changes)


def study_of(settings, rewarder=None, pool=None):
    defaults = SetDefaults("test", settings.num_items, settings.samples_per_prompt, settings.sampling)
    task = Starts(TaskConfig())
    (chosen,) = prepare_sets((), default_task=task, tokenizer=TOKENIZER, defaults=defaults, max_model_len=64)
    return sample_study(settings, chosen, TOKENIZER, pool or TablePool(), rewarder or LastLine())


def exact_values(prefixes):
    texts = [TOKENIZER.decode(list(prefix)) for prefix in prefixes]
    return np.array([exact_value(text.rpartition("=")[2], int(text.rpartition("=")[0][-1])) for text in texts])


def summary_of(study, settings):
    found = summarise(study, delta=settings.delta, num_position_bins=settings.position_bins, num_calibration_bins=10, intervals=settings.intervals)
    return {"format": FORMAT, "model": {}, "config": json.loads(json.dumps(vars(settings), default=vars))} | found


@pytest.fixture(scope="module")
def settings():
    return config()


@pytest.fixture(scope="module")
def study(settings):
    found = study_of(settings)
    found.add_values("exact", exact_values)
    found.add_values("nothing", lambda prefixes: np.full(len(prefixes), 0.5))
    return found


def test_states_are_the_boundaries_of_steps_each_once_and_spread_over_positions(study):
    assert len({state.prefix.key for state in study.states}) == len(study.states) == 60
    assert {state.position for state in study.states} == {0.0, 0.25, 0.5, 0.75}
    counts = [sum(state.step == step for state in study.states) for step in range(4)]
    assert counts[0] == 15 and min(counts) >= 13, "the prompts are 16; the bins share what is drawn"
    for state in study.states:
        response = TOKENIZER.decode(state.response_ids)
        assert response.count("\n") == state.step and len(response) == 2 * state.step
        assert state.prefix.budget == 10 - len(state.response_ids)


def test_truths_and_estimates_are_unbiased_and_err_by_the_square_root_law(study):
    exact = study.predictions["exact"]
    variance = exact * (1 - exact)
    total = {"truth": (study.truth.values, 100), "MC K=1": (study.predictions["MC K=1"], 1), "MC K=4": (study.predictions["MC K=4"], 4),
             "MC K=16": (study.predictions["MC K=16"], 16)}  # fmt: skip
    for name, (values, k) in total.items():
        error = values - exact
        assert abs(error.sum()) < 4 * math.sqrt(variance.sum() / k), f"{name} is biased"
        expected = variance.sum() / k
        assert 0.5 * expected < (error**2).sum() < 1.6 * expected, f"the variance of {name} is not p (1 - p) / K"
    maes = [np.abs(total[name][0] - exact).mean() for name in ("MC K=1", "MC K=4", "MC K=16")]
    assert 1.4 < maes[1] / maes[2] < 2.8 and maes[0] > 1.3 * maes[1], "four times the rollouts, half the error"


def test_estimates_share_no_rollout_with_the_truth():
    pool, settings = TablePool(), config(num_items=2, samples_per_prompt=1, num_states=6, truth_rollouts=5, ranking_states=0)
    study = study_of(settings, pool=pool)
    assert len({request.seed for request in pool.served}) == len(pool.served) == 2 + 6 * (5 + 16)
    assert study.counts["rollouts"] == 6 * (5 + 16)


def test_the_error_of_exact_values_is_the_noise_of_the_truth(study, settings):
    summary = summary_of(study, settings)
    exact, truth = summary["estimators"]["exact"]["overall"], summary["truth"]
    assert exact["rmse"]["value"] == pytest.approx(truth["noise_rmse"], rel=0.35)
    assert exact["mae"]["value"] == pytest.approx(truth["noise_mae"], rel=0.35)
    assert exact["correlation"]["value"] > 0.9 and math.isnan(summary["estimators"]["nothing"]["overall"]["correlation"]["value"])
    assert [row["num_states"] for row in summary["truth_by_step"]] == [row["num_states"] for row in summary["truth_by_position"]]
    order = [summary["estimators"][name]["overall"]["mae"]["value"] for name in ("exact", "MC K=16", "MC K=4", "MC K=1")]
    assert order == sorted(order)


def test_exact_values_rank_next_steps_and_a_constant_is_a_coin(study, settings):
    ranking = summary_of(study, settings)["ranking"]
    assert ranking["exact"]["num_pairs"] > 50 and ranking["exact"]["accuracy_significant"]["value"] == 1.0
    assert ranking["exact"]["accuracy"]["value"] > ranking["MC K=16"]["accuracy"]["value"] > 0.6
    assert ranking["nothing"]["accuracy"]["value"] == 0.5 and ranking["nothing"]["tied_share"] == 1.0
    assert 0.1 < ranking["exact"]["significant_share"] < 1
    exact_truth = summary_of(study_with_exact_ranking(study), settings)["ranking"]["exact"]
    assert exact_truth["accuracy"]["value"] == 1.0 and exact_truth["num_pairs"] >= ranking["exact"]["num_pairs"]


def study_with_exact_ranking(study):
    """The same, the truth after each next step replaced by the exact value."""
    values = study.ranking_predictions["exact"]
    return replace(study, ranking_truth=replace(study.ranking_truth, values=values))


def test_next_steps_are_distinct_cut_at_the_boundary_and_none_ends_the_response(study):
    assert study.counts["ranking_states"] + study.counts["ranking_states_skipped"] == 20
    for steps in study.ranking:
        assert len(set(steps.texts)) == len(steps.after) >= 3
        for text, after in zip(steps.texts, steps.after, strict=True):
            assert text in {f"{letter}\n" for letter in LETTERS} and after.step == steps.state.step + 1
            assert TOKENIZER.decode(after.response_ids) == TOKENIZER.decode(steps.state.response_ids) + text
            assert after.prefix.budget == steps.state.prefix.budget - 2
    state = study.states[0]
    ids = [TOKENIZER(text)["input_ids"] for text in ("a\nb", "a\nc\n", "b\n", "", "d")]
    found = next_steps(state, [*ids, [TOKENIZER.eos_token_id]], TOKENIZER, "newline")
    assert found.texts == ["a\n"] and found.num_last == 4


def test_everything_depends_on_identities_alone():
    small = config(num_items=4, samples_per_prompt=2, num_states=10, truth_rollouts=6, mc=(2,), ranking_states=3, ranking_truth_rollouts=4)
    first, again = study_of(small), study_of(small)
    assert [state.prefix.key for state in first.states] == [state.prefix.key for state in again.states]
    assert (first.truth.values == again.truth.values).all() and (first.ranking_truth.values == again.ranking_truth.values).all()
    fewer, more = draw_states(first.states, 6, 4, (0, "x")), draw_states(first.states[::-1], 7, 4, (0, "x"))
    assert {state.prefix.key for state in fewer} < {state.prefix.key for state in more}
    other = study_of(config(seed=1, num_items=4, samples_per_prompt=2, num_states=10, truth_rollouts=6, mc=(2,), ranking_states=0))
    assert [state.prefix.key for state in other.states] != [state.prefix.key for state in first.states]


def test_equal_prefixes_share_rollouts_and_a_spent_budget_is_an_unfinished_response(study):
    pool, rewarder = TablePool(), LastLine()
    rollouts = StateRollouts(pool, rewarder, TOKENIZER, SamplingConfig(max_new_tokens=10), step_kind="newline", seed=(0, "test"))
    state = study.states[0]
    spent = replace(state, prefix=replace(state.prefix, budget=0))
    one, two, none = rollouts.rewards([state, state, spent], 5, "x")
    assert len(pool.served) == 5 and (one == two).all() and none.tolist() == [0.0] * 5
    assert rollouts.counts["truncated"] == 5 and rewarder.samples[0].stop_reason == "length"


def test_failed_gradings_are_counted_and_left_out():
    settings = config(truth_rollouts=40, mc=(1,), ranking_states=0)
    study = study_of(settings, LastLine(failing=0.3))
    assert study.counts["without_reward"] == study.counts["rollouts_failed"] > 500
    assert study.truth.counts.sum() == 60 * 40 + 60 - study.counts["without_reward"] - np.isfinite(study.predictions["MC K=1"]).sum()
    exact = exact_values([state.prefix.token_ids for state in study.states])
    bound = 4 * math.sqrt((exact * (1 - exact) / study.truth.counts).sum())
    assert abs((study.truth.values - exact).sum()) < bound, "a failure is no zero"
    summary = summary_of(study, settings)
    assert summary["estimators"]["MC K=1"]["overall"]["num_states"] == np.isfinite(study.predictions["MC K=1"]).sum() < 60


def test_too_many_failures_stop_the_command():
    with pytest.raises(WorkerError, match="failed .*--reward.max_failed_rate"):
        study_of(config(ranking_states=0), LastLine(failing=0.9))


def test_a_single_step_is_refused():
    with pytest.raises(DataError, match="none of the 64 responses has two steps .*--step_kind"):
        settings = config()
        defaults = SetDefaults("test", 0, 4, settings.sampling)
        task = Starts(TaskConfig())
        task.step_kind = "whole"
        (chosen,) = prepare_sets((), default_task=task, tokenizer=TOKENIZER, defaults=defaults, max_model_len=64)
        sample_study(settings, chosen, TOKENIZER, TablePool(), LastLine())


def test_the_folder_holds_tables_plots_and_a_page_that_asks_for_nothing(study, settings, tmp_path):
    write_output(study, summary_of(study, settings), config(output=str(tmp_path / "out")))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"states.csv", "ranking.csv", "summary.json", "scatter.png", "error_by_position.png", "calibration.png", "values.html"}
    rows = (tmp_path / "out/states.csv").read_text().splitlines()
    assert len(rows) == 1 + 60 * 5 and rows[0].startswith("state_id,task_id,trajectory_id,step,num_steps,position,prefix_tokens,budget,truth,")
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["format"] == FORMAT and summary["estimators"]["nothing"]["overall"]["correlation"]["value"] is None
    page = (tmp_path / "out/values.html").read_text()
    assert "default-src 'none'" in page and "src=" not in page.split("<script>")[0]


class FakeGroup:
    """Scores that say which token they belong to; log-probs ``-weight * token``."""

    def __init__(self, weight=1.0):
        self.weight = weight

    def scores(self, batch):
        return (batch.position_ids * 100 + batch.token_ids).float()

    def logprobs(self, batch):
        return {"logprobs": -self.weight * batch.token_ids.float()}


def test_a_critic_is_read_at_the_last_token_and_a_step_is_the_sum_over_its_own_tokens():
    prefixes = [(5, 6, 7), (9,), (1, 2)]
    assert scalar_values(FakeGroup())(prefixes).tolist() == [207, 9, 102]
    assert scalar_values(FakeGroup(), scale=2.0, shift=0.5)(prefixes).tolist() == [414.5, 18.5, 204.5]
    found = implicit_advantages(FakeGroup(1.0), FakeGroup(3.0), beta=0.5)(prefixes, [2, 1, 1])
    assert found.tolist() == [0.5 * 2 * (6 + 7), 0.5 * 2 * 9, 0.5 * 2 * 2]
    assert len(scalar_values(FakeGroup())([])) == len(implicit_advantages(FakeGroup(), FakeGroup(), beta=1)([], [])) == 0


def test_an_estimator_must_give_one_number_for_each_state(study):
    with pytest.raises(ValueError, match="'short' returned an array of shape .* for 60 states"):
        replace(study, predictions={}, ranking_predictions={}).add_values("short", lambda prefixes: np.zeros(3))


BAD = [
    ({"mc": (0,)}, "--mc is .*K must be at least 1"),
    ({"mc": (3, 3)}, "--mc is .*once"),
    ({"delta": 0.0}, "--delta"),
    ({"delta": 1.5}, "--delta"),
    ({"num_states": 0}, "--num_states is 0"),
    ({"truth_rollouts": 1}, "--truth_rollouts"),
    ({"ranking_actions": 2}, "--ranking_actions is 2: at least 3"),
    ({"reference": "x", "ranking_states": 0}, "--reference .*ranking"),
    ({"oreo_affine": (0.0, 1.0)}, "--oreo_affine"),
    ({"oreo_affine": (2.0, 0.0)}, "--oreo_affine .*--oreo_critic"),
    ({"sampling": SamplingConfig(temperature=0.0)}, "--sampling.temperature"),
    ({"sampling": SamplingConfig(max_new_tokens=64)}, "--sampling.max_new_tokens"),
    ({"step_kind": "newlin"}, "--step_kind: .*did you mean"),
    ({"split": "dev"}, "--split"),
    ({"beta": 0.0}, "--beta"),
    ({"beta": math.inf}, "--beta"),
    ({"scoring": ScoringConfig(dtype="float16")}, "--scoring: dtype is 'float16'"),
    ({"scoring": ScoringConfig(num_ranks=0)}, "--scoring: num_ranks is 0"),
]


@pytest.mark.parametrize("changes, message", BAD, ids=[str(changes) for changes, _ in BAD])
def test_settings_that_cannot_work_are_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_models_and_outputs_that_do_not_fit_are_refused_before_anything_starts(tmp_path):
    model, other = tmp_path / "model", tmp_path / "other"
    tiny = {"hidden_size": 32, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "intermediate_size": 32}
    make_model(model, **tiny)
    make_model(other, **tiny, max_position=32)
    with pytest.raises(ConfigError, match="--model is ''.*make-model"):
        analyze_values(config(model=""))
    with pytest.raises(ConfigError, match="nothing to analyze"):
        analyze_values(config(model=str(model), mc=()))
    with pytest.raises(DataError, match="--critic .*32 positions"):
        analyze_values(config(model=str(model), critic=str(other)))
    with pytest.raises(DataError, match="no model at .*nowhere"):
        analyze_values(config(model=str(model), oreo_critic=str(tmp_path / "nowhere")))
    with pytest.raises(ConfigError, match="--output .*exists"):
        analyze_values(config(model=str(model), output=str(tmp_path)))
    with pytest.raises(ConfigError, match="--output .*no earlier analysis"):
        analyze_values(config(model=str(model), output=str(tmp_path), overwrite=True))


# ---- rollouts are kept until the output is complete ----------------------------------------------------------------------------------


@pytest.fixture
def analysis(tmp_path, monkeypatch):
    """A function that runs the whole command on the table, with a critic that may fail; ``pools`` are the engines that were started."""
    module = importlib.import_module("openrl_reason.evaluation.analyze_values")
    pools, critic = [], {"fails": True}

    @contextlib.contextmanager
    def engines(*args, **settings):
        pools.append(TablePool())
        yield pools[-1], LastLine()

    def add_models(study, config, placement):
        if critic["fails"]:
            raise WorkerError("rank 0 of the critic is gone")
        study.add_values("critic", exact_values)

    monkeypatch.setattr(module, "rewarded_engines", engines)
    monkeypatch.setattr(module, "add_models", add_models)
    monkeypatch.setattr(module, "Placement", lambda config, roles: contextlib.nullcontext())
    make_model(tmp_path / "model", hidden_size=32, num_layers=1, num_heads=1, num_kv_heads=1, intermediate_size=32)

    def run(fails=False, output="out", reward_function=None, task=None, **changes):
        critic["fails"] = fails
        small = {"num_items": 4, "num_states": 12, "truth_rollouts": 6, "mc": (1, 2), "ranking_states": 6, "ranking_truth_rollouts": 4}
        settings = config(**{"model": str(tmp_path / "model"), "output": output and str(tmp_path / output)} | small | changes)
        return analyze_values(settings, task=task or Starts(TaskConfig()), reward_function=reward_function)

    run.pools = pools
    return run


def test_the_callers_task_keeps_its_way_of_cutting_steps(analysis):
    task = Starts(TaskConfig())
    plain, cut = (analysis(output="", task=task, step_kind=kind)["counts"]["distinct_states"] for kind in ("", "fixed:1"))
    assert task.step_kind == "newline" and cut > plain, "and the command cut them as it was told"


def test_a_model_that_fails_costs_no_rollouts(analysis, tmp_path, capsys):
    straight = analysis(output="straight")
    assert not (tmp_path / "straight.partial.json").exists() and len(analysis.pools) == 1
    with pytest.raises(WorkerError, match="critic is gone"):
        analysis(fails=True)
    assert (tmp_path / "out.partial.json").exists() and not (tmp_path / "out").exists() and len(analysis.pools) == 2
    capsys.readouterr()
    resumed = analysis(delta=0.2)  # what the rollouts do not depend on may change
    assert len(analysis.pools) == 2 and "out.partial.json: they are used, and nothing is sampled again" in capsys.readouterr().out
    assert not (tmp_path / "out.partial.json").exists()
    for name in ("states.csv", "ranking.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name
    assert resumed["counts"].keys() == straight["counts"].keys() and resumed["truth"] == straight["truth"]
    assert {**resumed["counts"], "seconds": 0} == {**straight["counts"], "seconds": 0}


def test_rollouts_of_other_settings_are_refused_and_resume_false_starts_anew(analysis, tmp_path):
    with pytest.raises(WorkerError):
        analysis(fails=True)
    changes = [{"seed": 1}, {"truth_rollouts": 7}, {"mc": (2,)}, {"num_items": 5}, {"sampling": SamplingConfig(max_new_tokens=9)}]
    changes += [{"rollout": RolloutConfig(max_model_len=64, dtype="float32")}, {"reward": RewardConfig(timeout=0.5)}, {"step_kind": "sentence"}]
    for change in changes:
        (name,) = change
        named = {"num_items": "items", "rollout": "rollout.dtype"}.get(name, name)
        with pytest.raises(ConfigError, match=rf"out\.partial\.json holds .* other settings \({named}\): .*--resume false"):
            analysis(**change)
    with pytest.raises(ConfigError, match=r"other settings \(reward\)"):
        analysis(reward_function=lambda response, gold: 1.0)
    make_model(tmp_path / "model", hidden_size=32, num_layers=1, num_heads=1, num_kv_heads=1, intermediate_size=32, seed=5, overwrite=True)
    with pytest.raises(ConfigError, match=r"other settings \(model\)"):
        analysis()
    assert len(analysis.pools) == 1
    assert analysis(resume=False, seed=1)["counts"]["states"] == 12 and len(analysis.pools) == 2
    assert not (tmp_path / "out.partial.json").exists()


def test_an_edited_reward_file_gives_other_rollouts(tmp_path):
    file = tmp_path / "mine.py"
    settings = config(output=str(tmp_path / "out"), reward=RewardConfig(function=f"{file}:score"))
    (chosen,) = prepare_sets(
        (), default_task=Starts(TaskConfig()), tokenizer=TOKENIZER, defaults=SetDefaults(sampling=settings.sampling), max_model_len=64
    )
    found = []
    for text in ("def score(): 1", "def score(): 1", "def score(): 2"):
        file.write_text(text)
        found.append(rollouts_identity(settings, "table", chosen, TOKENIZER))
    assert found[0] == found[1] and [name for name in found[0] if found[0][name] != found[2][name]] == ["reward"]


def test_missing_numbers_come_back_and_a_broken_file_is_named(study, tmp_path):
    values = study.truth.values.copy()
    values[0] = math.nan
    before = replace(study, truth=replace(study.truth, values=values), counts=study.counts | {"mean_reward": math.nan})
    path = tmp_path / "out.partial.json"
    write_partial(path, {"seed": "0"}, before)
    after = read_partial(path, {"seed": "0"}, [state.item for state in study.states] + [steps.state.item for steps in study.ranking])
    assert after.states == before.states and after.ranking == before.ranking
    for name in ("truth", "ranking_truth", "predictions", "ranking_predictions"):
        one, two = (vars(found) if name.endswith("truth") else found for found in (getattr(before, name), getattr(after, name)))
        assert one.keys() == two.keys()
        assert all(np.array_equal(one[key], two[key], equal_nan=True) and one[key].dtype == two[key].dtype for key in one), name
    assert math.isnan(after.counts.pop("mean_reward")) and after.counts == {k: v for k, v in before.counts.items() if k != "mean_reward"}
    path.write_text(path.read_text()[:1000])
    with pytest.raises(ConfigError, match="cannot be read.*--resume false"):
        read_partial(path, {"seed": "0"}, [])
    assert not [file for file in tmp_path.iterdir() if file != path]


def test_rollouts_that_cannot_be_kept_do_not_stop_the_analysis(study, tmp_path, capsys):
    write_partial(tmp_path / "nowhere" / "out.partial.json", {}, study)
    assert "note: the rollouts are not kept" in capsys.readouterr().out
