"""A resumed rank goes on bit by bit as if it had never stopped; a checkpoint that does not fit says why."""

import errno
import json
import shutil

import pytest
import torch

from openrl_reason.errors import CheckpointError
from openrl_reason.workers import model_state
from openrl_reason.workers.model_config import LoraConfig, ModelConfig, TrainedModelConfig
from openrl_reason.workers.model_worker import ModelWorker
from tests.helpers_models import full_weights, random_batch, supervised_loss, write_tiny_model


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tied")


def start(path, **settings):
    settings = dict(dtype="float32", lr=1e-2, warmup_ratio=0.3) | settings
    return ModelWorker(TrainedModelConfig(path=path, **settings), total_steps=6, seed=3)


def train(worker, steps):
    history = []
    for index in steps:
        batch = random_batch([9, 20, 4, 15], seed=index)
        metrics = worker.update(batch.split([[0, 2], [1, 3]]), supervised_loss, {"actions": float(batch.num_actions)})
        history.append({name: value for name, value in metrics.items() if not name.startswith("seconds/")})
    return history


CASES = [dict(zero_stage=stage, dtype=dtype) for stage in range(4) for dtype in ("float32", "bfloat16")]
CASES += [case | dict(lora=LoraConfig(rank=4, dropout=0.2)) for case in CASES]
CASES += [dict(zero_stage=stage, offload_optimizer=True) for stage in (1, 2, 3)]
CASES += [dict(zero_stage=3, offload_optimizer=True, offload_parameters=True, dtype="bfloat16"), dict(zero_stage=1, weight_decay=0.1)]


@pytest.mark.parametrize("settings", CASES, ids=lambda s: "-".join(f"{k}={getattr(v, 'rank', v)}" for k, v in s.items()))
def test_resumed_equals_straight_bit_by_bit(path, tmp_path, settings):
    straight = start(path, **settings)
    train(straight, range(3))
    straight.save_state(tmp_path / "state", step=3)
    expected = train(straight, range(3, 6))
    resumed = start(path, **settings)
    train(resumed, range(7, 8))  # a worker that has already been elsewhere
    assert resumed.load_state(tmp_path / "state") == 3
    assert train(resumed, range(3, 6)) == expected
    ours, theirs = full_weights(resumed), full_weights(straight)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {file.suffix for file in (tmp_path / "state").iterdir()} == {".safetensors", ".json"}


def test_scores_right_after_a_resume_are_those_before(path, tmp_path):
    batch = random_batch([9, 20])
    for stage in range(4):
        worker = start(path, zero_stage=stage, dtype="bfloat16")
        train(worker, range(2))
        worker.save_state(tmp_path / str(stage))
        resumed = start(path, zero_stage=stage, dtype="bfloat16")
        resumed.load_state(tmp_path / str(stage))
        assert torch.equal(resumed.logprobs([batch])[0]["logprobs"], worker.logprobs([batch])[0]["logprobs"])


def test_a_state_taken_before_the_first_step_resumes(path, tmp_path):
    worker = start(path, zero_stage=1)
    worker.save_state(tmp_path / "state")
    expected = train(worker, range(2))
    resumed = start(path, zero_stage=1)
    train(resumed, range(4, 5))
    assert resumed.load_state(tmp_path / "state") == 0
    assert train(resumed, range(2)) == expected


def test_a_refreshed_reference_comes_back(path, tmp_path):
    batch = random_batch([9, 20])
    policy = start(path, zero_stage=0)
    train(policy, range(2))
    for stage in (0, 3):
        reference = ModelWorker(ModelConfig(path=path, dtype="float32", zero_stage=stage), role="reference")
        reference.load_full_tensors(policy.named_full_tensors())
        reference.save_state(tmp_path / f"reference{stage}", step=2)
        fresh = ModelWorker(ModelConfig(path=path, dtype="float32", zero_stage=stage), role="reference")
        fresh.load_state(tmp_path / f"reference{stage}")
        assert torch.equal(fresh.logprobs([batch])[0]["logprobs"], policy.logprobs([batch])[0]["logprobs"])


@pytest.fixture(scope="module")
def saved(path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "state"
    worker = start(path, zero_stage=1)
    train(worker, range(1))
    worker.save_state(folder)
    return folder


@pytest.mark.parametrize("settings,message", [
    (dict(zero_stage=2), "written with zero_stage 1, and this run has zero_stage 2.*export"),
    (dict(zero_stage=1, dtype="bfloat16"), "dtype float32, and this run has dtype bfloat16"),
    (dict(zero_stage=1, lora=LoraConfig(rank=4)), "lora.rank 0, and this run has lora.rank 4"),
])  # fmt: skip
def test_a_checkpoint_of_other_settings_is_refused_with_both_and_the_way_out(path, saved, settings, message):
    with pytest.raises(CheckpointError, match=message):
        start(path, **settings).load_state(saved)


def test_a_checkpoint_of_another_model_or_number_of_ranks_is_refused(path, saved, tmp_path):
    other = write_tiny_model(tmp_path / "wide", intermediate_size=128)
    with pytest.raises(CheckpointError, match=r"trained_parameters \d+, and this run has trained_parameters \d+"):
        start(other, zero_stage=1).load_state(saved)
    worker = start(path, zero_stage=1)
    worker.world_size = 2
    with pytest.raises(CheckpointError, match="num_ranks 1, and this run has num_ranks 2.*export"):
        worker.load_state(saved)
    worker.rank = 1  # a rank that the checkpoint never had
    with pytest.raises(CheckpointError, match="num_ranks 1, and this run has num_ranks 2"):
        worker.load_state(saved)


def test_missing_and_damaged_states_are_named(path, saved, tmp_path):
    worker = start(path, zero_stage=1)
    with pytest.raises(CheckpointError, match="no state of the policy model in"):
        worker.load_state(tmp_path)
    damaged = tmp_path / "damaged"
    shutil.copytree(saved, damaged)
    tensors = damaged / "rank-00000.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="cannot read .*rank-00000.safetensors"):
        worker.load_state(damaged)
    record = damaged / "rank-00000.json"
    record.write_text(json.dumps(json.loads(record.read_text()))[:-10])
    with pytest.raises(CheckpointError, match="cannot read .*rank-00000.json"):
        worker.load_state(damaged)


def test_a_full_disk_while_a_rank_writes_is_one_clear_error(path, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(model_state, "save_file", full)
    with pytest.raises(CheckpointError, match=f"could not write {tmp_path}.*No space left"):
        start(path, zero_stage=0).save_state(tmp_path / "state")
