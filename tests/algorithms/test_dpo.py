"""DPO on pairs: the gradient is the batch's, however it is cut; lambda 0 is DPO; nothing is lost between pairs and steps."""

import itertools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from openrl_reason.algorithms.collect import readable
from openrl_reason.algorithms.dpo import DPOConfig, DPOLossConfig, DPOTrainer, PairLoss, check_room, pair_batch, response_logprobs
from openrl_reason.algorithms.samples import SampleBlocks
from openrl_reason.algorithms.trainer import RunConfig
from openrl_reason.core.losses import dpo_loss
from openrl_reason.core.trajectory import Trajectory
from openrl_reason.data.offline_config import OfflineDataConfig
from openrl_reason.data.pairs import Pair, PairsConfig, build_pairs
from openrl_reason.errors import ConfigError, DataError
from openrl_reason.models.policy import ModelOutput
from openrl_reason.rewards.base import RewardResult
from openrl_reason.tasks.base import TaskConfig, TaskItem
from openrl_reason.workers.model_config import TrainedModelConfig
from openrl_reason.workers.model_group import ModelGroup
from openrl_reason.workers.model_worker import ModelWorker
from openrl_reason.workers.rollout_config import SamplingConfig
from tests.helpers_models import VOCAB, first_moments, write_tiny_model


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def make_pairs(count=6, seed=0):
    rng = np.random.default_rng(seed)

    def side(number, name):
        prompt = np.random.default_rng(number).integers(2, VOCAB, 4).tolist()
        response = rng.integers(2, VOCAB, rng.integers(2, 30)).tolist()
        return Trajectory.from_completion(prompt, response, None, task_id=f"q{number}", group_id=f"q{number}", sample_index=int(name == "chosen"))

    return [Pair(f"p{number}", f"q{number}", side(number, "chosen"), side(number, "rejected")) for number in range(count)]


def shifted_reference(pairs, worker):
    """Log-probs of the start, moved at random: a policy that has left its reference, chosen responses on both sides of it."""
    batch = pair_batch(pairs, {side.trajectory_id: 0.0 for pair in pairs for side in (pair.chosen, pair.rejected)})
    sums = response_logprobs(worker.logprobs([batch])[0]["logprobs"], batch, mean=False)
    sums = sums + torch.randn(len(sums), generator=torch.Generator().manual_seed(1))
    sides = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    return dict(zip((side.trajectory_id for side in sides), sums.tolist(), strict=True))


def worker_at(path, **settings):
    settings = dict(dtype="float32", lr=1e-2, warmup_ratio=0.0, schedule="constant") | settings
    return ModelWorker(TrainedModelConfig(path=path, **settings), total_steps=4)


def planned(batch, num_ranks, max_tokens, units):
    """The cut that a group of that many ranks makes; no actor is started."""
    return ModelGroup._plan(SimpleNamespace(num_ranks=num_ranks, config=SimpleNamespace(tokens_per_micro_batch=max_tokens)), batch, units)


