"""OREO's step equals a straight line over padded batches, however it is cut; the reference's cache; what the regulariser is for."""

import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from openrl_reason.algorithms.oreo import OREOAlgoConfig, OREOConfig, OREOKLConfig, OREOTrainer
from openrl_reason.algorithms.oreo_losses import auc, explicit_advantages, offline_metrics, oreo_batch
from openrl_reason.algorithms.reference_cache import ReferenceCache
from openrl_reason.core.batch import TokenBatch
from openrl_reason.core.kl import DualKL
from openrl_reason.core.losses import oreo_policy_loss, oreo_value_loss
from openrl_reason.core.states import state_mask
from openrl_reason.core.trajectory import Trajectory
from openrl_reason.data.offline_config import OfflineDataConfig
from openrl_reason.errors import CheckpointError, ConfigError, DataError
from openrl_reason.workers.model_config import LoraConfig, ScalarModelConfig, TrainedModelConfig
from openrl_reason.workers.model_worker import ModelWorker
from tests.algorithms.oreo_reference import LocalGroup, MemoryStore, Settings, StraightLine
from tests.helpers_models import VOCAB, write_tiny_model


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("oreo") / "m", tied=False)


def responses(count=12, seed=0):
    """Random responses of a few steps each, half of them right."""
    rng, found = np.random.default_rng(seed), []
    for number in range(count):
        prompt, length = rng.integers(2, VOCAB, rng.integers(2, 6)), int(rng.integers(3, 10))
        steps = np.sort(rng.integers(0, 3, length))
        steps = np.unique(steps, return_inverse=True)[1]
        found.append(
            Trajectory.from_completion(
                prompt, rng.integers(2, VOCAB, length), None, task_id=f"q{number}", group_id=f"q{number}", sample_index=0, step_ids=steps,
                reward=float(number % 2),
            )  # fmt: skip
        )
    return found


def make_trainer(path, tmp_path, trajectories, *, cut=None, colocate=True, cache="none", **algo):
    policy = TrainedModelConfig(path=path, dtype="float32", lr=0.003, schedule="constant", warmup_ratio=0.0, zero_stage=0)
    critic = ScalarModelConfig(path=path, dtype="float32", lr=0.003, schedule="constant", warmup_ratio=0.0, zero_stage=0)
    config = OREOConfig(data=OfflineDataConfig(path=("given",)), algo=OREOAlgoConfig(**algo), policy=policy, critic=critic)
    config = dataclasses_replace(config, **{"run.output_dir": str(tmp_path), "placement.colocate": colocate, "reference.cache": cache})
    store = MemoryStore(trajectories)
    trainer = OREOTrainer(config, store=store)
    trainer.store, trainer._frozen_steps = store, 0
    only_run = config.algo.critic_only
    trainer.policy = LocalGroup(ModelWorker(policy, total_steps=None if only_run else 100, role="policy"), cut)
    trainer.critic = LocalGroup(ModelWorker(critic, total_steps=100, role="critic"), cut)
    if config.algo.ema_decay and not only_run:
        trainer.policy.start_average(config.algo.ema_decay)
    rows = np.arange(len(store))
    trainer.reference.prepare(store, rows, tmp_path / "reference")
    trainer.reference._policy = trainer.policy
    if trainer.reference.cache is None:
        trainer.reference.group = LocalGroup(ModelWorker(trainer.reference.model_config(), role="reference"))
        if trainer.reference.exact:
            trainer.policy.set_reference_head(trainer.reference.path, trainer.reference.direction)
    else:
        trainer.reference.build(trainer.policy, rows, None, None, seed=0)
    return trainer


def dataclasses_replace(config, **changes):
    from dataclasses import replace

    for name, value in changes.items():
        section, key = name.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{key: value})})
    return config


def train(trainer, num_steps=3, batch_size=6):
    history = []
    for step in range(num_steps):
        rows = [(step * batch_size + place) % len(trainer.store) for place in range(batch_size)]
        history.append(trainer.update(trainer.next_batch(rows, trainer.store.trajectories(rows)))[0])
    return history


