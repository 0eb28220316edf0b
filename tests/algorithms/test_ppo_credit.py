"""Credit of PPO and loss of its critic, without actors: naive loops over time, cuts of the batch, warm-up, refused settings."""

import math
import types
from dataclasses import replace

import numpy as np
import pytest
import torch

from openrl_reason.algorithms import online
from openrl_reason.algorithms.collect import Rollouts
from openrl_reason.algorithms.online_config import KLConfig, ReferenceConfig
from openrl_reason.algorithms.ppo import WHITENINGS, CriticConfig, CriticLoss, PPOAlgoConfig, PPOConfig, PPOTrainer, value_metrics, whitened
from openrl_reason.algorithms.trainer import RunConfig
from openrl_reason.algorithms.vine import VineConfig
from openrl_reason.algorithms.vineppo import VinePPOAlgoConfig, VinePPOConfig
from openrl_reason.core.kl import kl_penalty
from openrl_reason.core.trajectory import Trajectory
from openrl_reason.errors import ConfigError
from openrl_reason.models.policy import ModelOutput
from openrl_reason.rewards.base import RewardResult
from openrl_reason.rewards.config import RewardConfig
from openrl_reason.workers.model_config import TrainedModelConfig, learning_rate

LENGTHS = [3, 9, 1, 14, 6, 2]


