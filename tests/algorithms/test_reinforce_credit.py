"""Credit and loss of the REINFORCE family, without actors: what each advantage means, and that no cut of the batch changes the gradient."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from openrl_reason.algorithms.collect import FAILED, Rollouts, check_failures, logged_places, readable
from openrl_reason.algorithms.online_config import ReferenceConfig
from openrl_reason.algorithms.policy_gradient import PolicyGradientLoss
from openrl_reason.algorithms.reduction import loss_weights
from openrl_reason.algorithms.reinforce import ReinforceTrainer
from openrl_reason.algorithms.reinforce_config import KLConfig, ReinforceAlgoConfig, ReinforceConfig
from openrl_reason.core.trajectory import Trajectory
from openrl_reason.errors import ConfigError, DataError, WorkerError
from openrl_reason.models.policy import ModelOutput
from openrl_reason.models.tiny import make_model
from openrl_reason.rewards.base import RewardResult
from openrl_reason.tasks.base import Task, TaskConfig
from openrl_reason.workers.model_config import TrainedModelConfig
from openrl_reason.workers.rollout_config import RolloutConfig, SamplingConfig

LENGTHS = [3, 5, 2, 4, 6, 1]
REWARDS = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0]  # two prompts with three siblings each


def rollouts(rewards=REWARDS, statuses=None):
    rng = np.random.default_rng(0)
    trajectories = [
        Trajectory.from_completion(
            rng.integers(0, 9, 2), rng.integers(0, 9, n), -rng.random(n), task_id=str(i // 3), group_id=str(i // 3), sample_index=i, reward=r
        )
        for i, (n, r) in enumerate(zip(LENGTHS, rewards, strict=True))
    ]
    statuses = statuses or ["ok"] * len(trajectories)
    scores = [float("nan") if status in FAILED else reward for reward, status in zip(rewards, statuses, strict=True)]
    results = [RewardResult(score, status, detail="because" * (status != "ok")) for score, status in zip(scores, statuses, strict=True)]
    return Rollouts(trajectories, [None] * len(trajectories), results)


def trainer(**algo):
    return ReinforceTrainer(ReinforceConfig(prompts_per_step=2, samples_per_prompt=3, algo=ReinforceAlgoConfig(**algo)))


class FixedLogprobs:
    """Stands where the policy group stands; returns given numbers."""

    def __init__(self, logprobs):
        self._logprobs = logprobs

    def logprobs(self, batch, temperature):
        return {"logprobs": self._logprobs}

    def result(self):
        return {"logprobs": self._logprobs}


def per_sequence(batch, values):
    return [values[(batch.sequence_ids == b) & batch.action_mask] for b in range(batch.num_sequences)]


@pytest.mark.parametrize(
    ("advantage", "expected"),
    [
        ("none", REWARDS),
        ("rloo", [1 - 0, 0 - 0.5, 0 - 0.5, 0, 0, 0]),
        ("dr_grpo", [2 / 3, -1 / 3, -1 / 3, 0, 0, 0]),
    ],
)
def test_outcome_advantages_reach_every_action_token_and_no_other(advantage, expected):
    batch, _ = trainer(advantage=advantage).credit(rollouts())
    advantages = batch.tokens["advantages"]
    assert (advantages[~batch.action_mask] == 0).all()
    for values, target in zip(per_sequence(batch, advantages), expected, strict=True):
        assert values.tolist() == pytest.approx([target] * len(values), abs=1e-6)


def test_discounting_runs_from_the_last_action_token_back():
    batch, _ = trainer(advantage="none", gamma=0.5).credit(rollouts())
    assert per_sequence(batch, batch.tokens["advantages"])[0].tolist() == [0.25, 0.5, 1.0]


def test_the_return_clamp_acts_before_the_baseline():
    fresh = trainer(advantage="baseline", return_clamp=(0.0, 0.25), baseline_decay=0.5)
    first, _ = fresh.credit(rollouts())
    second, metrics = fresh.credit(rollouts())
    assert first.tokens["advantages"].max() == 0.25
    assert metrics["train/baseline"] == pytest.approx(np.mean(REWARDS))
    assert second.tokens["advantages"][second.action_mask].max() == pytest.approx(0.25 - np.mean(REWARDS))


def test_reinforce_pp_whitens_over_the_global_batch():
    batch, _ = trainer(advantage="reinforce++").credit(rollouts())
    values = batch.tokens["advantages"][batch.action_mask].double()
    assert values.mean().abs() < 1e-6 and abs(values.std() - 1) < 1e-4


def test_kl_in_the_reward_is_paid_from_each_token_on_and_carries_no_gradient():
    algo = trainer(advantage="none", kl=KLConfig(where="reward", kind="k1", coef=0.1))
    samples = rollouts([0.0] * 6)
    total = sum(LENGTHS) + 2 * len(LENGTHS)
    policy, reference = torch.randn(total, requires_grad=True), torch.randn(total)
    samples.chunks = [FixedLogprobs(reference)]
    algo.policy = FixedLogprobs(policy.detach())
    batch, _ = algo.credit(samples)
    for advantages, kl in zip(per_sequence(batch, batch.tokens["advantages"]), per_sequence(batch, policy.detach() - reference), strict=True):
        expected = [-0.1 * float(kl[t:].sum()) for t in range(len(kl))]
        assert advantages.tolist() == pytest.approx(expected, abs=1e-5)
    assert not batch.tokens["advantages"].requires_grad


def test_stable_reinforce_has_no_gradient_where_policy_equals_reference_and_the_return_is_zero():
    """The published code fails this: its KL term is not detached (oreo.md, L5)."""
    kl = KLConfig(where="reward", kind="k1", coef=0.25)
    algo = ReinforceAlgoConfig(advantage="none", loss_reduction="sequence", return_clamp=(0.0, 10.0), kl=kl)
    driver = ReinforceTrainer(ReinforceConfig(prompts_per_step=2, samples_per_prompt=3, algo=algo))
    samples = rollouts([0.0] * 6)
    logprobs = -torch.rand(sum(LENGTHS) + 2 * len(LENGTHS))
    samples.chunks, driver.policy = [FixedLogprobs(logprobs)], FixedLogprobs(logprobs)
    batch, _ = driver.credit(samples)
    weights, denominator = loss_weights(batch, "sequence")
    parameter = logprobs.clone().requires_grad_()
    loss, _ = PolicyGradientLoss(algo, 0.25)(
        ModelOutput(logprobs=parameter, entropy=torch.zeros_like(parameter)),
        batch.with_tokens(loss_weights=weights),
        {"loss": denominator, "tokens": float(batch.num_actions)},
    )
    loss.backward()
    assert parameter.grad.abs().max() == 0


@pytest.mark.parametrize("reduction", ["token", "sequence", "batch", "constant"])
@pytest.mark.parametrize("where", ["none", "loss"])
def test_the_gradient_does_not_depend_on_the_micro_batches(reduction, where):
    algo = ReinforceAlgoConfig(advantage="rloo", entropy_coef=0.01, kl=KLConfig(where=where, coef=0.1), importance_correction="truncate")
    batch, _ = ReinforceTrainer(ReinforceConfig(prompts_per_step=2, samples_per_prompt=3, algo=replace(algo, kl=KLConfig()))).credit(rollouts())
    weights, denominator = loss_weights(batch, reduction, max_response_tokens=8)
    batch = batch.with_tokens(loss_weights=weights, ref_logprobs=-torch.rand(batch.num_tokens), old_logprobs=-torch.rand(batch.num_tokens))
    base, denominators = -torch.rand(batch.num_tokens), {"loss": denominator, "tokens": float(batch.num_actions)}

    def gradient(cuts):
        parameter = base.clone().requires_grad_()
        totals = {}
        for indices in cuts:
            index = batch.token_index(indices) if indices else None
            part = batch.select(indices) if indices else batch.empty_like_dummy()
            logprobs = parameter[index] if indices else torch.zeros(2, requires_grad=True)
            loss, metrics = PolicyGradientLoss(algo, 0.1)(ModelOutput(logprobs=logprobs, entropy=-logprobs * 0.5), part, denominators)
            loss.backward()
            for name, value in metrics.items():
                if not name.endswith(("/max", "/min")):
                    totals[name] = totals.get(name, 0.0) + float(value)
        return parameter.grad, totals

    whole, metrics = gradient([[0, 1, 2, 3, 4, 5]])
    pieces, summed = gradient([[5, 1], [0], [], [2, 4, 3]])
    assert torch.isfinite(whole).all() and torch.allclose(whole, pieces, rtol=1e-6, atol=1e-9)
    assert summed == pytest.approx(metrics, rel=1e-5, abs=1e-7)


def test_a_response_whose_grader_failed_is_counted_and_does_not_train():
    driver = trainer(advantage="rloo")
    batch, metrics = driver.credit(rollouts([0.0, 0.0, 1.0, 1.0, 1.0, 0.0], ["timeout", "ok", "ok", "ok", "ok", "no_answer"]))
    assert metrics["rollout/ungraded"] == 1 and batch.num_sequences == 5
    # The siblings are compared among themselves: 0 and 1, not 0, 0 and 1.
    assert [float(values[0]) for values in per_sequence(batch, batch.tokens["advantages"])][:2] == [-1.0, 1.0]
    with pytest.raises(WorkerError, match="not one of 6 responses has a reward"):
        driver.credit(rollouts(REWARDS, ["error"] * 6))


def test_minibatches_partition_the_batch_and_keep_siblings_together():
    driver = ReinforceTrainer(ReinforceConfig(prompts_per_step=2, samples_per_prompt=3, algo=ReinforceAlgoConfig(minibatches=2, epochs=2)))
    driver.policy = FixedLogprobs(torch.zeros(sum(LENGTHS) + 2 * len(LENGTHS)))
    batch, _ = driver.credit(rollouts())
    parts = driver.minibatches(batch, 0)
    assert sorted(map(tuple, parts)) == [(0, 1, 2), (3, 4, 5)]
    assert parts == driver.minibatches(batch, 0)


def test_rewards_of_steps_reach_the_tokens_before_and_not_those_after():
    """A token's advantage is the group's verdict on the total less what was earned before the token."""
    samples = rollouts()
    first = samples.trajectories[0]  # three tokens: two steps of one and two tokens
    first.step_ids[first.action_mask] = [0, 1, 1]
    first.rewards = np.array([0.25, 0.75], np.float32)
    batch, _ = trainer(advantage="rloo").credit(samples)
    tokens = per_sequence(batch, batch.tokens["advantages"])
    assert tokens[0].tolist() == pytest.approx([1.0, 0.75, 0.75])
    assert tokens[1].tolist() == [-0.5] * 5


def test_failures_stop_the_run_when_they_are_more_than_allowed_and_the_message_counts_them():
    samples = rollouts(REWARDS, ["timeout", "timeout", "error", "ok", "ok", "no_answer"])
    check_failures(samples, 0.5)
    with pytest.raises(WorkerError, match=r"3 of 6 rewards failed \(.*timeout 2.*max_failed_rate is 0.49.*because") as error:
        check_failures(samples, 0.49)
    assert "no_answer 1" in str(error.value)


def test_written_rollouts_hold_rewards_that_are_missing_as_null():
    samples = rollouts(REWARDS, ["timeout", *["ok"] * 5])
    for trajectory in samples.trajectories:
        trajectory.info.update(prompt="1+1=?", response="2", gold="2", parsed=None)
    batch, _ = trainer(advantage="rloo").credit(samples)
    records = readable(samples, 3, -1, batch=batch)
    assert [record["reward"] for record in records] == [None, *REWARDS[1:]]
    assert records[0]["status"] == "timeout" and records[0]["step"] == 3 and records[0]["detail"] == "because"
    assert len(readable(samples, 3, 4)) == 3


def test_logged_samples_are_whole_groups_as_far_as_the_limit_goes():
    groups = [str(index // 4) for index in range(32)]
    assert logged_places(groups, -1) == list(range(32))
    assert logged_places(groups, 8) == [0, 1, 2, 3, 16, 17, 18, 19]
    assert logged_places(groups, 3) == [0, 10, 21]
    assert logged_places(groups, 0) == [] and logged_places([], 8) == []
    assert len(logged_places([str(index) for index in range(9)], 4)) == 4


@pytest.mark.parametrize("allowed", [False, True])
def test_a_task_of_ones_own_may_not_train_on_held_out_questions(tmp_path, allowed):
    class Twice(Task):
        name = "twice"

        def load_split(self, split):
            return [self.make_item(f"What is {n} plus {n}?", gold=str(2 * n)) for n in (range(5) if split == "train" else range(4, 9))]

    config = ReinforceConfig(
        prompts_per_step=2, samples_per_prompt=2, policy=TrainedModelConfig(path=str(make_model(tmp_path / "model", num_layers=1))),
        rollout=RolloutConfig(max_model_len=128), sampling=SamplingConfig(max_new_tokens=16),
    )  # fmt: skip
    driver = ReinforceTrainer(config, task=Twice(TaskConfig(allow_test_data_in_training=allowed)))
    if allowed:
        driver.prepare()
    else:
        with pytest.raises(DataError, match=r"1 training questions of task twice are among its 5 items.*--task.allow_test_data_in_training"):
            driver.prepare()


def test_the_full_kl_is_the_loss_s_own_and_is_refused_where_it_cannot_be():
    """Whole distributions of the reference come as hidden states: the exact KL is what the model says, weighted as the other estimators are."""
    run, collected = trainer(kl=KLConfig(where="loss", kind="full", coef=0.5)), rollouts()
    chunk = {"logprobs": torch.zeros(sum(t.num_tokens for t in collected.trajectories))}
    chunk["hidden"] = torch.randn(len(chunk["logprobs"]), 4)
    collected.chunks = [type("Chunk", (), {"result": staticmethod(lambda: chunk)})]
    batch, _ = run.credit(collected)
    assert torch.equal(batch.tokens["ref_hidden"], chunk["hidden"])
    weights, denominator = loss_weights(batch, "token", max_response_tokens=8)
    batch = batch.with_tokens(loss_weights=weights)
    kl = torch.where(batch.action_mask, torch.rand(batch.num_tokens), 0.0)
    outputs = ModelOutput(logprobs=batch.behaviour_logprobs.clone(), entropy=torch.zeros(batch.num_tokens), kl=kl)
    denominators = {"loss": denominator, "tokens": float(batch.num_actions)}
    losses = [PolicyGradientLoss(run.config.algo, coefficient)(outputs, batch, denominators) for coefficient in (0.5, 0.0)]
    expected = float(kl.sum()) / batch.num_actions
    assert float(losses[0][0] - losses[1][0]) == pytest.approx(0.5 * expected, rel=1e-5)
    assert float(losses[0][1]["train/kl"]) == pytest.approx(expected)
    with pytest.raises(ConfigError, match="in the reward use k1"):
        trainer(kl=KLConfig(where="reward", kind="full"))
    with pytest.raises(ConfigError, match="refresh_every"):
        ReinforceConfig(reference=ReferenceConfig(refresh_every=2), algo=ReinforceAlgoConfig(kl=KLConfig(where="loss", kind="full")))
