"""RestEM's choices: what is kept, which candidate, when it ends; a restart is bit-exact; samples on disk are found again."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from openrl_reason.algorithms.restem import RestEMConfig, RestEMTrainer
from openrl_reason.algorithms.restem_selection import START, Progress, keep_right
from openrl_reason.algorithms.samples import SampleBlocks
from openrl_reason.core.trajectory import StopReason, Trajectory
from openrl_reason.errors import CheckpointError, ConfigError, DataError
from openrl_reason.evaluation.config import EvalConfig
from openrl_reason.rewards.base import RewardResult
from openrl_reason.tasks.base import TaskItem
from openrl_reason.workers.model_config import TrainedModelConfig
from openrl_reason.workers.model_worker import ModelWorker
from openrl_reason.workers.rollout_config import SamplingConfig
from tests.helpers_models import full_weights, random_batch, supervised_loss, write_tiny_model


def sample(task, response_ids, reward, *, stop=StopReason.EOS, index=0, **info):
    return Trajectory.from_completion(
        [5, 6], response_ids, None, task_id=task, group_id=task, sample_index=index, reward=reward, stop_reason=stop, info=info
    )


def many(seed=0):
    rng = np.random.default_rng(seed)
    return [
        sample(
            f"q{number}", rng.integers(2, 4, 3).tolist(), float(rng.random() < number / 20), index=index,
            grade_status="timeout" if index == 7 else "ok", stop=StopReason.LENGTH if rng.random() < 0.1 else StopReason.EOS,
        )
        for number in range(20) for index in range(20)
    ]  # fmt: skip


# ---- keep, cap, dedup ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"dedup": True}, {"choice": "random"}, {"keep_truncated": True}], ids=str)
def test_every_sample_is_kept_or_counted_and_no_question_exceeds_the_cap(settings):
    samples = many()
    kept, counts = keep_right(samples, threshold=1.0, max_per_prompt=4, **settings)
    counts = {name.removeprefix("restem/"): count for name, count in counts.items()}
    reasons = ("wrong", "ungraded", "truncated", "repeated", "over_limit")
    assert counts["samples"] == len(samples) == counts["kept"] + sum(counts[name] for name in reasons)
    assert counts["kept"] == len(kept) and counts["questions"] == 20 and counts["ungraded"] == 20 and counts["none_right"] >= 1
    assert max(sum(s.task_id == f"q{number}" for s in kept) for number in range(20)) == 4
    assert all(s.reward >= 1 for s in kept)
    assert bool(counts["repeated"]) == bool(settings.get("dedup")) and bool(counts["truncated"]) != bool(settings.get("keep_truncated"))
    assert [s.trajectory_id for s in kept] == [s.trajectory_id for s in keep_right(samples, threshold=1.0, max_per_prompt=4, **settings)[0]]
    assert [s.trajectory_id for s in samples if s in kept] == [s.trajectory_id for s in kept], "the order of the samples is kept"


def test_the_first_right_ones_are_kept_or_a_seeded_choice():
    samples = [sample("q", [2, n], 1.0, index=n) for n in range(8)]

    def numbers(**settings):
        return [int(s.response_ids[1]) for s in keep_right(samples, threshold=1.0, max_per_prompt=3, **settings)[0]]

    assert numbers() == [0, 1, 2]
    choices = {tuple(numbers(choice="random", seed=seed)) for seed in range(20)}
    assert len(choices) > 5 and numbers(choice="random", seed=3) == numbers(choice="random", seed=3)


def test_dedup_keeps_one_of_equal_responses_to_a_question_and_leaves_other_questions_alone():
    samples = [sample("q", [2], 1.0), sample("q", [2], 1.0, index=1), sample("p", [2], 1.0), sample("q", [3], 1.0)]
    kept, counts = keep_right(samples, threshold=1.0, max_per_prompt=10, dedup=True)
    assert [(s.task_id, s.response_ids.tolist()) for s in kept] == [("q", [2]), ("p", [2]), ("q", [3])] and counts["restem/repeated"] == 1


# ---- candidates ----------------------------------------------------------------------------------------------------------------------------


def play(scores, *, selection, start=None, iterations=10):
    """Iterations of candidates with scripted scores: those that were looked at, and where it ended."""
    progress, looked_at = Progress(best_score=start), []
    for iteration, candidates in enumerate(scores):
        progress.step, total = 0, len(candidates)
        while progress.iteration_is_open(total):
            score = candidates[progress.step]
            progress.step += 1
            looked_at.append((iteration, progress.step))
            progress.offer(f"{iteration}-{progress.step}", score, 0, selection)
        progress.end_iteration(iterations)
        if progress.outcome:
            break
    return progress, looked_at


def test_paper_takes_the_last_candidate_before_the_first_that_does_not_improve_and_best_the_best():
    scores = [[0.1, 0.3, 0.2, 0.5]]
    paper, looked_at = play(scores, selection="paper", iterations=1)
    assert (paper.best, paper.best_score) == ("0-2", 0.3) and looked_at == [(0, 1), (0, 2), (0, 3)]
    best, looked_at = play(scores, selection="best", iterations=1)
    assert (best.best, best.best_score) == ("0-4", 0.5) and len(looked_at) == 4
    for selection in ("paper", "best"):
        assert play([[0.1, 0.2, 0.3]], selection=selection, iterations=1)[0].best == "0-3"
        assert play([[0.3, 0.3]], selection=selection, iterations=1)[0].best == "0-1", "a tie is no improvement"
        assert play([[0.3, 0.1]], selection=selection, iterations=1)[0].best == "0-1", "the first candidate has no predecessor"


@pytest.mark.parametrize("selection", ["paper", "best"])
def test_the_first_iteration_that_does_not_improve_is_the_last_and_the_best_model_so_far_stays(selection):
    progress, _ = play([[0.2], [0.4], [0.4], [0.9]], selection=selection, start=0.1)
    assert progress.best == "1-1" and progress.iteration == 3 and progress.outcome == "iteration 2 did not improve: 0.4 after 0.4"
    worse, _ = play([[0.2], [0.9]], selection=selection, start=0.3)
    assert worse.best == START and worse.iteration == 1
    unknown, _ = play([[0.0], [0.0]], selection=selection, start=None)
    assert unknown.best == "0-1", "a start that was not evaluated is not defended"
    limited, _ = play([[0.1], [0.2], [0.3]], selection=selection, iterations=2)
    assert limited.best == "1-1" and limited.outcome == "all 2 iterations are done"


def test_progress_survives_json_between_any_two_candidates():
    progress = Progress(best_score=0.1)
    for number, score in enumerate([0.2, 0.5, 0.3]):
        progress.offer(str(number), score, number, "best")
        progress = Progress(**json.loads(json.dumps(vars(progress))))
    progress.end_iteration(5)
    assert (progress.best, progress.best_score, progress.best_version) == ("1", 0.5, 1) and not progress.outcome


# ---- restarting ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_restart_from_the_saved_start_trains_as_a_new_model_would_and_its_schedule_begins_anew(stage, tmp_path):
    path = write_tiny_model(tmp_path / "model")

    def worker():
        config = TrainedModelConfig(path=path, dtype="float32", lr=1e-2, schedule="linear", warmup_ratio=0.5, zero_stage=stage)
        return ModelWorker(config, total_steps=1)

    def train(one, steps):
        one.set_schedule(steps, 0)
        batches = [random_batch([9, 14], seed=number) for number in range(steps)]
        return [one.update([b], supervised_loss, {"actions": float(b.num_actions)}) for b in batches]

    used, fresh = worker(), worker()
    used.save_state(tmp_path / "start")
    train(used, 3)
    used.load_state(tmp_path / "start")
    again, anew = train(used, 4), train(fresh, 4)
    assert [m["lr"] for m in again] == pytest.approx([5e-3, 1e-2, 5e-3, 0.0])
    assert all(one[name] == other[name] for one, other in zip(again, anew, strict=True) for name in ("loss", "grad_norm", "lr"))
    ours, theirs = full_weights(used), full_weights(fresh)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ---- samples on disk -----------------------------------------------------------------------------------------------------------------------


class ScriptedCollector:
    """Stands for engines and graders: the response says which block, place and sample it is; every third is right, one cannot be graded."""

    def __init__(self, fail_at=None):
        self.calls, self.fail_at = [], fail_at

    def collect(self, items, *, num_samples, sampling, seed):
        if seed[-1] == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append(seed)
        trajectories, results = [], []
        for place, item in enumerate(items):
            for number in range(num_samples):
                reward = float("nan") if (place, number) == (1, 1) else float(number % 3 == 0)
                status = "ok" if np.isfinite(reward) else "timeout"
                info = {"grade_status": status, "parsed": "1", "prompt": "p", "response": "r", "gold": "g"}
                trajectories.append(sample(item.task_id, [2, place, number], np.nan_to_num(reward), index=number, **info))
                results.append(RewardResult(reward, status, "1", "late" if status == "timeout" else "", None, {"task": reward}))
        rewards = np.array([result.score for result in results])
        return SimpleNamespace(trajectories=trajectories, results=results, rewards=rewards, statuses=[r.status for r in results])


def blocks(folder, num_items=7, **changes):
    items = [TaskItem(f"q{number}", "p", "g") for number in range(num_items)]
    return SampleBlocks(folder, items, 4, SamplingConfig(stop=("x",)), (0, "restem", 1), **({"items_per_block": 3, "identity": "a"} | changes))


def test_a_killed_collection_goes_on_from_its_complete_blocks_and_reads_back_as_the_straight_one(tmp_path, capsys):
    straight, killed = blocks(tmp_path / "straight"), blocks(tmp_path / "killed")
    straight.begin(keep=False)
    straight.sample(ScriptedCollector(), 1.0)
    assert not straight.missing
    killed.begin(keep=False)
    with pytest.raises(KeyboardInterrupt):
        killed.sample(ScriptedCollector(fail_at=2), 1.0)
    assert killed.missing == [2]
    second = ScriptedCollector()
    killed.begin(keep=True)
    killed.sample(second, 1.0)
    assert second.calls == [(0, "restem", 1, 2)]
    one, two = straight.read(), killed.read()
    assert [t.trajectory_id for t in one.trajectories] == [t.trajectory_id for t in two.trajectories] and len(one.items) == 28
    assert one.metrics == two.metrics and one.metrics["reward/timeout_rate"] == pytest.approx(2 / 28)
    assert np.isnan(one.rewards).sum() == 2 and one.results[5].detail == "late" and np.isnan(one.results[5].terms["task"])
    kept, counts = keep_right(one.trajectories, threshold=1.0, max_per_prompt=9)
    assert counts["restem/ungraded"] == 2 and len(kept) == 14


def test_samples_of_other_settings_are_refused_and_a_new_run_clears_them(tmp_path):
    first = blocks(tmp_path)
    first.begin(keep=False)
    first.sample(ScriptedCollector(), 1.0, lambda line: None)
    for changes, name in (({"identity": "b"}, "identity"), ({"items_per_block": 2}, "block"), ({"num_items": 8}, "num_items")):
        with pytest.raises(CheckpointError, match=f"other settings .*{name}.*--run.output_dir"):
            blocks(tmp_path, **changes).begin(keep=True)
    first.begin(keep=False)
    assert first.missing == [0, 1, 2]


def test_a_collection_whose_grading_fails_altogether_stops_before_it_is_written(tmp_path):
    from openrl_reason.errors import WorkerError

    one = blocks(tmp_path)
    one.begin(keep=False)
    with pytest.raises(WorkerError, match="rewards failed"):
        one.sample(ScriptedCollector(), 0.01, lambda line: None)
    assert one.missing == [0, 1, 2]


# ---- settings ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": 0}, "--iterations is 0"),
        ({"choice": "last"}, "--choice is 'last'"),
        ({"selection": "lucky"}, "--selection is 'lucky'"),
        ({"restart": "scratch"}, "--restart is 'scratch'"),
        ({"validation_items": 0, "eval": EvalConfig(num_items=0)}, "candidates need questions"),
        ({"sampling": SamplingConfig(temperature=0.0)}, "--sampling.temperature is 0"),
        ({"sampling": SamplingConfig(max_new_tokens=2048)}, "leaves no room"),
        ({"temperature": 0.0}, "--temperature is 0.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        RestEMConfig(**settings)


def prepared(tmp_path, run=None, **settings):
    from openrl_reason.algorithms.trainer import RunConfig
    from openrl_reason.models.make import MakeModelConfig, make
    from openrl_reason.tasks.base import TaskConfig

    if not (tmp_path / "model").exists():
        make(MakeModelConfig(output=str(tmp_path / "model")))
    config = RestEMConfig(
        run=RunConfig(output_dir=str(tmp_path / "run"), steps=1000, **(run or {})), policy=TrainedModelConfig(path=str(tmp_path / "model")),
        task=TaskConfig(num_train=40, num_test=8), eval=EvalConfig(num_items=8),
        sampling=SamplingConfig(temperature=0.6, max_new_tokens=16), **settings,
    )  # fmt: skip
    trainer = RestEMTrainer(config)
    trainer.prepare()
    return trainer


def test_validation_questions_are_held_out_of_training_and_the_number_of_steps_is_bounded(tmp_path):
    trainer = prepared(tmp_path, validation_items=10, epochs=2, batch_size=16, iterations=3, samples_per_prompt=4)
    held_out = {item.task_id for item in trainer.validation.items}
    assert len(held_out) == 10 and not held_out & {item.task_id for item in trainer.items} and len(trainer.items) <= 30
    assert [one.name for one in trainer.test_sets] == ["arithmetic"]
    assert trainer.run.steps == 3 * -(-len(trainer.items) * 4 * 2 // 16)
    chosen_by_test = prepared(tmp_path, validation_items=0)
    assert chosen_by_test.validation.name == "arithmetic" and not chosen_by_test.test_sets and len(chosen_by_test.items) == 40
    with pytest.raises(ConfigError, match="--validation_items is 40: there are 40 training questions"):
        prepared(tmp_path, validation_items=40)
    prepared(tmp_path, validation_items=10, run={"best_metric": "eval/validation/pass@1"})
    with pytest.raises(ConfigError, match="--run.best_metric is 'eval/arithmetic/pass@1': .*use eval/validation/pass@1"):
        prepared(tmp_path, validation_items=10, run={"best_metric": "eval/arithmetic/pass@1"})


def test_if_nothing_is_right_in_the_first_iteration_the_error_says_what_was_seen(tmp_path):
    trainer = prepared(tmp_path, validation_items=4, threshold=2.0, prompts_per_block=100)
    trainer.log = SimpleNamespace(say=lambda line: None, rollouts=lambda records: None)
    trainer.collector = ScriptedCollector()
    trainer._load = trainer._sync = lambda what: None
    trainer._blocks = lambda: blocks(tmp_path / "samples")
    trainer.run = trainer.run.__class__(**vars(trainer.run) | {"log_rollouts": 0})
    with pytest.raises(DataError, match=r"none of 28 responses is kept at --threshold 2.*wrong 26, ungraded 2.*highest reward is 1"):
        trainer.expectation()


def test_a_run_killed_while_it_sampled_is_not_started_over_unasked(tmp_path):
    trainer = prepared(tmp_path, validation_items=4)
    begun = trainer._blocks()
    begun.begin(keep=False)
    begun.files[0].write_text("a block\n")
    with pytest.raises(ConfigError, match="holds a run already: add --run.resume to continue it"):
        trainer.start()
    assert begun.files[0].exists()


def test_an_iteration_in_training_whose_samples_are_gone_is_not_sampled_again(tmp_path):
    trainer = prepared(tmp_path, validation_items=4)
    trainer._blocks = lambda: blocks(tmp_path / "samples")
    trainer.progress.step = 3
    with pytest.raises(CheckpointError, match="samples that iteration 0 was training on are gone"):
        trainer.expectation()


def test_a_run_that_its_limits_ended_goes_on_when_they_are_raised_and_one_that_stopped_improving_does_not():
    progress = Progress()
    progress.offer("a", 0.5, 3, "best")
    progress.end_iteration(1)
    for iterations, steps_left in ((1, 10), (2, 0)):
        progress.reopen(iterations=iterations, steps_left=steps_left)
        assert progress.outcome == "all 1 iterations are done"
    progress.reopen(iterations=2, steps_left=10)
    assert not progress.outcome
    progress.offer("b", 0.5, 6, "best")
    progress.end_iteration(5)
    progress.reopen(iterations=9, steps_left=10)
    assert "did not improve" in progress.outcome
