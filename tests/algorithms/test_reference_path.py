"""DPO and KTO against a reference that is not the policy's start: its scores are that model's, and it ends before the first step."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from openrl_reason.algorithms import reference_scores
from openrl_reason.algorithms.dpo import DPOConfig, DPOTrainer
from openrl_reason.algorithms.kto import KTOConfig, KTOTrainer
from openrl_reason.algorithms.trainer import RunConfig
from openrl_reason.data.offline_config import OfflineDataConfig
from openrl_reason.errors import CheckpointError
from openrl_reason.workers.model_config import ModelConfig, TrainedModelConfig
from tests.algorithms.kto_helpers import Responses
from tests.algorithms.test_dpo import make_pairs
from tests.algorithms.test_kto import Group, worker_at
from tests.helpers_models import random_batch, supervised_loss, write_tiny_model


@pytest.fixture
def models(tmp_path, monkeypatch):
    """(policy's folder, reference's folder, the groups that were started, those that have ended)."""
    policy = write_tiny_model(tmp_path / "policy")
    moved = worker_at(policy)
    batch = random_batch([9, 14], seed=1)
    moved.update([batch], supervised_loss, {"actions": float(batch.num_actions)})
    moved.export_hf(tmp_path / "reference")
    started, ended = [], []

    @contextlib.contextmanager
    def running_group(config, role, placement, seed):
        started.append((config, role))
        yield Group(worker_at(config.path), 200)
        ended.append(role)

    monkeypatch.setattr(reference_scores, "running_group", running_group)
    return SimpleNamespace(policy=policy, reference=str(tmp_path / "reference"), started=started, ended=ended)


def make(kind, models, folder, reference_path):
    run, policy = RunConfig(output_dir=str(folder), steps=10, resume=True), TrainedModelConfig(path=models.policy, zero_stage=2)
    if kind == "dpo":
        config = DPOConfig(run=run, policy=policy, max_length=64, reference_path=reference_path)
        trainer = DPOTrainer(config, pairs=make_pairs())
    else:
        config = KTOConfig(run=run, policy=policy, data=OfflineDataConfig(max_length=64), reference_path=reference_path)
        trainer = KTOTrainer(config, store=Responses())
    trainer.prepare()
    trainer.folder.mkdir(exist_ok=True)
    return trainer


def scores(trainer, worker):
    trainer.policy = Group(worker, 200)
    found = trainer.read_or_score_reference()
    return torch.tensor(list(found.values())) if isinstance(found, dict) and isinstance(next(iter(found.values())), float) else found["logprobs"]


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_scores_are_those_of_the_named_model_on_as_many_ranks_and_it_ends(kind, models, tmp_path):
    own = scores(make(kind, models, tmp_path / "own", ""), worker_at(models.policy))
    assert not models.started
    as_policy = scores(make(kind, models, tmp_path / "as_policy", ""), worker_at(models.reference))
    trainer = make(kind, models, tmp_path / "other", models.reference)
    found = scores(trainer, worker_at(models.policy))
    torch.testing.assert_close(found, as_policy, equal_nan=True)
    assert not torch.allclose(found, own, equal_nan=True)
    ((config, role),) = models.started
    assert type(config) is ModelConfig and (config.path, config.zero_stage, role) == (models.reference, 0, "reference")
    assert models.ended == ["reference"]
    assert [role.name for role in trainer.roles()] == ["policy", "reference"]
    scores(make(kind, models, tmp_path / "other", models.reference), worker_at(models.policy))
    assert len(models.started) == 1, "kept on disk"
    torch.testing.assert_close(scores(make(kind, models, tmp_path / "other", ""), worker_at(models.policy)), own, equal_nan=True)


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_run_goes_on_with_the_reference_it_had(kind, models, tmp_path):
    state = make(kind, models, tmp_path, models.reference).state()
    make(kind, models, tmp_path, models.reference).load_state(state)
    with pytest.raises(CheckpointError, match="reference_path was"):
        make(kind, models, tmp_path, "").load_state(state)
