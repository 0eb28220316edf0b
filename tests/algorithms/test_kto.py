"""KTO on labelled responses: one reference point for the whole batch, so the gradient is the batch's, however it is cut."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from openrl_reason.algorithms.kto import (
    KTOConfig,
    KTOLossConfig,
    KTOTrainer,
    LabelLoss,
    counts_of,
    describe_balance,
    labels_of,
    mismatched,
    other_questions,
)
from openrl_reason.algorithms.reference_scores import response_logprobs
from openrl_reason.algorithms.trainer import RunConfig
from openrl_reason.core.batch import TokenBatch, unsplit_tokens
from openrl_reason.core.losses import kto_loss
from openrl_reason.core.trajectory import Trajectory
from openrl_reason.data.offline_config import OfflineDataConfig
from openrl_reason.errors import CheckpointError, ConfigError, DataError
from openrl_reason.models.policy import ModelOutput
from openrl_reason.workers.model_config import TrainedModelConfig
from openrl_reason.workers.model_group import ModelGroup
from openrl_reason.workers.model_worker import ModelWorker
from tests.algorithms.kto_helpers import Responses
from tests.helpers_models import first_moments, write_tiny_model


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def worker_at(path, **settings):
    settings = dict(dtype="float32", lr=1e-2, warmup_ratio=0.0, schedule="constant") | settings
    return ModelWorker(TrainedModelConfig(path=path, **settings), total_steps=8)


def planned(batch, num_ranks, max_tokens):
    """The micro-batches of a group of that many ranks, rank after rank; no actor is started."""
    group = SimpleNamespace(num_ranks=num_ranks, config=SimpleNamespace(tokens_per_micro_batch=max_tokens))
    return [micro for rank in ModelGroup._plan(group, batch) for micro in rank]


def labelled_batch(store, worker=None):
    """The store's rows with the log-probs of a reference that the policy has left: those of ``worker``, moved at random."""
    batch = TokenBatch.from_trajectories(store.trajectories(range(len(store))))
    sums = response_logprobs(worker.logprobs([batch])[0]["logprobs"], batch) if worker else torch.zeros(len(store))
    moved = sums + torch.randn(len(store), generator=torch.Generator().manual_seed(1))
    return batch.with_sequences(ref_logprobs=moved, desirable=torch.from_numpy(store.labels.astype(np.float32)))


# ---- the loss ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [KTOLossConfig(), KTOLossConfig(beta=0.4, undesirable_weight=1.2, temperature=0.7)], ids=["plain", "weighted"])
def test_gradient_and_metrics_do_not_depend_on_micro_batches_packing_or_ranks(path, loss):
    store = Responses()
    batch, counts = labelled_batch(store, worker_at(path)), counts_of(store.labels)
    results = []
    for num_ranks, max_tokens in ((1, 10_000), (1, 70), (1, 1), (2, 70), (4, 90), (5, 10_000)):  # the last: ranks without a sequence
        worker = worker_at(path)
        plan = planned(batch, num_ranks, max_tokens)
        metrics = worker.update(batch.split(plan), LabelLoss(loss, 0.8), counts, temperature=loss.temperature)
        results.append((first_moments(worker), metrics, len(plan)))
    assert results[0][2] == 1 < results[1][2] < results[2][2] == len(store)
    gradient, metrics, _ = results[0]
    for other, other_metrics, _ in results[1:]:
        assert (other - gradient).norm() <= 1e-6 * gradient.norm()
        for name in ("train/loss", "kto/reward_desirable", "kto/reward_undesirable", "kto/accuracy", "kto/desirable_share", "grad_norm"):
            assert math.isclose(metrics[name], other_metrics[name], rel_tol=1e-5, abs_tol=1e-7), name


def test_a_dummy_is_no_undesirable_response(path):
    store = Responses(2)
    batch, moments = labelled_batch(store, worker_at(path)), []
    for pieces in ([batch], [batch, batch.empty_like_dummy()]):
        worker = worker_at(path)
        metrics = worker.update(pieces, LabelLoss(KTOLossConfig(), 0.5), counts_of(store.labels))
        moments.append((first_moments(worker), metrics["train/loss"]))
    assert torch.equal(moments[0][0], moments[1][0]) and moments[0][1] == moments[1][1]