def train_straight(path, trajectories, num_steps=3, batch_size=6, **settings):
    line, history = StraightLine(path, Settings(**settings)), []
    level = settings.get("level", "token")
    for step in range(num_steps):
        part = [trajectories[(step * batch_size + place) % len(trajectories)] for place in range(batch_size)]
        states = [state_mask(t, "step" if level == "step" else "token").tolist() for t in part]
        history.append(
            line.step([t.token_ids.tolist() for t in part], [t.action_mask.tolist() for t in part], states, [float(t.reward) for t in part])
        )
    return line, history


NAMES = ("train/policy_loss", "train/kl", "critic/value_loss")
CASES = [
    dict(level="token"),
    dict(level="step", padding="left"),
    dict(level="response"),
    dict(level="no_stop_gradient", padding="left", kl_kind="forward"),
    dict(level="token", kl_kind="k3", importance=True),
    dict(level="token", ema_decay=0.5),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
@pytest.mark.parametrize("cut", [None, 2])
def test_a_step_equals_the_straight_line_however_the_batch_is_cut(path, tmp_path, case, cut):
    trajectories = responses()
    line, expected = train_straight(path, trajectories, **case)
    kl = OREOKLConfig(kind=case.get("kl_kind", "exact"), coef=0.1)
    extra = {name: case[name] for name in ("importance", "ema_decay") if name in case}
    trainer = make_trainer(path, tmp_path, trajectories, cut=cut, level=case["level"], beta=0.3, kl=kl, **extra)
    history = train(trainer)
    for found, wanted in zip(history, expected, strict=True):
        assert {name: found[name] for name in NAMES} == pytest.approx(wanted, rel=2e-4, abs=1e-6)
    for ours, theirs in ((trainer.policy.worker.model.model, line.policy), (trainer.critic.worker.model.model, line.critic)):
        for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            # Adam's first steps are as large for a gradient of rounding noise as for any other, so single entries may part.
            assert (parameter.detach() - other.detach()).abs().double().mean() < 5e-6, name


def test_both_models_at_once_learn_what_one_after_the_other_does(path, tmp_path):
    results = [train(make_trainer(path, tmp_path / str(colocate), responses(), colocate=colocate, beta=0.3)) for colocate in (True, False)]
    for one, other in zip(*results, strict=True):
        assert {name: one[name] for name in NAMES} == pytest.approx({name: other[name] for name in NAMES}, rel=1e-5)


@pytest.mark.parametrize("kind", ["exact", "k3"])
def test_what_is_read_from_the_cache_is_what_the_reference_says(path, tmp_path, kind):
    kl = OREOKLConfig(kind=kind, coef=0.1)
    cached, live = (make_trainer(path, tmp_path / cache, responses(), cache=cache, kl=kl) for cache in ("auto", "none"))
    rows = [3, 0, 7]
    batches = [trainer.next_batch(rows, trainer.store.trajectories(rows)) for trainer in (cached, live)]
    names = ["ref_logprobs", *(["ref_hidden"] if kind == "exact" else [])]
    for name in names:
        assert torch.equal(batches[0].tokens[name], batches[1].tokens[name]), name
    for one, other in zip(train(cached), train(live), strict=True):
        assert {name: one[name] for name in NAMES} == {name: other[name] for name in NAMES}
    assert not len(cached.reference.cache.missing(np.arange(12)))


def test_at_the_start_values_are_zero_residuals_minus_the_reward_and_kl_zero(path, tmp_path):
    trainer = make_trainer(path, tmp_path, responses(), beta=0.03)
    rows = list(range(12))
    batch = trainer.next_batch(rows, trainer.store.trajectories(rows))
    metrics, logprobs, values = trainer.update(batch)
    assert not values.any() and metrics["critic/value_loss"] == pytest.approx(0.5) and metrics["train/policy_loss"] == pytest.approx(0.5)
    assert metrics["train/kl"] == pytest.approx(0, abs=1e-6)
    told = offline_metrics(batch, logprobs, values, 0.03)
    assert told["offline/residual_mean"] == pytest.approx(-float(batch.sequences["rewards"][batch.sequence_ids][batch.action_mask].mean()), abs=1e-6)
    assert told["offline/value_auc"] == 0.5 and told["offline/log_ratio_median_right"] == pytest.approx(0, abs=1e-5)


def test_frozen_steps_and_critic_only_leave_the_policy_alone(path, tmp_path):
    trainer = make_trainer(path, tmp_path, responses(), critic_only=True, ema_decay=0.9)
    before = [p.clone() for p in trainer.policy.worker.model.parameters()]
    history = train(trainer)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.policy.worker.model.parameters(), strict=True))
    assert history[-1]["train/policy_frozen"] == 1.0 and "train/policy_loss" not in history[-1]
    trainer = make_trainer(path, tmp_path / "frozen", responses(), freeze_ratio=0.5)
    trainer._frozen_steps, trainer.done = 2, 1
    assert "train/policy_loss" not in train(trainer, 1)[0]
    trainer.done = 2
    assert "train/policy_loss" in train(trainer, 1)[0]
    trainer.loader = SimpleNamespace(identity="the same")
    longer = make_trainer(path, tmp_path / "longer", responses(), freeze_ratio=0.5)  # resumed with more epochs
    longer.loader, longer._frozen_steps = trainer.loader, 20
    longer.load_state(trainer.state())
    assert longer._frozen_steps == 2