@pytest.mark.parametrize(
    "loss", [DPOLossConfig(positive_weight=5.0), DPOLossConfig(label_smoothing=0.1), DPOLossConfig(kind="ipo", mean_logprobs=True)], ids=str
)
def test_gradient_and_metrics_do_not_depend_on_micro_batches(path, loss):
    pairs = make_pairs()
    reference = shifted_reference(pairs, worker_at(path))
    batch = pair_batch(pairs, reference)
    results = []
    for max_tokens in (10_000, 70, 1):
        worker = worker_at(path)
        micro_batches = batch.split(planned(batch, 1, max_tokens, [2] * len(pairs))[0])
        metrics = worker.update(micro_batches, PairLoss(loss), {"pairs": len(pairs)}, temperature=loss.temperature)
        results.append((first_moments(worker), metrics, len(micro_batches)))
    assert results[0][2] == 1 < results[1][2] < results[2][2] == len(pairs)
    gradient, metrics, _ = results[0]
    for other, other_metrics, _ in results[1:]:
        assert (other - gradient).norm() <= 1e-6 * gradient.norm()
        for name in ("train/loss", "dpo/accuracy", "dpo/reward_margin", "dpo/chosen_shortfall", "grad_norm"):
            assert math.isclose(metrics[name], other_metrics[name], rel_tol=1e-6, abs_tol=1e-9), name


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_plan_never_parts_a_pair_and_every_rank_has_as_many_micro_batches(num_ranks):
    batch = pair_batch(make_pairs(11), {side.trajectory_id: 0.0 for pair in make_pairs(11) for side in (pair.chosen, pair.rejected)})
    plan = planned(batch, num_ranks, 80, [2] * 11)
    assert len({len(rank) for rank in plan}) == 1
    micro_batches = [micro for rank in plan for micro in rank]
    assert sorted(index for micro in micro_batches for index in micro) == list(range(22))
    for micro in micro_batches:
        assert all(chosen % 2 == 0 and rejected == chosen + 1 for chosen, rejected in zip(micro[::2], micro[1::2], strict=True))
    assert planned(batch, num_ranks, 80, None) == planned(batch, num_ranks, 80, [1] * 22)
    with pytest.raises(ValueError, match="the units hold 20 sequences, the batch has 22"):
        planned(batch, num_ranks, 80, [2] * 10)


def test_a_dummy_micro_batch_contributes_nothing(path):
    pairs = make_pairs(2)
    batch = pair_batch(pairs, shifted_reference(pairs, worker_at(path)))
    moments = []
    for pieces in ([batch], [batch, batch.empty_like_dummy()]):
        worker = worker_at(path)
        worker.update(pieces, PairLoss(DPOLossConfig()), {"pairs": 2.0})
        moments.append(first_moments(worker))
    assert torch.equal(*moments)


def test_the_loss_is_dpo_loss_of_the_response_sums_and_lambda_zero_is_plain_dpo():
    pairs = make_pairs(3)
    batch = pair_batch(pairs, {side.trajectory_id: float(-n) for n, pair in enumerate(pairs) for side in (pair.chosen, pair.rejected)})
    logprobs = -torch.rand(batch.num_tokens, generator=torch.Generator().manual_seed(0))
    sums = [[float(logprobs[a:b][batch.action_mask[a:b]].sum()) for a, b in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False)]]
    chosen, rejected = torch.tensor(sums[0]).view(3, 2).T
    ref = torch.tensor([0.0, -1.0, -2.0])
    for weight in (0.0, 50.0):
        loss, metrics = PairLoss(DPOLossConfig(beta=0.3, positive_weight=weight))(ModelOutput(logprobs, None), batch, {"pairs": 3.0})
        torch.testing.assert_close(loss, dpo_loss(chosen, rejected, ref, ref, beta=0.3, positive_weight=weight)[0])
        assert metrics["train/loss"] == loss
    plain = PairLoss(DPOLossConfig(beta=0.3))(ModelOutput(logprobs, None), batch, {"pairs": 3.0})[0]
    torch.testing.assert_close(plain, -torch.nn.functional.logsigmoid(0.3 * (chosen - rejected)).mean())


def test_prompt_tokens_are_not_scored():
    batch = pair_batch(make_pairs(2), {side.trajectory_id: 0.0 for pair in make_pairs(2) for side in (pair.chosen, pair.rejected)})
    logprobs = torch.where(batch.action_mask, -1.0, float("nan")).requires_grad_()
    loss, _ = PairLoss(DPOLossConfig())(ModelOutput(logprobs, None), batch, {"pairs": 2.0})
    loss.backward()
    assert math.isfinite(float(loss.detach())) and (logprobs.grad[~batch.action_mask] == 0).all() and (logprobs.grad[batch.action_mask] != 0).all()


# ---- the driver's arithmetic, without actors -----------------------------------------------------------------------------------------------


def trainer_on(path, tmp_path, pairs, **settings):
    trainer = DPOTrainer(DPOConfig(policy=TrainedModelConfig(path=path), max_length=64, **settings), pairs=pairs)
    trainer.prepare()
    return trainer


