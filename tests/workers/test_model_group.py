"""A group behaves as one object: order kept, cut invisible, and every failure one clear error."""

import os
import signal
import time

import pytest
import torch

from openrl_reason.errors import CheckpointError, ConfigError, DataError, WorkerError
from openrl_reason.workers.model_config import ModelConfig, TrainedModelConfig
from openrl_reason.workers.model_group import ModelGroup
from openrl_reason.workers.model_worker import ModelWorker
from tests.clusters import local_ray
from tests.helpers_models import endless_loss, failing_on_rank_1, random_batch, supervised_loss, write_tiny_model

LENGTHS = [5, 17, 30, 3, 9, 40, 12]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tied")


@pytest.fixture(scope="module")
def ray_session():
    with local_ray(num_cpus=4) as ray:
        yield ray


def settings(path, **changes):
    return TrainedModelConfig(
        path=path, **(dict(dtype="float32", lr=1e-2, warmup_ratio=0.0, schedule="constant", tokens_per_micro_batch=48) | changes)
    )


@pytest.fixture(scope="module")
def two_ranks(ray_session, path):
    group = ModelGroup.start(settings(path, num_ranks=2, zero_stage=3), total_steps=10, timeout_s=120)
    yield group
    group.close()


def test_scores_come_back_in_the_order_of_the_batch(two_ranks, path):
    batch = random_batch(LENGTHS)
    alone = ModelWorker(ModelConfig(path=path, dtype="float32")).logprobs([batch], with_entropy=True)[0]
    pending = two_ranks.logprobs_async(batch, with_entropy=True)
    scores = pending.result()
    torch.testing.assert_close(scores["logprobs"], alone["logprobs"], atol=1e-5, rtol=0)
    torch.testing.assert_close(scores["entropy"], alone["entropy"], atol=1e-5, rtol=0)
    assert set(two_ranks.logprobs(batch)) == {"logprobs"}


def test_a_batch_smaller_than_the_group_is_scored_and_trained_on_like_any_other(two_ranks, path, ray_session, tmp_path):
    """Sequence counts that leave a rank with nothing but a dummy; then the reference takes over the weights, and the export has them."""
    alone = ModelWorker(settings(path), total_steps=10)
    for lengths in ([20], LENGTHS, [30, 30, 30]):
        batch = random_batch(lengths)
        extra = batch.with_tokens(advantages=torch.ones(batch.num_tokens))
        metrics = two_ranks.update(extra, supervised_loss, {"actions": float(batch.num_actions)})
        expected = alone.update([batch], supervised_loss, {"actions": float(batch.num_actions)})
        for name in ("loss", "grad_norm", "lr", "logprob/max", "logprob/min"):
            assert metrics[name] == pytest.approx(expected[name], rel=1e-4)
        assert metrics["seconds/forward_backward"] > 0 and metrics["skipped_update"] == 0.0
    batch = random_batch(LENGTHS)
    scores = two_ranks.logprobs(batch)["logprobs"]
    torch.testing.assert_close(scores, alone.logprobs([batch])[0]["logprobs"], atol=1e-3, rtol=0)
    reference = ModelGroup.start(ModelConfig(path=path, dtype="float32", num_ranks=1), role="reference", timeout_s=120)
    assert not torch.allclose(reference.logprobs(batch)["logprobs"], scores, atol=1e-2)
    reference.copy_weights_from(two_ranks)
    torch.testing.assert_close(reference.logprobs(batch)["logprobs"], scores, atol=1e-5, rtol=0)
    two_ranks.export_hf(tmp_path / "export")
    exported = ModelWorker(ModelConfig(path=str(tmp_path / "export"), dtype="float32")).logprobs([batch])[0]["logprobs"]
    torch.testing.assert_close(exported, scores, atol=1e-5, rtol=0)
    two_ranks.save_state(tmp_path / "state", step=3)
    two_ranks.update(batch, supervised_loss, {"actions": 1.0})
    assert two_ranks.load_state(tmp_path / "state") == 3
    assert torch.equal(two_ranks.logprobs(batch)["logprobs"], scores)
    reference.close()
    with pytest.raises(WorkerError, match="reference group is gone: it was shut down"):
        reference.logprobs(batch)


