"""Sketched gradients: equal to plain autograd's where they are exact, whatever the cut, and the model is left as it was."""

import pytest
import torch

from openrl_reason.errors import ConfigError
from openrl_reason.workers.gradients import GradientSketch, sketched_gradient
from openrl_reason.workers.model_config import ModelConfig, ScalarModelConfig
from openrl_reason.workers.model_worker import ModelWorker
from tests.helpers_models import random_batch, supervised_loss, write_tiny_model

LENGTHS = [5, 17, 30, 3, 9, 40, 12]
CUTS = [[[0, 1, 2, 3, 4, 5, 6]], [[i] for i in range(7)], [[6, 2], [], [5], [0, 4, 1, 3]]]
EXACT = 1 << 20


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def path(request, tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "m", tied=request.param)


def plain_gradient(path, batch):
    """Of transformers' own forward, one sequence after the other."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for index in range(batch.num_sequences):
        one = batch.select([index])
        logprobs = model(input_ids=one.token_ids[None]).logits[0, :-1].log_softmax(-1).gather(1, one.token_ids[1:, None])[:, 0]
        (-(logprobs * one.action_mask[1:]).sum() / batch.num_actions).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def sketch(worker, batch, cut=None, size=EXACT, seed=3):
    pieces = batch.split(cut) if cut else [batch]
    return worker.gradient_sketch(pieces, supervised_loss, {"actions": float(batch.num_actions)}, size=size, seed=seed)


def test_products_of_gradients_are_autograds_and_the_model_stays_as_it_was(path):
    worker = ModelWorker(ModelConfig(path=path, dtype="float32"))
    batches = [random_batch(LENGTHS, seed=seed) for seed in (0, 1)]
    exact = [plain_gradient(path, batch) for batch in batches]
    before = {name: tensor.clone() for name, tensor in worker.named_full_tensors()}
    modes = [module.training for module in worker.model.modules()]
    for cut in CUTS:
        found = [sketch(worker, batch, cut) for batch in batches]
        assert all(one.norm_error < 1e-5 for one in found), "nothing collides"
        for i, j in ((0, 0), (0, 1), (1, 1)):
            product = found[i].sketch.double().dot(found[j].sketch.double())
            assert float(product) == pytest.approx(float(exact[i].double().dot(exact[j].double())), rel=1e-4)
    assert all(torch.equal(before[name], tensor) for name, tensor in worker.named_full_tensors())
    assert not any(p.requires_grad or p.grad is not None for p in worker.model.parameters())
    assert [module.training for module in worker.model.modules()] == modes


def test_ranks_add_up_and_a_sketch_too_small_says_so(path):
    worker = ModelWorker(ModelConfig(path=path, dtype="float32"))
    batch = random_batch(LENGTHS)
    size = 1 << 10
    straight = sketch(worker, batch, size=size)
    denominators = {"actions": float(batch.num_actions)}
    parts = [
        worker.gradient_sketch(batch.split(plan), supervised_loss, denominators, size=size, seed=3) for plan in ([[0, 1], [2]], [[3, 4], [5, 6]])
    ]
    total = GradientSketch.total(parts)
    assert torch.allclose(total.sketch, straight.sketch, rtol=1e-4, atol=1e-6) and total.norm_error == max(part.norm_error for part in parts)
    norm = float(plain_gradient(path, batch).double().norm())
    assert 1e-6 < straight.norm_error < 6 * (2 / size) ** 0.5
    assert float(straight.sketch.double().norm()) == pytest.approx(norm, rel=3 * (2 / size) ** 0.5)


def test_checkpointed_activations_give_the_same_gradient(path):
    batch = random_batch([9, 14])
    plain, saving = (sketch(ModelWorker(ModelConfig(path=path, dtype="float32", gradient_checkpointing=on)), batch) for on in (False, True))
    assert torch.allclose(plain.sketch, saving.sketch, rtol=1e-4, atol=1e-6)


def test_a_loss_that_raises_leaves_the_model_as_it_was(path):
    def broken(outputs, batch, denominators):
        raise ZeroDivisionError

    worker = ModelWorker(ModelConfig(path=path, dtype="float32"))
    with pytest.raises(ZeroDivisionError):
        sketched_gradient(worker.model, [random_batch([9])], broken, {}, size=8, seed=0)
    assert not any(p.requires_grad or p._post_accumulate_grad_hooks for p in worker.model.parameters())


def test_models_without_a_whole_gradient_on_each_rank_are_refused(path):
    for config in (ModelConfig(path=path, dtype="float32", zero_stage=3), ScalarModelConfig(path=path, dtype="float32")):
        with pytest.raises(ConfigError, match="only run, at zero_stage 0, 1 or 2"):
            sketch(ModelWorker(config), random_batch([9]))