def test_epochs_are_whole_and_held_out_questions_are_not_trained_on(path, tmp_path, capsys):
    pairs = [Pair(f"{pair.pair_id}/{copy}", pair.task_id, pair.chosen, pair.rejected) for pair in make_pairs(10) for copy in range(3)]
    trainer = trainer_on(path, tmp_path, pairs, eval_fraction=0.2, batch_size=7, epochs=2)
    assert len(trainer.held_out) == 6 and len(trainer.train_pairs) == 24
    assert not {pair.task_id for pair in trainer.held_out} & {pair.task_id for pair in trainer.train_pairs}
    assert trainer.run.steps == 7  # 48 positions by 7
    taken = []
    trainer.reference = {side.trajectory_id: 0.0 for pair in pairs for side in (pair.chosen, pair.rejected)}
    trainer.policy = SimpleNamespace(update=lambda batch, loss, denominators, **kwargs: taken.append((denominators, kwargs)) or {"lr": 0.0})
    for trainer.done in range(7):
        trainer.step()
    assert [denominators["pairs"] for denominators, _ in taken] == [7.0] * 6 + [6.0]
    assert all(kwargs["units"] == [2] * int(denominators["pairs"]) for denominators, kwargs in taken)
    assert "held out: 6 pairs of 2 of 10 questions" in capsys.readouterr().out


def test_pairs_that_are_too_long_are_counted_and_none_left_is_an_error(path, tmp_path, capsys):
    long = [Pair("p", "q", *(Trajectory.from_completion([3], [4] * 99, None, task_id="q", group_id="q", sample_index=n) for n in range(2)))]
    trainer = trainer_on(path, tmp_path, make_pairs(4) + long, eval_fraction=0.0)
    assert len(trainer.train_pairs) == 4 and "5 given, 4 pairs, 1 too long" in capsys.readouterr().out
    with pytest.raises(DataError, match="no pairs to learn from"):
        trainer_on(path, tmp_path, long)


def test_a_threshold_that_nothing_reaches_is_an_error_that_says_so(path, tmp_path):
    from openrl_reason.core.trajectory import write_jsonl

    samples = [Trajectory.from_completion([3], [4, n], None, task_id="q", group_id="q", sample_index=n, reward=0.2) for n in range(4)]
    write_jsonl(tmp_path / "samples.jsonl", samples)
    config = DPOConfig(policy=TrainedModelConfig(path=path), max_length=64, pairs=PairsConfig(trajectories=(str(tmp_path / "samples.jsonl"),)))
    with pytest.raises(DataError, match="4 rejected, 1 questions all rejected.*--pairs.threshold 0.5"):
        DPOTrainer(config).prepare()


def test_the_file_that_oreo_and_kto_learn_from_gives_pairs(path, tmp_path, capsys):
    rows = [{"prompt": f"{a}+1=?", "response": str(a + 1 + wrong), "reward": 1 - wrong} for a in range(8) for wrong in (0, 1)]
    rows.append({"prompt": "9+9=?", "response": "1" * 90, "reward": 0})
    (tmp_path / "collected.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = DPOTrainer(DPOConfig(
        run=RunConfig(output_dir=str(tmp_path / "run"), steps=100), policy=TrainedModelConfig(path=path), max_length=64, eval_fraction=0.25,
        data=OfflineDataConfig(path=(str(tmp_path / "collected.jsonl"),)),
    ))  # fmt: skip
    trainer.prepare()
    assert len(trainer.train_pairs) == 6 and len(trainer.held_out) == 2, "longer rows than --max_length are left out"
    assert "16 samples, 8 questions, 8 accepted, 8 rejected, 8 questions paired" in capsys.readouterr().out