def test_lora_scores_its_own_reference_and_needs_no_group(path, tmp_path):
    config = OREOConfig(
        data=OfflineDataConfig(path=("given",)), policy=TrainedModelConfig(path=path, dtype="float32", lora=LoraConfig(rank=2)),
        critic=ScalarModelConfig(path=path, dtype="float32"), reference=dataclasses_replace(OREOConfig(), **{"reference.cache": "none"}).reference,
    )  # fmt: skip
    trainer = OREOTrainer(config, store=MemoryStore(responses()))
    assert [role.num_actors for role in trainer.roles() if role.name == "reference"] == [0]
    trainer.store = trainer._given
    trainer.policy = LocalGroup(ModelWorker(config.policy, total_steps=10))
    trainer.reference.prepare(trainer.store, np.arange(12), tmp_path)
    trainer.reference.build(trainer.policy, np.arange(12), None, None, seed=0)
    batch = trainer.next_batch([0, 1], trainer.store.trajectories([0, 1]))
    assert batch.tokens["ref_hidden"].shape == (batch.num_tokens, 32) and batch.tokens["ref_logprobs"].any()


# ---- the cache ---------------------------------------------------------------------------------------------------------------------------


def test_another_model_or_other_data_get_another_cache_and_damage_is_noticed(tmp_path):
    lengths = np.array([3, 4])
    cache = ReferenceCache(tmp_path, {"model": "a", "data": "x"}, lengths)
    batch = TokenBatch.from_trajectories([
        Trajectory.from_completion([1], [2, 3], None, task_id="", group_id="", sample_index=0),
        Trajectory.from_completion([1, 2], [3, 4], None, task_id="", group_id="", sample_index=0),
    ])
    cache.write([0, 1], batch, {"logprobs": torch.arange(7.0)})
    again = ReferenceCache(tmp_path, {"model": "a", "data": "x"}, lengths)
    assert not len(again.missing([0, 1]))
    assert again.read([1, 0], batch.select([1, 0]))["ref_logprobs"].tolist() == [0, 0, 5, 6, 0, 1, 2]
    for key in ({"model": "b", "data": "x"}, {"model": "a", "data": "y"}):
        assert len(ReferenceCache(tmp_path, key, lengths).missing([0, 1])) == 2
    (cache.folder / "logprobs.bin").write_bytes(b"short")
    with pytest.raises(DataError, match="logprobs.bin has 5 bytes where 28 are due"):
        ReferenceCache(tmp_path, {"model": "a", "data": "x"}, lengths)
    (cache.folder / "logprobs.bin").unlink()
    with pytest.raises(DataError, match="logprobs.bin is not there, where 28 are due"):
        ReferenceCache(tmp_path, {"model": "a", "data": "x"}, lengths)
    (cache.folder / "manifest.json").unlink()  # as if it was killed while it made its files
    (cache.folder / "logprobs.bin").touch()
    assert len(ReferenceCache(tmp_path, {"model": "a", "data": "x"}, lengths).missing([0, 1])) == 2
    (cache.folder / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="not that of this model"):
        ReferenceCache(tmp_path, {"model": "a", "data": "x"}, lengths)