def test_the_sketched_gradient_of_two_ranks_is_that_of_one_and_needs_no_training(ray_session, path):
    settings, batch = dict(path=path, dtype="float32", tokens_per_micro_batch=48), random_batch(LENGTHS)
    args = supervised_loss, {"actions": float(batch.num_actions)}
    alone = ModelWorker(ModelConfig(**settings)).gradient_sketch([batch], *args, size=1 << 16, seed=5)
    group = ModelGroup.start(ModelConfig(**settings, num_ranks=2), role="frozen", timeout_s=120)
    for one in (batch, batch.select([2])):  # the second leaves a rank without sequences
        found = group.gradient_sketch(one, *args, size=1 << 16, seed=5)
        assert found.norm_error < 1e-5 and (one is not batch or torch.allclose(found.sketch, alone.sketch, rtol=1e-4, atol=1e-6))
    group.close()


def test_ranks_are_named_actors(two_ranks, ray_session):
    two_ranks.ready()
    assert ray_session.get_actor("policy-rank0") and ray_session.get_actor("policy-rank1")


def test_a_model_that_is_not_one_is_refused_as_itself_when_groups_start_together(ray_session, tmp_path):
    groups = [ModelGroup.start(settings(str(tmp_path)), role=f"bad{i}", total_steps=1, wait=False, timeout_s=120) for i in range(2)]
    for group in groups:
        with pytest.raises(DataError, match="no config.json"):
            group.ready()


def check_failure(call, *patterns, within):
    start = time.monotonic()
    with pytest.raises(WorkerError) as raised:
        call()
    assert time.monotonic() - start < within
    message = str(raised.value)
    for pattern in patterns:
        assert pattern in message, message
    log = message.rsplit("Its log: ", 1)[1]
    assert os.path.isfile(log), log
    return log


def check_gone(call):
    with pytest.raises(WorkerError, match="group is gone"):
        call()


def test_failures_name_the_rank_the_cause_and_the_log_and_free_the_names(ray_session, path):
    """A rank dead, a loss raising on one rank, a rank that hangs: the others are killed, so the names are free again."""
    batch = random_batch(LENGTHS)
    denominators = {"actions": 1.0}

    def start(num_ranks):
        return ModelGroup.start(settings(path, num_ranks=num_ranks, zero_stage=1), role="doomed", total_steps=10, timeout_s=120)

    group = start(2)
    os.kill(group._info[1]["pid"], signal.SIGKILL)
    check_failure(lambda: group.update(batch, supervised_loss, denominators), "doomed-rank1 failed in update: the process died", within=60)
    group = start(2)
    log = check_failure(
        lambda: group.update(batch, failing_on_rank_1, denominators), "doomed-rank1 failed", "MemoryError: out of memory in rank 1", within=60
    )
    assert "in failing_on_rank_1" in open(log).read(), "the traceback is in the log"
    check_gone(lambda: group.update(batch, supervised_loss, denominators))
    group = start(1)
    group.timeout_s = 3
    check_failure(lambda: group.update(batch, endless_loss, denominators), "did not finish update within 3 s", within=60)


def test_errors_that_are_the_users_to_mend_come_through_as_they_are(ray_session, path, tmp_path):
    group = ModelGroup.start(settings(path), role="single", total_steps=10, timeout_s=120)
    with pytest.raises(CheckpointError, match="no state of the single model"):
        group.load_state(tmp_path)
    with pytest.raises(ConfigError, match="TrainedModelConfig"):
        ModelGroup.start(ModelConfig(path=path), role="untrainable", total_steps=10, timeout_s=120)