def test_reference_logprobs_are_computed_once_and_only_for_the_same_pairs_and_loss(path, tmp_path):
    calls = []

    def make(resume, pairs, **loss):
        config = DPOConfig(policy=TrainedModelConfig(path=path), max_length=64, eval_fraction=0.5, loss=DPOLossConfig(**loss))
        trainer = DPOTrainer(config, pairs=pairs)
        trainer.prepare()
        trainer.run = trainer.run.__class__(**vars(trainer.run) | {"output_dir": str(tmp_path), "resume": resume})
        worker = worker_at(path)

        def logprobs(batch, **kwargs):
            calls.append(kwargs)
            return worker.logprobs([batch], temperature=kwargs["temperature"])[0]

        trainer.policy = SimpleNamespace(logprobs=logprobs)
        return trainer

    first = make(False, make_pairs(6))
    reference = first.read_or_score_reference()
    assert len(reference) == 12 and len(calls) == 1
    assert make(True, make_pairs(6)).read_or_score_reference() == pytest.approx(reference, rel=1e-6) and len(calls) == 1
    make(True, make_pairs(6), temperature=0.6).read_or_score_reference()
    make(True, make_pairs(7)).read_or_score_reference()
    make(False, make_pairs(7)).read_or_score_reference()
    assert len(calls) == 4 and calls[1]["temperature"] == 0.6
    # At the start, policy and reference are one: margin 0, loss log 2.
    first.reference = reference
    metrics = first.evaluate()
    assert metrics["eval/loss"] == pytest.approx(math.log(2), abs=1e-5) and metrics["eval/reward_margin"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "--epochs is 0"),
        ({"eval_fraction": 1.0}, "--eval_fraction is 1.0"),
        ({"sample": True, "pairs": PairsConfig(path="x.jsonl")}, "two sources"),
        ({"sample": True, "data": OfflineDataConfig(path=("x.jsonl",))}, "two sources"),
        ({"pairs": PairsConfig(path="x.jsonl"), "data": OfflineDataConfig(path=("x.jsonl",))}, "--data.path.*two sources"),
        ({"sample": True, "samples_per_prompt": 1}, "--samples_per_prompt is 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        DPOConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "hinge"}, "--loss.kind is 'hinge'"),
        ({"beta": 0.0}, "--loss.beta is 0.0"),
        ({"kind": "ipo", "positive_weight": 1.0}, "--loss.positive_weight is 1.0: is for"),
        ({"label_smoothing": 0.5}, "--loss.label_smoothing is 0.5"),
    ],
)
def test_losses_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        DPOLossConfig(**settings)


def test_without_a_source_of_pairs_the_remedies_are_named():
    with pytest.raises(ConfigError, match="--pairs.trajectories.*--sample"):
        DPOTrainer(DPOConfig())