def test_rows_that_were_written_before_a_kill_are_kept_and_bfloat16_survives(tmp_path):
    lengths, key = np.array([3, 4]), {"model": "a"}
    cache = ReferenceCache(tmp_path, key, lengths, hidden_size=2, dtype="bfloat16")
    t = Trajectory.from_completion([1], [2, 3], None, task_id="", group_id="", sample_index=0)
    batch = TokenBatch.from_trajectories([t])
    hidden = torch.randn(3, 2).bfloat16() * batch.action_mask[:, None]
    cache.write([0], batch, {"logprobs": torch.zeros(3), "hidden": hidden})
    again = ReferenceCache(tmp_path, key, lengths, hidden_size=2, dtype="bfloat16")
    assert again.missing([0, 1]).tolist() == [1]
    assert torch.equal(again.read([0], batch)["ref_hidden"], hidden)


def test_a_disk_that_is_too_small_is_refused_at_once(tmp_path):
    with pytest.raises(ConfigError, match="--reference.cache_dir"):
        ReferenceCache(tmp_path, {}, np.array([2**40]), hidden_size=4096)


# ---- the regulariser and its controller --------------------------------------------------------------------------------------------------


def train_on_incomplete_data(alpha, value=0.0, num_steps=400, start=(0.0, 0.0, 0.0), policy_sees="before"):
    """Three actions, of which the data hold two (rewards -1 and 1), from a policy with logits ``start`` and a critic that says ``value``.

    The policy's loss takes the values from before the critic's step, as this library does, or ``after`` it, as the toy of OREO's authors does.
    """
    logits = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    value = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    policy_optimizer, value_optimizer = torch.optim.Adam([logits], lr=0.1), torch.optim.Adam([value], lr=0.01)
    cu_seqlens, mask, reference = torch.tensor([0, 1, 2]), torch.tensor([True, True]), torch.full((3,), 1 / 3, dtype=torch.float64).log()
    arguments = (torch.tensor([-1.0, 1.0]), mask, mask, cu_seqlens)
    for _ in range(num_steps):
        policy, before = logits.log_softmax(-1), value.detach().clone()
        value_loss, _ = oreo_value_loss(value.expand(2), policy.detach()[:2], reference[:2], *arguments, beta=0.1)
        value_optimizer.zero_grad()
        value_loss.backward()
        value_optimizer.step()
        seen = before if policy_sees == "before" else value.detach()
        policy_loss, _ = oreo_policy_loss(policy[:2], reference[:2], seen.expand(2), *arguments, beta=0.1, level="token")
        policy_optimizer.zero_grad()
        (policy_loss + alpha * (policy.exp() * (policy - reference)).sum()).backward()
        policy_optimizer.step()
    return value.item(), logits.detach().softmax(-1).tolist(), policy_loss.item()


def test_without_the_regulariser_the_action_that_nobody_took_wins_and_the_value_climbs_with_it_they_do_not():
    """A policy that lags behind the critic: V passes every reward and goes on, the unseen action takes all probability, and the loss says 0."""
    value, chances, loss = train_on_incomplete_data(0.0, policy_sees="after")
    assert value > 3 and chances[2] > 0.999 and loss < 1e-3, (value, chances, loss)
    value, chances, loss = train_on_incomplete_data(0.0, num_steps=1000, policy_sees="after")
    assert value > 9.5 and chances[2] > 0.999 and loss < 1e-3, (value, chances, loss)
    for policy_sees in ("before", "after"):
        value, chances, loss = train_on_incomplete_data(0.01, policy_sees=policy_sees)
        assert value == pytest.approx(0.96, abs=0.01) and chances == pytest.approx([0.0, 0.5, 0.5], abs=0.02), (policy_sees, value, chances)


def test_values_from_before_the_critic_step_stop_the_climb_but_do_not_undo_it():
    """Every V from 1 - beta log 3 = 0.89 on solves the equations of the two actions taken, with the rest of the probability on the third."""
    value, chances, loss = train_on_incomplete_data(0.0, num_steps=1000)
    assert value == pytest.approx(0.890, abs=0.002) and chances[2] < 0.01 and loss < 1e-4, (value, chances, loss)
    for alpha in (0.0, 0.01):  # from where it has climbed to: kept, on an action that nobody took; the regulariser prevents it, and hardly undoes it
        value, chances, loss = train_on_incomplete_data(alpha, 3.0, 600)
        assert value > 1.2 and chances[2] > 0.95 and loss < 1e-4, (alpha, value, chances, loss)
    # Even so far from all rewards nothing pulls back: V = 9.5 and a policy that takes neither action solve them exactly.
    far = [(reward - 9.5) / 0.1 for reward in (-1.0, 1.0)]
    value, chances, loss = train_on_incomplete_data(0.0, 9.5, start=(*far, math.log(3)))
    assert value == pytest.approx(9.5, abs=1e-6) and chances[2] == pytest.approx(1.0) and loss < 1e-12, (value, chances, loss)


