"""One rank, and two, of a model with a scalar head: the value loss's gradient, LoRA, dtypes, checkpoints, exports and warm starts."""

import json
import math
import os
import pickle
import socket
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from openrl_reason.core.losses import value_loss
from openrl_reason.core.partition import plan_micro_batches
from openrl_reason.errors import ConfigError, DataError
from openrl_reason.workers.model_config import LoraConfig, ScalarModelConfig
from openrl_reason.workers.model_worker import ModelWorker
from tests.helpers_models import first_moments, full_weights, random_batch, relative_difference, write_tiny_model

LENGTHS = [5, 17, 30, 3, 9, 40, 12]
STAGES = (3,)  # of two ranks: where everything is partitioned
CUTS = {"one": [[0, 1, 2, 3, 4, 5, 6]], "each alone": [[i] for i in range(7)], "shuffled": [[6, 2], [5], [], [0, 4, 1, 3]]}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "m")


def critic(path, *, total_steps=10, seed=0, rank=0, world_size=1, master_port=0, **settings):
    settings = dict(dtype="float32", lr=1e-3, warmup_ratio=0.0, schedule="constant", head_init="small") | settings
    rendezvous = dict(rank=rank, world_size=world_size, master_port=master_port)
    return ModelWorker(ScalarModelConfig(path=str(path), **settings), total_steps=total_steps, seed=seed, role="critic", **rendezvous)


def target_batch(lengths=LENGTHS, seed=0):
    batch, generator = random_batch(lengths, seed=seed), torch.Generator().manual_seed(seed + 7)
    returns, values = (torch.randn(batch.num_tokens, generator=generator) for _ in range(2))
    return batch.with_tokens(returns=returns, values=values * 0.1)


class Loss:
    """What ``CriticLoss`` is, with a clip that acts on some tokens."""

    def __call__(self, outputs, batch, denominators):
        settings = dict(clip=0.2, denominator=denominators["tokens"])
        loss, metrics = value_loss(outputs.values, batch.tokens["values"], batch.tokens["returns"], batch.action_mask, **settings)
        return loss, {"critic/value_loss": metrics["value_loss"], "critic/value_clip_fraction": metrics["value_clip_fraction"]}


def step(worker, batch, cut=None):
    return worker.update(batch.split(cut) if cut else [batch], Loss(), {"tokens": float(batch.num_actions)})


def values(worker, batch):
    return worker.values([batch])[0]["values"]