def test_the_loss_is_kto_loss_of_the_response_sums_and_rewards_are_means_over_their_label():
    store = Responses(3)
    batch = labelled_batch(store)
    logprobs = -torch.rand(batch.num_tokens, generator=torch.Generator().manual_seed(0))
    edges = batch.cu_seqlens.tolist()
    sums = torch.tensor([float(logprobs[a:b][batch.action_mask[a:b]].sum()) for a, b in zip(edges, edges[1:], strict=False)])
    good, ref = torch.from_numpy(store.labels), batch.sequences["ref_logprobs"]
    loss, metrics = LabelLoss(KTOLossConfig(beta=0.3), 0.4)(ModelOutput(logprobs, None), batch, counts_of(store.labels))
    torch.testing.assert_close(loss, kto_loss(sums, ref, good, beta=0.3, reference_point=0.4)[0])
    torch.testing.assert_close(metrics["kto/reward_desirable"], 0.3 * (sums - ref)[good].mean())
    torch.testing.assert_close(metrics["kto/reward_undesirable"], 0.3 * (sums - ref)[~good].mean())
    assert metrics["train/loss"] == loss
    alone = batch.select(np.flatnonzero(store.labels))
    metrics = LabelLoss(KTOLossConfig(), 0.0)(ModelOutput(torch.zeros(alone.num_tokens), None), alone, counts_of(store.labels[store.labels]))[1]
    assert metrics["kto/reward_undesirable"].isnan() and metrics["kto/reward_desirable"].isfinite()


def test_prompt_tokens_are_not_scored():
    batch = labelled_batch(Responses(2))
    logprobs = torch.where(batch.action_mask, -1.0, float("nan")).requires_grad_()
    loss, _ = LabelLoss(KTOLossConfig(), 0.1)(ModelOutput(logprobs, None), batch, counts_of(Responses(2).labels))
    loss.backward()
    assert math.isfinite(float(loss.detach())) and (logprobs.grad[~batch.action_mask] == 0).all() and (logprobs.grad[batch.action_mask] != 0).all()