def test_the_weight_of_the_kl_rises_above_the_target_falls_below_it_and_resumes():
    controller = DualKL(0.01, target=0.05, lr=0.1)
    for _ in range(5):
        controller.update(0.2)
    high = controller.coefficient
    assert high == pytest.approx(0.01 * np.exp(0.5), rel=1e-3)
    controller.update(float("nan"))
    assert controller.coefficient == high
    again = DualKL(1.0, target=0.05, lr=0.1)
    again.load_state_dict(controller.state_dict())
    for _ in range(200):
        controller.update(0.0), again.update(0.0)
    assert again.coefficient == controller.coefficient < 0.01


# ---- diagnostics -------------------------------------------------------------------------------------------------------------------------


def test_auc_counts_pairs_and_halves_ties():
    rng = np.random.default_rng(0)
    right, wrong = torch.from_numpy(rng.integers(0, 5, 30)).double(), torch.from_numpy(rng.integers(0, 5, 17)).double()
    pairs = [(a > b) + 0.5 * (a == b) for a in right.tolist() for b in wrong.tolist()]
    assert auc(right, wrong) == pytest.approx(sum(pairs) / len(pairs))
    assert np.isnan(auc(right, wrong[:0]))


def test_diagnostics_have_the_same_names_whatever_the_batch_holds_and_agree_at_the_optimum():
    trajectories = responses()
    reference = torch.zeros(sum(t.num_tokens for t in trajectories))
    batch = oreo_batch(TokenBatch.from_trajectories(trajectories), torch.tensor([float(n % 2) for n in range(12)]), "step")
    batch = batch.with_tokens(ref_logprobs=reference)
    logprobs = torch.randn(len(reference), generator=torch.Generator().manual_seed(0)) * 0.1
    # The value that makes every residual zero: V = R - beta sum of what follows.
    from openrl_reason.core.segments import reverse_cumsum

    optimum = batch.tokens["returns"] - 0.3 * reverse_cumsum(torch.where(batch.action_mask, logprobs, 0.0), batch.cu_seqlens)
    told = offline_metrics(batch, logprobs, optimum, 0.3)
    assert told["offline/residual_abs"] < 1e-5 and told["offline/advantage_correlation"] == pytest.approx(1, abs=1e-6)
    assert told["offline/advantage_implicit_std"] == pytest.approx(told["offline/advantage_explicit_std"], rel=1e-4)
    assert told["offline/value_auc"] > 0.99
    shown, states = explicit_advantages(batch, optimum), batch.tokens["states"]
    for b in range(12):  # a step's tokens share its advantage, and the advantages of a response add up to R - V of its first state
        inside = (batch.sequence_ids == b) & states
        first = int(inside.nonzero()[0])
        assert float(shown[inside].sum()) == pytest.approx(float(batch.sequences["rewards"][b] - optimum[first]), abs=1e-5)
        own = (batch.sequence_ids == b) & (batch.step_ids == 0)
        assert shown[own].unique().numel() == 1
    only_right = batch.select([1, 3])
    names = offline_metrics(only_right, logprobs[only_right.token_ids * 0], only_right.tokens["returns"], 0.3)
    assert names.keys() == told.keys() and np.isnan(names["offline/value_auc"])


@pytest.mark.parametrize("change, message", [
    (dict(level="word"), "algo.level"), (dict(beta=0.0), "algo.beta"), (dict(freeze_ratio=1.0), "critic_only"), (dict(ema_decay=1.0), "ema_decay"),
    (dict(average="token"), "algo.average"), (dict(kl=OREOKLConfig(kind="none", target=0.1)), "algo.kl.target"),
    (dict(right_threshold=math.nan), "right_threshold"),
    (dict(kl=OREOKLConfig(kind="k4")), "algo.kl.kind"), (dict(clip_log_ratio=0.0), "clip_log_ratio"),
])  # fmt: skip
def test_settings_that_cannot_work_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        OREOConfig(algo=OREOAlgoConfig(**change))