def test_a_batch_knows_the_reference_of_each_side():
    pairs = make_pairs(2)
    reference = {side.trajectory_id: float(n) for n, side in enumerate(side for pair in pairs for side in (pair.chosen, pair.rejected))}
    batch = pair_batch(pairs, reference)
    assert batch.sequences["ref_logprobs"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert batch.lengths.tolist() == [side.num_tokens for pair in pairs for side in (pair.chosen, pair.rejected)]


class ScriptedCollector:
    """Every second sample is right."""

    def __init__(self, *args):
        pass

    def collect(self, items, *, num_samples, sampling, seed):
        samples = []
        for item, number in itertools.product(items, range(num_samples)):
            info = {"grade_status": "ok", "parsed": None, "prompt": "p", "response": "r", "gold": "g"}
            about = dict(task_id=item.task_id, group_id=item.task_id, sample_index=number, info=info)
            samples.append(Trajectory.from_completion([5], [9, number], None, reward=number % 2, **about))
        results = [RewardResult(t.reward) for t in samples]
        return SimpleNamespace(trajectories=samples, results=results, rewards=np.array([r.score for r in results]), statuses=["ok"])


@pytest.fixture
def sampled(tmp_path, monkeypatch):
    """A function that samples without engines and returns the trainer; its ``events`` tell when engines would start and end."""
    from openrl_reason.algorithms import dpo
    from openrl_reason.models.make import MakeModelConfig, make
    from openrl_reason.workers import rollout

    events = []

    class Pool:
        def __init__(self, *args, **kwargs):
            events.append("engines start")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            events.append("engines end")

    monkeypatch.setattr(rollout, "RolloutPool", Pool)
    monkeypatch.setattr(dpo, "Collector", ScriptedCollector)
    make(MakeModelConfig(output=str(tmp_path / "model")))

    def sample(resume, **settings):
        settings = {"samples_per_prompt": 4, "batch_size": 8, "epochs": 2} | settings
        config = DPOConfig(
            run=RunConfig(output_dir=str(tmp_path / "run"), steps=1000, resume=resume, log_rollouts=8), sample=True, eval_fraction=0.0,
            policy=TrainedModelConfig(path=str(tmp_path / "model")), task=TaskConfig(num_train=10, num_test=2), **settings,
        )  # fmt: skip
        trainer = DPOTrainer(config)
        trainer.prepare()
        trainer.sample_pairs(placement=None)
        return trainer

    sample.events = events
    return sample


def test_sampling_closes_its_engines_and_a_resumed_run_starts_none(sampled):
    first, second = sampled(resume=False), sampled(resume=True)
    assert sampled.events == ["engines start", "engines end"]
    assert [pair.pair_id for pair in first.train_pairs] == [pair.pair_id for pair in second.train_pairs] and len(first.train_pairs) == 40
    assert first.run.steps == 10


def test_samples_are_paired_block_by_block_and_the_log_gets_those_it_would_get_of_all_at_once(sampled, monkeypatch):
    trainer = sampled(resume=False, prompts_per_block=3)
    blocks = trainer._blocks
    everything = blocks.read()
    assert len(blocks.files) == 4 and len(everything.trajectories) == 40
    straight = build_pairs(everything.trajectories, max_length=1024)
    assert [pair.pair_id for pair in trainer.train_pairs] == [pair.pair_id for pair in straight.pairs]
    assert trainer._counts == dict(straight.counts) | {"training_pairs": 40, "held_out_pairs": 0}
    assert not any(pair.chosen.info or pair.rejected.info for pair in trainer.train_pairs)
    read, own = [], SampleBlocks.read_block
    monkeypatch.setattr(SampleBlocks, "read_block", lambda blocks, number: read.append(number) or own(blocks, number))
    for limit, expected in ((8, [0, 1]), (3, [0, 1, 2]), (-1, [0, 1, 2, 3])):
        logged = []
        trainer.log, trainer.run = SimpleNamespace(rollouts=logged.extend), replace(trainer.run, log_rollouts=limit)
        read.clear()
        trainer._log_samples(blocks)
        assert logged == readable(everything, 0, limit, tokenizer=trainer.tokenizer)
        assert read == expected, "only blocks with something to log are read again"


def test_a_run_killed_while_it_sampled_is_not_started_over_unasked(sampled):
    trainer = sampled(resume=False)
    blocks = sorted((trainer.folder / "samples").glob("samples-*.jsonl"))
    assert blocks and not (trainer.folder / "metrics.jsonl").exists()
    with pytest.raises(ConfigError, match="holds a run already: add --run.resume to continue it"):
        DPOTrainer(trainer.config).start()
    assert sorted((trainer.folder / "samples").glob("samples-*.jsonl")) == blocks


def test_a_length_that_no_prompt_fits_is_refused_before_sampling_and_a_tight_one_is_told(sampled, capsys):
    room = SamplingConfig(temperature=1.0, max_new_tokens=64)
    with pytest.raises(ConfigError, match=r"--max_length is 4: the shortest of 10 training prompts has \d+ tokens.* no response of even 8 tokens"):
        sampled(resume=False, max_length=4, sampling=room)
    assert not sampled.events, "refused in prepare"
    assert "training prompts leave less" not in capsys.readouterr().out
    check_room([10, 30, 40], 100, 64)
    assert "1 of 3 training prompts leave less than --sampling.max_new_tokens 64 tokens within --max_length 100" in capsys.readouterr().out
    check_room([10, 30, 40], 104, 64)
    check_room([10], 12, 2)
    assert not capsys.readouterr().out
    with pytest.raises(ConfigError, match="use 74 or more .* take 104"):
        check_room([10, 40], 17, 64)


def test_questions_in_more_than_one_block_are_known():
    items = [TaskItem(name, "p", "g") for name in ("a", "b", "a", "c", "b", "c")]
    assert SampleBlocks(None, items, 2, None, (0,), 3).spanning() == {"b"}