def steady(metrics):
    return {name: value for name, value in metrics.items() if not name.startswith("seconds/")}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradient_and_metrics_do_not_depend_on_how_the_batch_is_cut(path, stage):
    batch, results = target_batch(), {}
    for name, cut in CUTS.items():
        worker = critic(path, zero_stage=stage)
        metrics = step(worker, batch, cut)
        results[name] = first_moments(worker), metrics
    gradient, metrics = results["one"]
    assert gradient.norm() > 0 and 0 < metrics["critic/value_clip_fraction"] < 1
    for other, other_metrics in results.values():
        assert (other - gradient).norm() <= 1e-6 * gradient.norm()
        for name in ("critic/value_loss", "critic/value_clip_fraction", "grad_norm"):
            assert math.isclose(metrics[name], other_metrics[name], rel_tol=1e-6)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_step_in_several_calls_that_go_on_from_the_values_equals_one_call(path, stage):
    batch, whole, parts = target_batch(), critic(path, zero_stage=stage), critic(path, zero_stage=stage)
    expected, seen = step(whole, batch), values(critic(path, zero_stage=stage), batch)
    denominators, cut = {"tokens": float(batch.num_actions)}, [[6, 2], [5], [0, 4, 1, 3]]
    for number, part in enumerate(batch.split(cut), 1):
        (found,) = parts.values([part], for_update=True)
        torch.testing.assert_close(found["values"], seen[batch.token_index(torch.tensor(cut[number - 1]))], rtol=1e-5, atol=1e-6)
        metrics, _ = parts.update_keeping([part], Loss(), denominators, last=number == len(cut))
        assert bool(metrics) == (number == len(cut)) and parts.step == (number == len(cut))
    assert (first_moments(parts) - first_moments(whole)).norm() <= 1e-6 * first_moments(whole).norm()
    for name in ("critic/value_loss", "critic/value_clip_fraction", "grad_norm"):
        assert math.isclose(metrics[name], expected[name], rel_tol=1e-6)
    assert steady(step(parts, batch)).keys() == steady(expected).keys()  # the next step starts afresh


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bfloat16_gradients_of_many_micro_batches_add_up(path, stage):
    batch, norms = target_batch([5]), []
    for count in (1, 300):  # in bfloat16 a hundredth of a sum is lost
        worker = critic(path, dtype="bfloat16", zero_stage=stage)
        metrics = worker.update([batch] * count, Loss(), {"tokens": float(batch.num_actions * count)})
        norms.append(metrics["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=0.01)


def test_an_update_refuses_to_go_on_from_the_values_of_other_micro_batches(path):
    worker, batch = critic(path), target_batch()
    worker.values([batch], for_update=True)
    with pytest.raises(AssertionError, match="other micro-batches"):
        step(worker, batch, [[0, 1], [2, 3, 4, 5, 6]])


def test_every_stage_equals_plain_pytorch_on_a_padded_batch(path):
    """Three steps against an independent loop: transformers' own model and attention, a padded batch, torch's AdamW."""
    from transformers import AutoModelForTokenClassification

    start = critic(path)
    batch = target_batch()
    model = AutoModelForTokenClassification.from_pretrained(path, num_labels=1, dtype=torch.float32, attn_implementation="eager").eval()
    model.load_state_dict(full_weights(start), strict=True)
    assert not model.config.__dict__.get("classifier_dropout")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)

    def padded(tensor):
        return pad_sequence(tensor.split(LENGTHS), batch_first=True)

    ids, keep = padded(batch.token_ids), padded(torch.ones(batch.num_tokens, dtype=torch.int64))
    mask, returns, old = padded(batch.action_mask), padded(batch.tokens["returns"]), padded(batch.tokens["values"])
    losses, norms = [], []
    for _ in range(3):
        scores = model(input_ids=ids, attention_mask=keep).logits[..., 0]
        before = torch.nn.functional.pad(scores[:, :-1], (1, 0))  # the state before a token
        held = old + (before - old).clamp(-0.2, 0.2)
        loss = 0.5 * torch.maximum((before - returns) ** 2, (held - returns) ** 2)[mask].sum() / batch.num_actions
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    expected = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for stage in (0, 1, 2, 3):
        worker = critic(path, zero_stage=stage)
        history = [step(worker, batch, CUTS["shuffled"]) for _ in range(3)]
        assert [m["critic/value_loss"] for m in history] == pytest.approx(losses, rel=1e-5)
        assert [m["grad_norm"] for m in history] == pytest.approx(norms, rel=1e-4)
        assert relative_difference(full_weights(worker), expected) < 1e-5


@pytest.mark.parametrize("stage", [0, 3])
def test_values_stand_before_their_tokens_and_do_not_depend_on_the_cut(path, stage):
    worker, batch = critic(path, zero_stage=stage), target_batch()
    whole = values(worker, batch)
    scores = worker.values([batch], shifted=False)[0]["values"]
    first = batch.cu_seqlens[:-1].long()
    assert (whole[first] == 0).all() and whole.dtype == torch.float32
    inner = torch.ones(batch.num_tokens, dtype=torch.bool)
    inner[first] = False
    assert torch.equal(whole[inner], scores.roll(1)[inner])
    pieces = worker.values(batch.split([[3], [1, 0]]))
    torch.testing.assert_close(pieces[1]["values"], whole[batch.token_index([1, 0])], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_critic_learns_its_targets(path, stage, dtype):
    batch = target_batch([20, 11])
    worker = critic(path, zero_stage=stage, dtype=dtype, lr=1e-2, head_init="zero")
    assert (values(worker, batch) == 0).all()
    losses = [worker.update([batch], Unclipped(), {"tokens": float(batch.num_actions)})["critic/value_loss"] for _ in range(30)]
    assert losses[-1] < 0.3 * losses[0]
    assert {tensor.dtype for tensor in full_weights(worker).values()} == {getattr(torch, dtype)}
    assert values(worker, batch).dtype == torch.float32


class Unclipped:
    def __call__(self, outputs, batch, denominators):
        assert outputs.values.dtype == torch.float32
        loss, metrics = value_loss(outputs.values, None, batch.tokens["returns"], batch.action_mask, denominator=denominators["tokens"])
        return loss, {"critic/value_loss": metrics["value_loss"]}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_lora_trains_the_adapters_and_the_whole_head_and_nothing_else(path, tmp_path, stage):
    batch = target_batch([20, 11])
    worker = critic(path, zero_stage=stage, lr=1e-2, lora=LoraConfig(rank=4, alpha=16.0))
    trained = {name for name, parameter in worker.model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {"model.score.weight", "model.score.bias"}
    assert {name.split(".lora_")[0].split(".")[-1] for name in trained if "lora_" in name} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert not any("score.lora" in name for name in trained)
    before, start = full_weights(worker), values(worker, batch)
    torch.testing.assert_close(start, values(critic(path), batch), atol=1e-6, rtol=0)
    losses = [step(worker, batch)["critic/value_loss"] for _ in range(4)]
    assert losses[-1] < losses[0]
    after = full_weights(worker)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("score.") or (name.endswith("_proj.weight"))}
    worker.export_hf(tmp_path / "export")
    torch.testing.assert_close(values(critic(tmp_path / "export"), batch), values(worker, batch), atol=1e-5, rtol=0)


@pytest.mark.parametrize("modules", ["score", "q_proj,score", "nothing"])
def test_an_adapter_on_the_head_or_on_nothing_is_refused(path, modules):
    with pytest.raises(ConfigError, match="lora.target_modules"):
        critic(path, lora=LoraConfig(rank=2, target_modules=modules))


@pytest.mark.parametrize("settings", [{}, dict(dtype="bfloat16", lora=LoraConfig(rank=4, dropout=0.2))])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_restored_critic_goes_on_bit_by_bit(path, tmp_path, stage, settings):
    batch = target_batch([20, 11, 6])
    straight = critic(path, zero_stage=stage, lr=1e-2, **settings)
    step(straight, batch), step(straight, batch)
    straight.save_state(tmp_path / "state")
    expected = [steady(step(straight, batch, [[0], [2, 1]])) for _ in range(2)]
    resumed = critic(path, zero_stage=stage, lr=1e-2, seed=5, **settings)
    assert resumed.load_state(tmp_path / "state") == 2
    assert [steady(step(resumed, batch, [[0], [2, 1]])) for _ in range(2)] == expected
    ours, theirs = full_weights(resumed), full_weights(straight)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(values(resumed, batch), values(straight, batch))


@pytest.mark.parametrize("stage", [0, 3])
def test_an_exported_critic_is_a_warm_start_and_loads_in_transformers(path, tmp_path, stage):
    from transformers import AutoModelForTokenClassification

    batch = target_batch([20, 11])
    worker = critic(path, zero_stage=stage, lr=1e-2)
    step(worker, batch)
    worker.export_hf(tmp_path / "critic")
    config = json.loads((tmp_path / "critic" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForTokenClassification"]
    again = critic(tmp_path / "critic", zero_stage=stage, head_init="zero", seed=9)
    assert all(torch.equal(tensor, full_weights(worker)[name]) for name, tensor in full_weights(again).items())
    assert torch.equal(values(again, batch), values(worker, batch)) and values(again, batch).abs().max() > 0
    theirs = AutoModelForTokenClassification.from_pretrained(tmp_path / "critic", attn_implementation="eager").eval()
    expected = torch.cat([theirs(ids[None]).logits[0, :, 0] for ids in batch.token_ids.split([20, 11])])
    torch.testing.assert_close(worker.values([batch], shifted=False)[0]["values"], expected, atol=1e-4, rtol=0)


def test_a_sequence_classification_model_is_a_warm_start_whose_missing_bias_is_0(path, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    reward = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, pad_token_id=0).eval()
    reward.save_pretrained(tmp_path / "reward")
    AutoTokenizer.from_pretrained(path).save_pretrained(tmp_path / "reward")
    worker, batch = critic(tmp_path / "reward"), target_batch([20, 11])
    weights = full_weights(worker)
    assert torch.equal(weights["score.weight"], reward.score.weight) and (weights["score.bias"] == 0).all()
    scores = worker.values([batch], shifted=False)[0]["values"]
    expected = torch.stack([reward(ids[None]).logits[0, 0] for ids in batch.token_ids.split([20, 11])])
    torch.testing.assert_close(scores[batch.cu_seqlens[1:].long() - 1], expected, atol=1e-4, rtol=0)


def test_the_seed_draws_the_head_and_a_language_model_has_no_values(path):
    from openrl_reason.workers.model_config import TrainedModelConfig

    batch = target_batch([20])
    assert torch.equal(values(critic(path, seed=1), batch), values(critic(path, seed=1), batch))
    assert not torch.equal(values(critic(path, seed=1), batch), values(critic(path, seed=2), batch))
    with pytest.raises(AssertionError, match="no scalar head"):
        ModelWorker(TrainedModelConfig(path=path, dtype="float32"), total_steps=1).values([batch])
    with pytest.raises(DataError, match="200 tokens.*128 positions"):
        critic(path).values([random_batch([200])])


# ---- two ranks ---------------------------------------------------------------------------------------------------------------


def run_rank(rank, world_size, port, folder):
    torch.set_num_threads(1)
    results = {}
    for stage in STAGES:
        common = dict(zero_stage=stage, rank=rank, world_size=world_size, master_port=port)
        worker = critic(Path(folder) / "m", **common)
        plan, batch = plan_micro_batches(LENGTHS, world_size, 48), target_batch()
        pieces, denominators = batch.split(plan[rank]), {"tokens": float(batch.num_actions)}
        history = [steady(worker.update(pieces, Loss(), denominators)) for _ in range(3)]
        worker.export_hf(Path(folder) / f"critic-{world_size}-{stage}")
        worker.save_state(Path(folder) / f"state-{world_size}-{stage}")
        expected = steady(worker.update(pieces, Loss(), denominators))
        resumed = critic(Path(folder) / "m", seed=3, **common)
        resumed.load_state(Path(folder) / f"state-{world_size}-{stage}")
        assert steady(resumed.update(pieces, Loss(), denominators)) == expected
        results[stage] = history, full_weights(worker)
    (Path(folder) / f"results-{world_size}-{rank}.pickle").write_bytes(pickle.dumps(results))
    if world_size > 1:
        torch.distributed.destroy_process_group()
        os._exit(0)  # the results are on disk; a thread of gloo that still runs at the interpreter's end aborts the process now and then


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    write_tiny_model(folder / "m")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pair = torch.multiprocessing.spawn(run_rank, args=(2, port, str(folder)), nprocs=2, join=False)
    run_rank(0, 1, 0, str(folder))
    while not pair.join():
        pass
    return [pickle.loads((folder / f"results-{n}-{r}.pickle").read_bytes()) for n, r in ((1, 0), (2, 0), (2, 1))], folder


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_train_the_critic_that_one_trains(ranks, stage):
    from safetensors.torch import load_file

    (one, *two), folder = ranks
    history, weights = one[stage]
    for other_history, other_weights in (rank[stage] for rank in two):
        assert other_history == two[0][stage][0], "every rank must report the same metrics"
        for metrics, other in zip(history, other_history, strict=True):
            for name in ("critic/value_loss", "grad_norm", "lr"):
                assert other[name] == pytest.approx(metrics[name], rel=1e-5)
        assert relative_difference(other_weights, weights) < 1e-5
    exported = (load_file(folder / f"critic-{size}-{stage}" / "model.safetensors") for size in (1, 2))
    assert relative_difference(*exported) < 1e-5