def test_perturbed_logits_at_prompt_tokens_change_neither_loss_nor_reference_point(path):
    """The logits themselves, before log-probs are taken of them: those that predict prompt tokens are replaced by noise."""
    from transformers import AutoModelForCausalLM

    store = Responses(3)
    model, batch, results = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), labelled_batch(store), []
    for noise in (0.0, 50.0):
        logprobs = torch.zeros(batch.num_tokens)
        for start, end in zip(batch.cu_seqlens.tolist(), batch.cu_seqlens.tolist()[1:], strict=False):
            with torch.no_grad():
                logits = model(batch.token_ids[None, start:end]).logits[0]
            predicts_prompt = torch.cat([~batch.action_mask[start + 1 : end], torch.tensor([True])])
            logits = logits + noise * predicts_prompt[:, None] * torch.randn(logits.shape, generator=torch.Generator().manual_seed(start))
            logprobs[start + 1 : end] = logits[:-1].log_softmax(-1).gather(1, batch.token_ids[start + 1 : end, None])[:, 0]
        loss, _ = LabelLoss(KTOLossConfig(), 0.1)(ModelOutput(logprobs, None), batch, counts_of(store.labels))
        results.append((loss, response_logprobs(logprobs, batch)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


# ---- responses to other questions ------------------------------------------------------------------------------------------------------------


def test_every_partner_answers_another_question_and_all_of_them_are_drawn():
    store = Responses(4, 5)
    rows, drawn = np.arange(len(store)), set()
    for seed in range(200):
        partners = other_questions(rows, rows, store.questions, seed)
        assert (store.questions[partners] != store.questions[rows]).all()
        drawn |= set(zip(rows.tolist(), partners.tolist(), strict=True))
    assert len(drawn) == 20 * 15
    assert np.array_equal(partners, other_questions(rows, rows, store.questions, 199))
    uneven = np.array([0] * 9 + [7])  # nine responses to one question, one to another
    assert other_questions(np.arange(10), np.arange(10), uneven, 0).tolist()[:9] == [9] * 9
    assert set(other_questions(np.array([0, 1]), np.array([9]), uneven, 0)) == {9}, "held-out rows take training rows"
    with pytest.raises(ConfigError, match="--loss.z0 is 'mismatched': .*two questions.*batch or zero"):
        other_questions(np.arange(3), np.arange(3), uneven, 0)


def test_a_mixture_is_the_prompt_of_one_and_the_response_of_the_other_observations_and_all():
    row = Trajectory.from_completion([3, 4, 5], [6, 7], None, task_id="a", group_id="a", sample_index=0)
    other = Trajectory(
        "id", "b", "b", token_ids=[9, 10, 11, 12, 13], action_mask=[0, 1, 0, 1, 1], step_ids=[-1, 0, -1, 1, 1], behaviour_logprobs=[np.nan] * 5,
        rewards=[0, 1],
    )  # fmt: skip
    mixture = mismatched(row, other, 100)
    assert mixture.token_ids.tolist() == [3, 4, 5, 10, 11, 12, 13] and mixture.action_mask.tolist() == [False] * 3 + [True, False, True, True]
    assert mixture.task_id == "a" and mixture.trajectory_id not in (row.trajectory_id, other.trajectory_id)
    cut = mismatched(row, other, 5)
    assert cut.token_ids.tolist() == [3, 4, 5, 10, 11] and cut.num_actions == 1


# ---- labels ----------------------------------------------------------------------------------------------------------------------------------


def test_labels_come_from_rewards_and_a_threshold_or_from_the_data():
    store = Responses(2)
    store.rewards = np.array([0.1, 0.5, 0.6, -1.0, 0.49, 1.0], np.float32)
    store.has_reward[2] = False
    known, desirable = labels_of(store, 0.5)
    assert known.tolist() == [True, True, False, True, True, True] and desirable.tolist() == [False, True, True, False, False, True]
    store.kind = "pairs"
    known, desirable = labels_of(store, 0.5)
    assert known.all() and np.array_equal(desirable, store.labels)
    store.kind = "sft"
    with pytest.raises(DataError, match="kind 'sft'.*labels or pairs"):
        labels_of(store, 0.5)


@pytest.mark.parametrize(
    ("counts", "weights", "ratio", "advice"),
    [
        ((40, 30), (1.0, 1.0), "1.33", None),
        ((30, 30), (1.0, 1.0), "1 ", None),
        ((10, 40), (1.0, 1.0), "0.25", "--loss.desirable_weight between 4 and 5.33"),
        ((80, 20), (1.0, 1.0), "4", "--loss.undesirable_weight between 3 and 4"),
        ((80, 20), (1.0, 3.5), "1.14", None),
        ((5, 20), (2.0, 0.0), "inf", "--loss.undesirable_weight between 0.375 and 0.5"),
    ],
)
def test_the_balance_of_the_labels_is_told_and_the_weight_that_mends_it(counts, weights, ratio, advice):
    loss = KTOLossConfig(desirable_weight=weights[0], undesirable_weight=weights[1])
    line = describe_balance(*counts, loss)
    assert f"they are {ratio}" in line and ("WARNING" in line) is (advice is not None)
    if advice:
        assert advice in line
        name, low, high = advice.removeprefix("--loss.").split()[0], *map(float, advice.split()[-3::2])
        for value in (low + 0.01, high - 0.01):
            assert "WARNING" not in describe_balance(*counts, replace(loss, **{name: value}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KTOLossConfig(beta=0.0), "--loss.beta is 0.0"),
        (lambda: KTOLossConfig(z0="mismatchd"), r"--loss.z0 is 'mismatchd'.*did you mean 'mismatched'"),
        (lambda: KTOLossConfig(undesirable_weight=-1.0), "--loss.undesirable_weight is -1.0"),
        (lambda: KTOConfig(epochs=0), "--epochs is 0"),
        (lambda: KTOConfig(label_threshold=float("nan")), "--label_threshold is nan"),
        (lambda: KTOTrainer(KTOConfig()), "--data.path is ''"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


# ---- the driver, its group of ranks being one worker in this process -----------------------------------------------------------------------


class Group:
    """A model group of one rank, without an actor."""

    def __init__(self, worker, max_tokens=200):
        self.worker, self.max_tokens, self.scored = worker, max_tokens, []

    def logprobs(self, batch, **kwargs):
        self.scored.append(batch.num_sequences)
        plan = planned(batch, 1, self.max_tokens)
        pieces = [piece["logprobs"] for piece in self.worker.logprobs(batch.split(plan), **kwargs)]
        return {"logprobs": unsplit_tokens(pieces, plan, batch)}

    def update(self, batch, loss, denominators, **kwargs):
        return self.worker.update(batch.split(planned(batch, 1, self.max_tokens)), loss, denominators, **kwargs)


def trainer_on(path, folder, store, *, resume=False, max_tokens=200, **settings):
    settings = dict(batch_size=5, epochs=2, data=OfflineDataConfig(max_length=64)) | settings
    run = RunConfig(output_dir=str(folder), steps=1000, resume=resume)
    trainer = KTOTrainer(KTOConfig(run=run, policy=TrainedModelConfig(path=path), **settings), store=store)
    trainer.prepare()
    trainer.policy = Group(worker_at(path), max_tokens)
    trainer.folder.mkdir(exist_ok=True)
    trainer.reference = trainer.read_or_score_reference()
    return trainer


def some_steps(trainer, count):
    history = []
    for _ in range(count):
        history.append({name: value for name, value in trainer.step().items() if not name.startswith(("timing/", "perf/"))})
        trainer.done += 1
    return history


@pytest.mark.parametrize("z0", ["mismatched", "batch", "zero"])
def test_a_run_begins_at_its_reference_and_parts_the_labels(path, tmp_path, z0):
    trainer = trainer_on(path, tmp_path, Responses(10), eval_fraction=0.2, loss=KTOLossConfig(beta=0.3, z0=z0))
    assert trainer.run.steps == 10 and len(trainer.rows) == 24 and len(trainer.held_out) == 6  # 48 positions by 5
    before = trainer.evaluate()
    assert before["eval/loss"] == pytest.approx(0.5, abs=1e-4) and before["eval/reward_margin"] == pytest.approx(0.0, abs=1e-4)
    history = some_steps(trainer, 10)
    assert history[0]["train/loss"] == pytest.approx(0.5, abs=1e-4) and history[-1]["kto/reward_margin"] > 1.0
    assert history[-1]["train/loss"] < 0.45 and trainer.evaluate().keys() == before.keys()
    assert ("kto/kl" in history[0]) is (z0 != "zero")
    if z0 != "zero":
        assert history[0]["kto/kl"] == pytest.approx(0.0, abs=1e-4) and abs(history[-1]["kto/kl"]) > 1e-3
    assert [len(trainer.loader.rows(step)) for step in (8, 9, 10)] == [5, 3, 0]
    trainer.loader.close()


def test_steps_of_the_driver_do_not_depend_on_how_batches_are_packed(path, tmp_path):
    runs = []
    for max_tokens in (10_000, 1):
        trainer = trainer_on(path, tmp_path / str(max_tokens), Responses(8), max_tokens=max_tokens, loss=KTOLossConfig(beta=0.3))
        runs.append(some_steps(trainer, 4))
    for one, other in zip(*runs, strict=True):
        for name in ("train/loss", "train/grad_norm", "kto/kl", "kto/reward_margin"):
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name


def test_a_resumed_run_reads_its_reference_and_goes_on_bit_by_bit(path, tmp_path):
    straight = trainer_on(path, tmp_path, Responses(8), eval_fraction=0.2)
    some_steps(straight, 3)
    straight.policy.worker.save_state(tmp_path / "state")
    state, expected = straight.state(), some_steps(straight, 3)
    resumed = trainer_on(path, tmp_path, Responses(8), eval_fraction=0.2, resume=True)
    assert resumed.policy.scored == [], "the reference was read"
    resumed.load_state(state)
    resumed.policy.worker.load_state(tmp_path / "state")
    resumed.done = 3
    assert some_steps(resumed, 3) == expected and resumed.evaluate() == straight.evaluate()
    for change in (dict(label_threshold=0.9), dict(batch_size=4), dict(loss=KTOLossConfig(z0="batch")), dict(eval_fraction=0.4)):
        other = trainer_on(path, tmp_path, Responses(8), resume=True, **{"eval_fraction": 0.2} | change)
        with pytest.raises(CheckpointError, match="cannot resume"):
            other.load_state(state)


def test_mixtures_are_of_training_responses_to_other_questions_and_those_that_are_cut_are_counted(path, tmp_path, capsys):
    store = Responses(10, seed=28)  # some long response meets a longer prompt than its own
    trainer = trainer_on(path, tmp_path, store, eval_fraction=0.3, data=OfflineDataConfig(max_length=int(store.lengths.max())))
    used = np.concatenate([trainer.rows, trainer.held_out])
    assert set(trainer.partners[used]) <= set(trainer.rows) and (store.questions[trainer.partners[used]] != store.questions[used]).all()
    expected = sum(
        store.trajectory(row).num_prompt_tokens + store.trajectory(trainer.partners[row]).num_actions > store.lengths.max() for row in used
    )
    assert trainer._counts["mixtures_cut"] == expected > 0 and f"{expected} of 30 responses are cut" in capsys.readouterr().out


def test_rows_without_a_reward_are_left_out_and_counted_and_one_label_alone_is_an_error(path, tmp_path, capsys):
    store = Responses(6)
    store.has_reward[[0, 4]] = False
    trainer = trainer_on(path, tmp_path, store, eval_fraction=0.0)
    assert set(range(18)) - set(trainer.rows) == {0, 4} and trainer._counts["without_reward"] == 2
    assert "2 of 18 responses have no reward" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"all 18 training responses are undesirable \(rewards from 0 to 1, --label_threshold 1.5\)"):
        trainer_on(path, tmp_path, Responses(6), eval_fraction=0.0, label_threshold=1.5)
    with pytest.raises(ConfigError, match="--data.max_length is 8: the longest response given has"):
        trainer_on(path, tmp_path, Responses(6), data=OfflineDataConfig(max_length=8))


ROWS = [
    {"prompt": f"{a}+{b}=?", "response": str(a + b + wrong), "reward": 1.0 - wrong} for a in range(3) for b in range(3) for wrong in (0, 1)
]  # fmt: skip


@pytest.mark.parametrize("kind", ["responses", "labels", "pairs"])
def test_responses_labels_and_pairs_say_the_same(path, tmp_path, kind):
    rows = ROWS
    if kind == "labels":
        rows = [{"prompt": row["prompt"], "completion": row["response"], "label": row["reward"] > 0.5} for row in ROWS]
    if kind == "pairs":
        pairs = zip(ROWS[::2], ROWS[1::2], strict=True)
        rows = [{"prompt": right["prompt"], "chosen": right["response"], "rejected": wrong["response"]} for right, wrong in pairs]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = OfflineDataConfig(path=(str(file),), max_length=64, parallel="never")
    trainer = trainer_on(path, tmp_path / "run", None, data=data, eval_fraction=0.0, batch_size=4)
    assert trainer.store.kind == kind and trainer.desirable.tolist() == [True, False] * 9
    assert trainer.store.trajectory(1).response_ids.tolist() != trainer.store.trajectory(0).response_ids.tolist()
    assert len(trainer.loader.rows(0)) == (8 if kind == "pairs" else 4)
    trainer.step()
    trainer.loader.close()