def episodes(seed=0):
    """Two prompts with three siblings each: episodes of several turns (observations between actions), rewards on every step."""
    rng, made = np.random.default_rng(seed), []
    for index, length in enumerate(LENGTHS):
        mask = rng.random(length + 2) < 0.6
        mask[:2], mask[-1] = False, True
        turns = np.cumsum(np.diff(mask.astype(int), prepend=0) == 1) - 1
        steps = np.where(mask, turns, -1)
        made.append(
            Trajectory(
                trajectory_id=str(index), task_id=str(index // 3), group_id=str(index // 3), token_ids=rng.integers(0, 9, length + 2),
                action_mask=mask, step_ids=steps, behaviour_logprobs=np.where(mask, -rng.random(length + 2), np.nan),
                rewards=rng.normal(size=steps.max() + 1),
            )
        )  # fmt: skip
    return Rollouts(made, [None] * 6, [RewardResult(trajectory.reward) for trajectory in made])


class Fixed:
    """Stands where a model group stands; returns given numbers, for the tokens of a batch that names them."""

    def __init__(self, numbers):
        self.numbers, self.updates = numbers, []

    def logprobs(self, batch, temperature):
        return {"logprobs": self.numbers}

    def values(self, batch):
        return self.numbers

    def result(self):
        return {"logprobs": self.numbers}

    def update(self, batch, loss, denominators, **kwargs):
        self.updates.append((batch, denominators))
        return {"loss": 0.0, "grad_norm": 1.0, "lr": 1.0, "sampling/logprob_difference/mean": 0.0, "seconds/optimizer": 0.5}


def driver(rollouts, **algo):
    total = sum(trajectory.num_tokens for trajectory in rollouts.trajectories)
    generator = torch.Generator().manual_seed(1)
    settings = dict(whiten="none") | algo
    trainer = PPOTrainer(PPOConfig(prompts_per_step=2, samples_per_prompt=3, algo=PPOAlgoConfig(**settings)))
    trainer.critic, trainer.policy = Fixed(torch.randn(total, generator=generator)), Fixed(-torch.rand(total, generator=generator))
    rollouts.chunks = [Fixed(-torch.rand(total, generator=generator))]
    return trainer


def naive_credit(trajectories, values, extra, gamma, lam):
    """Advantages and returns [N] of A_t = sum_k (gamma lam)^k delta_{t+k}, with a double loop over the action tokens of each episode."""
    advantages, returns, offset = np.zeros(len(values)), np.zeros(len(values)), 0
    for trajectory in trajectories:
        actions = np.flatnonzero(trajectory.action_mask).tolist()
        steps = trajectory.step_ids[actions]
        reward = [float(extra[offset + t]) for t in actions]
        for step, paid in enumerate(trajectory.rewards.tolist()):
            reward[int(np.flatnonzero(steps == step)[-1])] += paid
        state = [float(values[offset + t]) for t in actions] + [0.0]
        delta = [reward[k] + gamma * state[k + 1] - state[k] for k in range(len(actions))]
        for k, t in enumerate(actions):
            advantages[offset + t] = sum((gamma * lam) ** (later - k) * delta[later] for later in range(k, len(actions)))
            returns[offset + t] = advantages[offset + t] + state[k]
        offset += trajectory.num_tokens
    return advantages, returns


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5), (0.99, 0.0)])
@pytest.mark.parametrize("where", ["none", "reward"])
def test_advantages_and_returns_equal_a_loop_over_the_actions_with_the_kl_paid_at_each(gamma, lam, where):
    rollouts = episodes()
    trainer = driver(rollouts, gamma=gamma, lam=lam, kl=KLConfig(where=where, kind="k1", coef=0.3))
    batch, metrics = trainer.credit(rollouts)
    assert not batch.action_mask.all() and (batch.action_mask.diff() != 0).sum() > 12, "no observations between actions"
    kl = kl_penalty(trainer.policy.numbers, rollouts.chunks[0].numbers, kind="k1", mask=batch.action_mask)
    advantages, returns = naive_credit(rollouts.trajectories, trainer.critic.numbers, -0.3 * kl * (where == "reward"), gamma, lam)
    torch.testing.assert_close(batch.tokens["advantages"].double(), torch.tensor(advantages), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(batch.tokens["returns"].double(), torch.tensor(returns), atol=1e-5, rtol=1e-5)
    assert torch.equal(batch.tokens["values"], trainer.critic.numbers)
    assert ("train/kl" in metrics) == (where == "reward")
    if where == "reward":
        assert metrics["train/kl"] == pytest.approx(float(kl.sum() / batch.num_actions))


@pytest.mark.parametrize("kind", WHITENINGS)
def test_whitening_is_over_the_global_batch_and_the_minibatches_are_cut_from_it(kind):
    rollouts = episodes()
    plain = driver(rollouts).credit(rollouts)[0]
    mask, advantages = plain.action_mask, plain.tokens["advantages"].double()
    trainer = driver(rollouts, whiten=kind, minibatches=2)
    batch, _ = trainer.credit(rollouts)
    chosen = advantages[mask]
    mean = chosen.mean() if kind in ("center", "full") else 0.0
    scale = chosen.std(unbiased=True) if kind in ("scale", "full") else 1.0
    torch.testing.assert_close(batch.tokens["advantages"][mask].double(), (chosen - mean) / scale, atol=1e-5, rtol=1e-5)
    assert (batch.tokens["advantages"][~mask] == 0).all()
    torch.testing.assert_close(batch.tokens["returns"], plain.tokens["returns"])
    if kind in ("scale", "none"):
        assert torch.equal(batch.tokens["advantages"].sign(), plain.tokens["advantages"].sign())
    parts = [batch.select(indices) for indices in trainer.minibatches(batch, 0)]
    assert len(parts) == 2
    got, whole = (torch.cat([b.tokens["advantages"] for b in bs]).sort().values for bs in (parts, [batch]))
    assert torch.equal(got, whole)


def test_whitening_does_not_see_what_the_mask_hides():
    advantages, mask = torch.tensor([1.0, 5.0, 3.0, 1e9]), torch.tensor([True, True, True, False])
    for kind in WHITENINGS:
        assert torch.equal(whitened(advantages, mask, kind)[:3], whitened(advantages[:3], mask[:3], kind))


def test_values_of_episodes_without_a_reward_are_left_out():
    rollouts = episodes()
    trainer = driver(rollouts)
    whole, _ = trainer.credit(rollouts)
    rollouts.results[1] = RewardResult(math.nan, "error")
    kept = [0, 2, 3, 4, 5]
    trainer.critic = Fixed(trainer.critic.numbers[whole.token_index(kept)])
    part, metrics = trainer.credit(rollouts)
    assert metrics["rollout/ungraded"] == 1
    torch.testing.assert_close(part.tokens["advantages"], whole.select(kept).tokens["advantages"])


# ---- the critic --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_critics_loss_is_the_naive_one_and_its_gradient_does_not_depend_on_the_micro_batches(clip):
    rollouts = episodes()
    batch, _ = driver(rollouts).credit(rollouts)
    denominators, base = {"tokens": float(batch.num_actions)}, batch.tokens["values"] + torch.randn(batch.num_tokens).mul(0.4)

    def run(cuts):
        parameter, total, metrics = base.clone().requires_grad_(), 0.0, {}
        for indices in cuts:
            part = batch.select(indices) if indices else batch.empty_like_dummy()
            values = parameter[batch.token_index(indices)] if indices else torch.zeros(2, requires_grad=True)
            loss, own = CriticLoss(clip)(ModelOutput(values=values), part, denominators)
            loss.backward()
            total += float(loss.detach())
            metrics = {name: metrics.get(name, 0.0) + float(value) for name, value in own.items()}
        return parameter.grad, total, metrics

    expected, clipped = 0.0, 0
    for value, old, target, own in zip(base, batch.tokens["values"], batch.tokens["returns"], batch.action_mask, strict=True):
        if own:
            held = value if clip is None else old + min(max(value - old, -clip), clip)
            expected += 0.5 * float(max((value - target) ** 2, (held - target) ** 2)) / batch.num_actions
            clipped += bool((held - target) ** 2 > (value - target) ** 2)
    gradient, loss, metrics = run([[0, 1, 2, 3, 4, 5]])
    pieces, summed, summed_metrics = run([[5, 1], [0], [], [2, 4, 3]])
    assert loss == pytest.approx(expected, rel=1e-5) == metrics["critic/value_loss"]
    assert torch.allclose(gradient, pieces, rtol=1e-6, atol=1e-9) and summed == pytest.approx(loss, rel=1e-6)
    assert summed_metrics == pytest.approx(metrics, rel=1e-5)
    assert (gradient[~batch.action_mask] == 0).all() and gradient[batch.action_mask].abs().max() > 0
    if clip:
        assert metrics["critic/value_clip_fraction"] == pytest.approx(clipped / batch.num_actions) and clipped


def test_explained_variance_is_one_less_the_share_of_variance_that_is_left():
    returns, values = torch.randn(200, dtype=torch.float64) * 3 + 7, torch.randn(200, dtype=torch.float64)
    metrics = value_metrics(values, returns)
    assert metrics["critic/vf_explained_var"] == pytest.approx(1 - float(np.var((returns - values).numpy()) / np.var(returns.numpy())))
    assert value_metrics(returns - 5, returns)["critic/vf_explained_var"] == pytest.approx(1.0), "a constant error explains everything"
    assert value_metrics(returns.mean().expand(200), returns)["critic/vf_explained_var"] == pytest.approx(0.0)
    assert math.isnan(value_metrics(values, torch.ones(200))["critic/vf_explained_var"])


# ---- updates -----------------------------------------------------------------------------------------------------------------


def test_in_the_warm_up_the_critic_alone_is_trained_and_the_policys_schedule_spans_its_own_updates():
    rollouts = episodes()
    trainer = driver(rollouts)
    trainer.config = replace(
        trainer.config, run=RunConfig(steps=10), critic=CriticConfig(warmup_steps=4), algo=PPOAlgoConfig(epochs=3, minibatches=2)
    )
    trainer.run, trainer._updates_per_step, trainer._take_turns = trainer.config.run, 6, False
    assert trainer.policy_updates == 6 * (10 - 4)
    batch, _ = trainer.credit(rollouts)
    for trainer.done in range(10):
        before = len(trainer.critic.updates), len(trainer.policy.updates)
        metrics = trainer.update(batch)
        after = len(trainer.critic.updates), len(trainer.policy.updates)
        assert after[0] - before[0] == 6 and after[1] - before[1] == (6 if trainer.done >= 4 else 0)
        assert metrics.get("train/critic_warmup", 0.0) == (trainer.done < 4)
        assert {"critic/grad_norm", "critic/lr", "timing/critic_update", "timing/critic_optimizer"} <= metrics.keys()
        assert ("train/grad_norm" in metrics) == ("timing/update" in metrics) == (trainer.done >= 4)
    for parts in zip(*[iter(trainer.critic.updates)] * 2, strict=True):
        assert sum(denominators["tokens"] for _, denominators in parts) == batch.num_actions, "a pass shows the critic every token once"


def test_critic_and_policy_see_the_same_minibatches():
    rollouts = episodes()
    trainer = driver(rollouts, epochs=2, minibatches=2)
    trainer._take_turns, turns = True, []  # on shared GPUs the critic has its memory only while it works
    trainer.critic.reload, trainer.critic.offload = (lambda word=word: turns.append(word) for word in ("reload", "offload"))
    trainer.update(trainer.credit(rollouts)[0])
    assert turns == ["reload", "offload"] * 2, "for the values, and for the updates"
    for (one, _), (two, _) in zip(trainer.critic.updates, trainer.policy.updates, strict=True):
        assert torch.equal(one.token_ids, two.token_ids)


class Scheduled(Fixed):
    """A group whose ranks count updates; ``rates`` are the learning rates of those that it took."""

    def __init__(self, total):
        super().__init__(None)
        self.config, self.total, self.step, self.rates = TrainedModelConfig(lr=1.0, min_lr_ratio=0.1), total, 0, []

    def logprobs(self, batch, temperature):
        return {"logprobs": torch.zeros(batch.num_tokens)}

    def values(self, batch):
        return torch.zeros(batch.num_tokens)

    def update(self, *args, **kwargs):
        self.rates.append(learning_rate(self.config, self.step, self.total))
        self.step += 1
        return super().update(*args, **kwargs)

    def skip_updates(self, count):
        self.step += count


@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize("failures", [{}, {0: range(6), 2: range(6), 3: range(3), 5: range(3, 6), 7: range(3)}])
def test_updates_that_have_nothing_to_learn_from_do_not_hold_the_schedules_up(warmup, failures, monkeypatch):
    """``failures``: ungraded places by step; all six are the whole collection, three a prompt, which is one of two minibatches."""
    config = PPOConfig(
        run=RunConfig(steps=8), prompts_per_step=2, samples_per_prompt=3, critic=CriticConfig(warmup_steps=warmup),
        algo=PPOAlgoConfig(epochs=2, minibatches=2), reward=RewardConfig(max_failed_rate=1.0),
    )  # fmt: skip
    trainer = PPOTrainer(config)
    trainer.policy, trainer.critic, trainer.reference = Scheduled(trainer.policy_updates), Scheduled(8 * 4), None
    trainer.log, trainer.tokenizer = types.SimpleNamespace(rollouts=lambda records: None), None
    monkeypatch.setattr(trainer, "sync", lambda version: {})
    monkeypatch.setattr(online, "readable", lambda *args, **kwargs: [])
    for trainer.done in range(8):
        samples = episodes()
        for place in failures.get(trainer.done, ()):
            samples.results[place] = RewardResult(math.nan, "error")
        monkeypatch.setattr(trainer, "collect", lambda samples=samples: samples)
        metrics = trainer.step()
        assert metrics.get("train/skipped_update", 0.0) == (len(failures.get(trainer.done, ())) == 6)
        assert trainer.critic.step == 4 * (trainer.done + 1) and trainer.policy.step == 4 * max(0, trainer.done + 1 - warmup)
    for group, first in ((trainer.critic, 0), (trainer.policy, warmup)):
        left_out = sum(4 if len(places) == 6 else 2 for step, places in failures.items() if step >= first)
        assert len(group.rates) == group.total - left_out
        assert group.rates[-1] == pytest.approx(0.1) == min(group.rates[1:])


# ---- refused settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "config"),
    [
        ("algo.lam", lambda: PPOConfig(algo=PPOAlgoConfig(lam=1.5))),
        ("algo.lam", lambda: PPOConfig(algo=PPOAlgoConfig(lam=-0.1))),
        ("algo.lam", lambda: PPOConfig(algo=PPOAlgoConfig(lam=math.nan))),
        ("algo.gamma", lambda: PPOConfig(algo=PPOAlgoConfig(gamma=0.0))),
        ("reference.path", lambda: PPOConfig(reference=ReferenceConfig(path="models/start"))),
        ("algo.entropy_coef", lambda: PPOConfig(algo=PPOAlgoConfig(entropy_coef=math.nan))),
        ("algo.kl.coef", lambda: PPOConfig(algo=PPOAlgoConfig(kl=KLConfig(where="loss", coef=math.inf)))),
        ("algo.value_clip", lambda: PPOConfig(algo=PPOAlgoConfig(value_clip=0.0))),
        ("algo.whiten", lambda: PPOConfig(algo=PPOAlgoConfig(whiten="yes"))),
        ("algo.loss_reduction", lambda: PPOConfig(algo=PPOAlgoConfig(loss_reduction="auto"))),
        ("critic.warmup_steps", lambda: PPOConfig(run=RunConfig(steps=5), critic=CriticConfig(warmup_steps=5))),
        ("critic.warmup_steps", lambda: CriticConfig(warmup_steps=-1)),
        ("algo.whiten", lambda: VinePPOConfig(algo=VinePPOAlgoConfig(whiten="grayen"))),
        ("algo.loss_reduction", lambda: VinePPOConfig(algo=VinePPOAlgoConfig(loss_reduction="auto"))),
        ("algo.kl.where", lambda: VinePPOConfig(algo=VinePPOAlgoConfig(kl=KLConfig(where="reward")))),
        ("vine.num_rollouts", lambda: VinePPOConfig(vine=VineConfig(num_rollouts=0))),
        ("vine.max_steps", lambda: VinePPOConfig(vine=VineConfig(max_steps=0))),
        ("vine.interval_width", lambda: VinePPOConfig(vine=VineConfig(interval_width=1.0))),
        ("vine.interval_width", lambda: VinePPOConfig(vine=VineConfig(interval_width=0.0))),
        ("reward.no_answer", lambda: VinePPOConfig(vine=VineConfig(interval_width=0.3), reward=RewardConfig(no_answer=-1.0))),
        ("vine.max_rollouts", lambda: VinePPOConfig(vine=VineConfig(interval_width=0.3, num_rollouts=9, max_rollouts=8))),
        ("vine.root_from_siblings", lambda: VinePPOConfig(samples_per_prompt=1, vine=VineConfig(root_from_siblings=True))),
        ("vine.step_kind", lambda: VinePPOConfig(vine=VineConfig(step_kind="lines"))),
    ],
)
def test_settings_that_cannot_work_are_refused_with_their_flag(flag, config):
    with pytest.raises(ConfigError, match=f"--{flag}"):
        config()


def test_the_defaults_and_the_published_settings_are_accepted():
    PPOConfig(), VinePPOConfig()
    VinePPOConfig(vine=VineConfig(num_rollouts=9, max_steps=25), algo=VinePPOAlgoConfig(whiten="none", kl=KLConfig(where="loss", coef=1e-4)))
    PPOConfig(algo=PPOAlgoConfig(value_clip=None, lam=0.0, kl=KLConfig(where="reward", kind="k1")))
    PPOConfig(algo=PPOAlgoConfig(kl=KLConfig(where="loss", kind="abs")))
