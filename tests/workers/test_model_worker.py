"""One rank: an update's gradient depends on the batch alone, not on how it is cut, nor on the ZeRO stage."""

import math

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from openrl_reason.core.batch import TokenBatch
from openrl_reason.errors import ConfigError, DataError
from openrl_reason.workers.deepspeed_engine import import_deepspeed
from openrl_reason.workers.model_config import LoraConfig, ModelConfig, TrainedModelConfig
from openrl_reason.workers.model_worker import ModelWorker
from tests.helpers_models import first_moments, full_weights, random_batch, relative_difference, supervised_loss, write_tiny_model

LENGTHS = [5, 17, 30, 3, 9, 40, 12]
CUTS = {"one": [[0, 1, 2, 3, 4, 5, 6]], "each alone": [[i] for i in range(7)], "shuffled": [[6, 2], [5], [0, 4, 1, 3]]}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tied")


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "untied", tied=False)


def trained(path, *, total_steps=10, seed=0, **settings):
    settings = dict(dtype="float32", lr=1e-2, warmup_ratio=0.0, schedule="constant") | settings
    return ModelWorker(TrainedModelConfig(path=path, **settings), total_steps=total_steps, seed=seed)


def step(worker, batch, cut=None, **kwargs):
    return worker.update(batch.split(cut) if cut else [batch], supervised_loss, {"actions": float(batch.num_actions)}, **kwargs)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradient_and_metrics_do_not_depend_on_how_the_batch_is_cut(path, stage):
    batch = random_batch(LENGTHS)
    results = {}
    for name, cut in CUTS.items():
        worker = trained(path, zero_stage=stage)
        metrics = step(worker, batch, cut)
        results[name] = first_moments(worker), metrics
    gradient, metrics = results["one"]
    for other, other_metrics in results.values():
        assert (other - gradient).norm() <= 1e-6 * gradient.norm()
        for name in ("loss", "grad_norm", "logprob/max", "logprob/min"):
            assert math.isclose(metrics[name], other_metrics[name], rel_tol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_every_stage_equals_plain_pytorch(path, untied, tied):
    """Three steps against an independent loop: transformers' own forward, a padded batch, torch's cross-entropy and AdamW."""
    from transformers import AutoModelForCausalLM

    folder = path if tied else untied
    batch = random_batch(LENGTHS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    ids = pad_sequence(batch.token_ids.split(LENGTHS), batch_first=True)
    labels = pad_sequence(torch.where(batch.action_mask, batch.token_ids, -100).split(LENGTHS), batch_first=True, padding_value=-100)
    keep = pad_sequence([torch.ones(length, dtype=torch.int64) for length in LENGTHS], batch_first=True)
    losses, norms = [], []
    for _ in range(3):
        logits = model(input_ids=ids, attention_mask=keep).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / batch.num_actions
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    expected = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for stage in (0, 1, 2, 3):
        worker = trained(folder, zero_stage=stage, lr=1e-3)
        history = [step(worker, batch, CUTS["shuffled"]) for _ in range(3)]
        assert [m["loss"] for m in history] == pytest.approx(losses, rel=1e-5)
        assert [m["grad_norm"] for m in history] == pytest.approx(norms, rel=1e-4)
        assert relative_difference(full_weights(worker), expected) < 1e-5


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("stage", [0, 3])
def test_a_dummy_micro_batch_contributes_exactly_nothing(path, stage, with_entropy):
    def loss_fn(outputs, batch, denominators):
        loss, metrics = supervised_loss(outputs, batch, denominators)
        if with_entropy:
            loss = loss - 0.1 * (outputs.entropy * batch.action_mask).sum() / denominators["actions"]
        return loss, metrics

    batch = random_batch([9, 14])
    denominators = {"actions": float(batch.num_actions)}
    moments, metrics = [], []
    for pieces in ([batch], [batch, batch.empty_like_dummy()], [TokenBatch.dummy(), batch]):
        worker = trained(path, zero_stage=stage)
        metrics.append(worker.update(pieces, loss_fn, denominators, with_entropy=with_entropy))
        moments.append(first_moments(worker))
    assert torch.equal(moments[0], moments[1]) and torch.equal(moments[0], moments[2])
    assert all(m[name] == metrics[0][name] for m in metrics for name in ("loss", "grad_norm", "logprob/min"))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gradient_that_is_not_finite_skips_the_step_and_the_next_one_is_taken(path, dtype, stage):
    def broken_loss(outputs, batch, denominators):
        return outputs.logprobs.sum() * float("nan"), {}

    batch = random_batch([9, 14])
    worker = trained(path, zero_stage=stage, dtype=dtype)
    before = full_weights(worker)
    metrics = worker.update([batch], broken_loss, {})
    assert metrics["skipped_update"] == 1.0 and metrics["grad_norm"] == math.inf
    after = full_weights(worker)
    assert all(torch.equal(before[name], after[name]) for name in before)
    metrics = step(worker, batch)
    assert metrics["skipped_update"] == 0.0 and math.isfinite(metrics["grad_norm"])
    after = full_weights(worker)
    assert not any(torch.equal(before[name], after[name]) for name in before if "k_proj.bias" not in name)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bfloat16_training_accumulates_changes_too_small_for_bfloat16(path, stage):
    from openrl_reason.workers.deepspeed_engine import master_partitions

    worker = trained(path, zero_stage=stage, dtype="bfloat16", lr=1e-6, max_grad_norm=0.0)
    batch = random_batch([30, 20])
    masters = [master.detach().clone() for master in master_partitions(worker.engine)]
    assert all(master.dtype == torch.float32 for master in masters)
    for _ in range(4):
        step(worker, batch, [[0], [1]])
    moved = [float((new.detach() - old).abs().max()) for new, old in zip(master_partitions(worker.engine), masters, strict=True)]
    assert max(moved) == pytest.approx(4e-6, rel=0.2)
    assert all(tensor.dtype == torch.bfloat16 for tensor in full_weights(worker).values())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_clipping_scales_the_gradient_and_reports_the_norm_before(path, stage):
    batch = random_batch(LENGTHS)
    free, clipped = trained(path, zero_stage=stage, max_grad_norm=0.0), trained(path, zero_stage=stage, max_grad_norm=0.25)
    norms = [step(worker, batch)["grad_norm"] for worker in (free, clipped)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6) and norms[0] > 0.5
    gradient = first_moments(free)
    assert gradient.norm() / 0.1 == pytest.approx(norms[0], rel=1e-5)
    torch.testing.assert_close(first_moments(clipped), gradient * (0.25 / norms[0]), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("settings", [
    dict(zero_stage=1, offload_optimizer=True), dict(zero_stage=2, offload_optimizer=True), dict(zero_stage=3, offload_optimizer=True),
    dict(zero_stage=3, offload_optimizer=True, offload_parameters=True), dict(zero_stage=0, gradient_checkpointing=True),
    dict(zero_stage=3, gradient_checkpointing=True),
])  # fmt: skip
def test_offload_and_checkpointing_leave_the_training_as_it_was_and_compile_nothing(path, settings, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")  # no compiler, no ninja
    batch = random_batch(LENGTHS)
    plain, changed = trained(path, zero_stage=0), trained(path, **settings)
    for _ in range(2):
        expected, metrics = (step(worker, batch, CUTS["shuffled"]) for worker in (plain, changed))
        assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    assert relative_difference(full_weights(changed), full_weights(plain)) < 1e-5


def test_deepspeed_s_unused_optimiser_does_not_load_torch_s_compiler():
    import_deepspeed()
    from deepspeed.runtime import compiler
    from deepspeed.runtime.zero.muon import original_muon

    assert not hasattr(original_muon.zeropower_via_newtonschulz5, "_torchdynamo_orig_callable")
    assert compiler.compile.__module__ == compiler.__name__, "DeepSpeed's own, for whoever wants it"


def test_weight_decay_spares_norms_and_biases(path):
    def no_gradient(outputs, batch, denominators):
        return 0.0 * outputs.logprobs.sum(), {}

    for stage in (0, 1, 3):
        worker = trained(path, zero_stage=stage, weight_decay=0.5, lr=0.1)
        before = full_weights(worker)
        worker.update([random_batch([8])], no_gradient, {})
        for name, after in full_weights(worker).items():
            factor = 0.95 if before[name].dim() > 1 else 1.0
            torch.testing.assert_close(after, before[name] * factor, msg=name)


def test_scores_come_back_in_the_order_of_the_micro_batches_and_only_for_actions(path):
    worker = ModelWorker(ModelConfig(path=path, dtype="float32"), role="reference")
    batch = random_batch(LENGTHS, prompt_tokens=3)
    whole = worker.logprobs([batch], with_entropy=True)[0]
    pieces = worker.logprobs(batch.split([[3], [1, 0]]))
    torch.testing.assert_close(pieces[0]["logprobs"], whole["logprobs"][batch.token_index([3])])
    torch.testing.assert_close(pieces[1]["logprobs"], whole["logprobs"][batch.token_index([1, 0])])
    assert (whole["logprobs"][~batch.action_mask] == 0).all() and (whole["entropy"][batch.action_mask] > 0).all()
    assert set(pieces[0]) == {"logprobs"}


def test_the_learning_rate_follows_the_schedule_to_its_end(path):
    worker = trained(path, schedule="linear", warmup_ratio=0.5, min_lr_ratio=0.1, total_steps=4, lr=1e-3)
    rates = [step(worker, random_batch([8]))["lr"] for _ in range(4)]
    assert rates == pytest.approx([5e-4, 1e-3, 5.5e-4, 1e-4])


def test_skipped_updates_move_the_schedule_and_nothing_else(path):
    batch, settings = random_batch([8]), dict(total_steps=5, schedule="linear", min_lr_ratio=0.1)
    straight, skipping = trained(path, **settings), trained(path, **settings)
    rates = [step(straight, batch)["lr"] for _ in range(5)]
    found = [step(skipping, batch)["lr"]]
    before = full_weights(skipping)
    skipping.skip_updates(3)
    assert all(torch.equal(before[name], weight) for name, weight in full_weights(skipping).items())
    found.append(step(skipping, batch)["lr"])
    assert found == [rates[0], rates[4]] and found[1] == pytest.approx(1e-3) and skipping.step == 5


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_lora_trains_the_adapters_alone_and_merges_them_into_what_it_publishes(path, tmp_path, stage):
    from transformers import AutoModelForCausalLM

    batch = random_batch([20, 11])
    base = ModelWorker(ModelConfig(path=path, dtype="float32")).logprobs([batch])[0]["logprobs"]
    worker = trained(path, zero_stage=stage, lora=LoraConfig(rank=4, alpha=16.0))
    assert {name.split(".lora_")[0].split(".")[-1] for name, p in worker.model.named_parameters() if p.requires_grad} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    torch.testing.assert_close(worker.logprobs([batch])[0]["logprobs"], base, atol=1e-6, rtol=0)
    losses = [step(worker, batch)["loss"] for _ in range(3)]
    assert losses[2] < losses[0]
    adapted = worker.logprobs([batch])[0]["logprobs"]
    assert not torch.allclose(adapted, base, atol=1e-3)
    torch.testing.assert_close(worker.logprobs([batch], adapters=False)[0]["logprobs"], base, atol=1e-6, rtol=0)
    worker.export_hf(tmp_path / "export")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "export").num_parameters() == sum(
        _numel(p) for name, p in worker.model.named_parameters() if ".lora_" not in name
    )
    exported = ModelWorker(ModelConfig(path=str(tmp_path / "export"), dtype="float32")).logprobs([batch])[0]["logprobs"]
    torch.testing.assert_close(exported, adapted, atol=1e-5, rtol=0)


def _numel(parameter):
    return parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()


def test_lora_on_the_output_head_or_on_nothing_is_refused(path):
    for modules in ("lm_head", "no_such_layer"):
        with pytest.raises(ConfigError, match=f"lora.target_modules is '{modules}'"):
            trained(path, lora=LoraConfig(rank=4, target_modules=modules))


@pytest.mark.parametrize("stage", [0, 3])
def test_weights_copied_from_another_worker_score_alike(path, untied, stage):
    batch = random_batch([20, 11])
    policy = trained(path, zero_stage=stage)
    reference = ModelWorker(ModelConfig(path=path, dtype="float32", zero_stage=stage), role="reference")
    step(policy, batch)
    after = policy.logprobs([batch])[0]["logprobs"]
    assert not torch.allclose(reference.logprobs([batch])[0]["logprobs"], after, atol=1e-3)
    reference.load_collected(policy.collect_weights())
    assert torch.equal(reference.logprobs([batch])[0]["logprobs"], after)
    other = ModelWorker(ModelConfig(path=untied, dtype="float32"), role="reference")
    with pytest.raises(ConfigError, match="lack lm_head.weight"):
        other.load_collected(policy.collect_weights())


def test_publishing_hands_every_weight_to_the_sender_under_its_own_name(path):
    class Sender:
        def send(self, tensors, version):
            return {name: tensor.shape for name, tensor in tensors}, version

    from transformers import AutoModelForCausalLM

    expected = {name: p.shape for name, p in AutoModelForCausalLM.from_pretrained(path).named_parameters()}
    for settings in (dict(zero_stage=0), dict(zero_stage=3), dict(zero_stage=3, lora=LoraConfig(rank=2))):
        manifest, version = trained(path, **settings).publish_weights(Sender(), 7)
        assert manifest == expected and version == 7


def test_unusable_settings_and_inputs_are_refused(path):
    with pytest.raises(ConfigError, match="TrainedModelConfig"):
        ModelWorker(ModelConfig(path=path), total_steps=3)
    worker = ModelWorker(ModelConfig(path=path, dtype="float32"))
    with pytest.raises(DataError, match="200 tokens.*128 positions"):
        worker.logprobs([random_batch([200])])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_memory_given_back_and_taken_again_changes_nothing(path, stage, dtype):
    """What a GPU rank does between its turns, here on the CPU: every buffer is freed and restored in place."""
    from openrl_reason.workers.deepspeed_engine import ParkedMemory, master_partitions, resident_tensors

    batch = random_batch([9, 14])
    straight, parked = trained(path, zero_stage=stage, dtype=dtype), trained(path, zero_stage=stage, dtype=dtype)
    reference = ModelWorker(ModelConfig(path=path, dtype=dtype, zero_stage=stage), role="reference")
    for parameter in [*parked.model.parameters(), *reference.model.parameters()] if stage in (0, 1, 2) else []:
        if not parameter.untyped_storage().resizable():  # on a CPU it may be a mapped file; on a GPU it never is
            parameter.data = parameter.data.clone()
    for _ in range(2):
        expected, metrics = (step(worker, batch, [[1], [0]]) for worker in (straight, parked))
        assert metrics["loss"] == expected["loss"] and metrics["grad_norm"] == expected["grad_norm"]
        memory = ParkedMemory(resident_tensors(parked.model, parked.engine, parked.device))
        assert all(master.untyped_storage().nbytes() == 0 for master in master_partitions(parked.engine))
        assert all(parameter.untyped_storage().nbytes() == 0 for parameter in parked.model.parameters())
        memory.restore()
    ours, theirs = full_weights(parked), full_weights(straight)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    before = reference.logprobs([batch])[0]["logprobs"]
    ParkedMemory(resident_tensors(reference.model, reference.engine, reference.device)).restore()
    assert torch.equal(reference.logprobs([batch])[0]["logprobs"], before)
    reference.offload(), reference.reload()  # nothing to do on a CPU
