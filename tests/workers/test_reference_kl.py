"""What offline losses need of a model group's rank: exact KL to a reference, outputs kept from an update, a moving average of the weights."""

import pytest
import torch

from openrl_reason.errors import CheckpointError, DataError
from openrl_reason.models.loading import load_output_head
from openrl_reason.workers.model_config import LoraConfig, ModelConfig, TrainedModelConfig
from openrl_reason.workers.model_worker import ModelWorker
from tests.helpers_models import random_batch, supervised_loss, write_tiny_model


class KLLoss:
    """Mean exact KL over the action tokens."""

    def __call__(self, outputs, batch, denominators):
        loss = outputs.kl.sum() / denominators["actions"]
        return loss, {"loss": loss.detach()}


def start(path, **settings):
    return ModelWorker(TrainedModelConfig(path=path, dtype="float32", lr=0.01, **settings), total_steps=10)


@pytest.fixture
def batch():
    return random_batch([9, 6, 12, 5])


@pytest.fixture
def paths(tmp_path):
    return write_tiny_model(tmp_path / "policy", seed=0), write_tiny_model(tmp_path / "reference", seed=1, tied=False)


def full_kl(policy, reference, batch):
    """By whole distributions, in float64, sequence by sequence; 0 outside actions."""
    result, model, other = torch.zeros(batch.num_tokens, dtype=torch.float64), policy.model, reference.model
    for start_, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        ids, ends = batch.token_ids[start_:end], torch.tensor([0, end - start_], dtype=torch.int32)
        with torch.no_grad():
            log_p, log_q = (
                torch.log_softmax(m.hidden_states(ids, ends).double() @ m.model.get_output_embeddings().weight.double().T, -1) for m in (model, other)
            )
        result[start_ + 1 : end] = (log_p.exp() * (log_p - log_q)).sum(-1)[:-1]
    return torch.where(batch.action_mask, result, 0.0)


@pytest.mark.parametrize("cut", [None, [[0, 2], [1], [3]]])
def test_the_kl_of_an_update_is_the_exact_one_however_the_batch_is_cut(paths, batch, cut):
    policy, reference = start(paths[0]), ModelWorker(ModelConfig(path=paths[1], dtype="float32"))
    policy.set_reference_head(paths[1], "reverse")
    expected = full_kl(policy, reference, batch)
    with_reference = batch.with_tokens(ref_hidden=reference.logprobs([batch], with_hidden=True)[0]["hidden"])
    pieces = with_reference.split(cut) if cut else [with_reference]
    metrics, kept = policy.update_keeping(pieces, KLLoss(), {"actions": float(batch.num_actions)}, keep=("kl", "logprobs"))
    assert metrics["loss"] == pytest.approx(float(expected.sum() / batch.num_actions), rel=1e-5)
    if cut is None:
        torch.testing.assert_close(kept[0]["kl"].double(), expected, rtol=1e-4, atol=1e-5)
    assert metrics["grad_norm"] > 0


def test_kept_logprobs_are_those_before_the_step(paths, batch):
    policy = start(paths[0])
    before = policy.logprobs([batch])[0]["logprobs"]
    _, kept = policy.update_keeping([batch], supervised_loss, {"actions": float(batch.num_actions)}, keep=("logprobs",))
    assert torch.equal(kept[0]["logprobs"], before)
    assert not torch.equal(policy.logprobs([batch])[0]["logprobs"], before)


def test_of_lora_s_own_base_model_the_kl_is_zero_at_the_start_and_grows(paths, batch):
    policy = start(paths[0], lora=LoraConfig(rank=2))
    policy.set_reference_head(paths[0], "forward")
    hidden = policy.logprobs([batch], adapters=False, with_hidden=True)[0]["hidden"]
    losses = []
    for _ in range(3):
        part = batch.with_tokens(ref_hidden=hidden)
        losses.append(policy.update([part], KLLoss(), {"actions": float(batch.num_actions)})["loss"])
        policy.update([batch], supervised_loss, {"actions": float(batch.num_actions)})
    assert abs(losses[0]) < 1e-6 and losses[2] > 1e-4


def test_the_average_follows_and_leaves_the_weights_alone(paths, batch, tmp_path):
    denominators = {"actions": float(batch.num_actions)}
    policy, plain = start(paths[0]), start(paths[0])
    policy.start_average(0.5)
    expected = [p.detach().clone() for p in policy.model.parameters()]
    for _ in range(3):
        policy.update([batch], supervised_loss, denominators), plain.update([batch], supervised_loss, denominators)
        policy.logprobs([batch], average=True)
        expected = [0.5 * old + 0.5 * p.detach() for old, p in zip(expected, policy.model.parameters(), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(policy.model.parameters(), plain.model.parameters(), strict=True))
    torch.testing.assert_close(policy.average.averages, expected)
    slow = policy.logprobs([batch], average=True)[0]["logprobs"]
    policy.save_state(tmp_path / "state")
    resumed = start(paths[0])
    resumed.start_average(0.5)
    resumed.load_state(tmp_path / "state")
    assert torch.equal(resumed.logprobs([batch], average=True)[0]["logprobs"], slow)
    (tmp_path / "state" / "average.safetensors").unlink()
    with pytest.raises(CheckpointError, match="average"):
        resumed.load_state(tmp_path / "state")


def test_a_folder_without_a_head_is_refused(paths, tmp_path):
    from safetensors.torch import load_file, save_file

    file = next((tmp_path / "reference").glob("*.safetensors"))
    save_file({name: tensor for name, tensor in load_file(file).items() if name != "lm_head.weight"}, file)
    with pytest.raises(DataError, match="no output head"):
        load_output_head(paths[1], "float32")