def test_an_exact_kl_without_hidden_states_is_refused():
    with pytest.raises(ConfigError, match="reference.cache.*hidden states"):
        dataclasses_replace(OREOConfig(), **{"reference.cache": "logprobs"})


def test_a_resumed_run_takes_a_fixed_coefficient_from_its_flag_and_an_adapted_one_from_the_state(path, tmp_path):
    def make(name, **kl):
        trainer = make_trainer(path, tmp_path / name, responses(), kl=OREOKLConfig(**kl))
        trainer.loader = SimpleNamespace(identity="the same")
        return trainer

    fixed, other, adapted, again = make("a", coef=0.1), make("b", coef=0.3), make("c", coef=0.3, target=0.01), make("d", coef=0.3, target=0.01)
    other.load_state(fixed.state())
    assert other.kl.coefficient == 0.3
    adapted.load_state(fixed.state())
    assert adapted.kl.coefficient == pytest.approx(0.3)
    adapted.kl.update(1.0)
    again.load_state(adapted.state())
    assert again.kl.coefficient == adapted.kl.coefficient != 0.3


def test_a_reference_with_another_tokenizer_is_refused(path, tmp_path):
    from openrl_reason.algorithms.common import check_reference
    from openrl_reason.errors import DataError
    from openrl_reason.models.loading import load_tokenizer

    tokenizer = load_tokenizer(str(path))
    check_reference(str(path), tokenizer, 32, flag="reference.path")
    vocabulary = dict(tokenizer.get_vocab())
    one, two = [token for token, number in vocabulary.items() if number in (6, 7)]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    other = type("Other", (), {"get_vocab": lambda self: vocabulary})()
    with pytest.raises(DataError, match="--reference.path .* has another tokenizer than the policy .they differ at id 6"):
        check_reference(str(path), other, 32, flag="reference.path")


@pytest.mark.parametrize("trajectories, counts", [([], "'rows': 0"), (responses(4), "'without_reward': 4")])
def test_data_without_a_rewarded_response_are_refused_with_their_counts(path, trajectories, counts):
    store = MemoryStore(trajectories)
    store.has_reward[:] = False
    config = OREOConfig(data=OfflineDataConfig(path=("given",)), policy=TrainedModelConfig(path=path), critic=ScalarModelConfig(path=path))
    with pytest.raises(DataError, match=f"no responses to learn from.*{counts}"):
        OREOTrainer(config, store=store).prepare()


def prepared(path, tmp_path, **settings):
    config = OREOConfig(data=OfflineDataConfig(path=("given",)), policy=TrainedModelConfig(path=str(path)), critic=ScalarModelConfig(path=str(path)))
    config = dataclasses_replace(config, **{"run.output_dir": str(tmp_path / "run")} | settings)
    trainer = OREOTrainer(config, store=MemoryStore(responses()))
    trainer.prepare()
    return trainer


def test_a_run_does_not_go_on_against_another_reference(path, tmp_path):
    """Also where the path is the same, or empty: what counts is the model behind it."""
    state = prepared(path, tmp_path).state()
    other = write_tiny_model(tmp_path / "other", tied=False, seed=1)
    with pytest.raises(CheckpointError, match=r"against another reference.*reference was '\w{16} \(1 files\)' and is '\w{16}"):
        prepared(other, tmp_path).load_state(state)
    moved = tmp_path / "moved"
    shutil.copytree(path, moved)
    prepared(moved, tmp_path).load_state(state)


def test_which_responses_are_right_can_be_said(path, tmp_path):
    """Partial credit, say for a format, is a positive reward of a wrong answer."""
    trainer = prepared(path, tmp_path)
    trainer.store.rewards[:] = [0.1, 1.0] * 6
    trainer.store.labels[:] = True
    assert trainer.right(np.arange(12)).all()
    trainer = prepared(path, tmp_path, **{"algo.right_threshold": 1.0})
    trainer.store.rewards[:], trainer.store.labels[:] = [0.1, 1.0] * 6, True
    assert trainer.right(np.arange(12)).tolist() == [False, True] * 6
