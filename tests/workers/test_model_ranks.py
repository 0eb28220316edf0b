"""Two ranks compute what one computes, at every ZeRO stage. One pair of processes runs all the cases; the tests read what it left."""

import json
import pickle
import socket
from pathlib import Path

import pytest
import torch

from openrl_reason.core.partition import plan_micro_batches
from openrl_reason.workers.model_config import LoraConfig, ModelConfig, TrainedModelConfig
from openrl_reason.workers.model_worker import ModelWorker
from tests.helpers_models import full_weights, random_batch, relative_difference, supervised_loss, write_tiny_model

LENGTHS = [5, 17, 30, 3, 9, 40, 12]
STAGES = (0, 1, 2, 3)
MODELS = ("tied", "untied")


def config(folder, name, stage, **settings):
    settings = dict(dtype="float32", lr=1e-3, warmup_ratio=0.0, schedule="constant") | settings
    return TrainedModelConfig(path=str(Path(folder) / name), zero_stage=stage, **settings)


def pieces_of(rank, world_size, seed):
    batch = random_batch(LENGTHS, seed=seed)
    plan = plan_micro_batches(LENGTHS, world_size, 48)
    return batch.split(plan[rank]), {"actions": float(batch.num_actions)}, batch


def train(worker, seeds):
    history = []
    for seed in seeds:
        pieces, denominators, _ = pieces_of(worker.rank, worker.world_size, seed)
        metrics = worker.update(pieces, supervised_loss, denominators)
        history.append({name: value for name, value in metrics.items() if not name.startswith("seconds/")})
    return history


def gradients(worker):
    """The accumulated gradient of every parameter by name, from Adam's first moment after one step: collective."""
    from deepspeed.utils import safe_get_full_optimizer_state

    optimizer = worker.engine.optimizer
    if worker.config.zero_stage == 0:
        return {name: optimizer.state[p]["exp_avg"].clone() for name, p in worker.model.named_parameters() if p.requires_grad}
    return {name: safe_get_full_optimizer_state(p, "exp_avg").clone() for name, p in worker.model.named_parameters() if p.requires_grad}


class Collector:
    def send(self, tensors, version):
        return {name: tensor.clone() for name, tensor in tensors}, version


def run_rank(rank, world_size, port, folder):
    torch.set_num_threads(1)
    common = dict(rank=rank, world_size=world_size, master_port=port, seed=5)
    results = {}
    for name in MODELS:
        for stage in STAGES:
            worker = ModelWorker(config(folder, name, stage), total_steps=8, **common)
            metrics = train(worker, [0])
            gradient = gradients(worker)
            metrics += train(worker, [1, 2])
            scores = worker.logprobs(pieces_of(rank, world_size, 0)[0])
            published = worker.publish_weights(Collector(), 3)
            assert (published is None) == (rank != 0)
            worker.export_hf(Path(folder) / f"export-{world_size}-{name}-{stage}")
            results[name, stage] = metrics, gradient, full_weights(worker), scores, published
    for stage in STAGES:  # resumed on the same number of ranks, LoRA with dropout in bfloat16: the hardest mixture
        settings = dict(dtype="bfloat16", lora=LoraConfig(rank=4, dropout=0.2))
        straight = ModelWorker(config(folder, "tied", stage, **settings), total_steps=8, **common)
        train(straight, [0, 1])
        straight.save_state(Path(folder) / f"state-{world_size}-{stage}")
        expected = train(straight, [2, 3])
        resumed = ModelWorker(config(folder, "tied", stage, **settings), total_steps=8, **common)
        resumed.load_state(Path(folder) / f"state-{world_size}-{stage}")
        same = train(resumed, [2, 3]) == expected
        ours, theirs = full_weights(resumed), full_weights(straight)
        results["resume", stage] = same and all(torch.equal(ours[n], theirs[n]) for n in ours)
    policy = ModelWorker(config(folder, "tied", 3), total_steps=8, **common)
    train(policy, [0])
    reference = ModelWorker(ModelConfig(path=str(Path(folder) / "tied"), dtype="float32", zero_stage=3), role="reference", **common)
    collected = [policy.collect_weights()]
    torch.distributed.broadcast_object_list(collected, src=0)
    reference.load_collected(collected[0])
    batch = [random_batch([9, 20])]
    results["refresh"] = torch.equal(reference.logprobs(batch)[0]["logprobs"], policy.logprobs(batch)[0]["logprobs"])
    (Path(folder) / f"results-{world_size}-{rank}.pickle").write_bytes(pickle.dumps(results))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(one rank's results, [two ranks' results], folder)"""
    folder = tmp_path_factory.mktemp("ranks")
    for name in MODELS:
        write_tiny_model(folder / name, tied=name == "tied")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    alone = context.Process(target=run_rank, args=(0, 1, 0, str(folder)))
    alone.start()
    torch.multiprocessing.spawn(run_rank, args=(2, port, str(folder)), nprocs=2)
    alone.join()
    assert alone.exitcode == 0
    one, *two = [pickle.loads((folder / f"results-{n}-{r}.pickle").read_bytes()) for n, r in ((1, 0), (2, 0), (2, 1))]
    return one, two, folder


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_have_the_gradient_and_metrics_of_one(results, name, stage):
    one, two, _ = results
    reference, gradient, _, _, _ = one[name, 0]
    for ranks in (one, *two):
        metrics, other, _, _, _ = ranks[name, stage]
        assert other.keys() == gradient.keys()
        total = sum(float((other[n].double() - gradient[n].double()).norm() ** 2) for n in gradient) ** 0.5
        assert total <= 1e-6 * sum(float(g.double().norm() ** 2) for g in gradient.values()) ** 0.5
        for key in ("loss", "grad_norm", "logprob/max", "logprob/min"):
            assert metrics[0][key] == pytest.approx(reference[0][key], rel=1e-6)
            assert metrics[2][key] == pytest.approx(reference[2][key], rel=1e-5)
    assert two[0][name, stage][0] == two[1][name, stage][0], "every rank must report the same metrics"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_end_with_the_weights_of_one_and_publish_and_export_them(results, name, stage):
    from safetensors.torch import load_file

    one, two, folder = results
    expected = one[name, 0][2]
    for ranks in (one, *two):
        assert relative_difference(ranks[name, stage][2], expected) < 1e-5
    published, version = two[0][name, stage][4]
    exported = load_file(folder / f"export-2-{name}-{stage}" / "model.safetensors")
    assert version == 3 and ("lm_head.weight" in exported) is (name == "untied")
    for tensors in (published, exported):
        assert tensors.keys() == expected.keys() and all(torch.equal(tensors[n], two[0][name, stage][2][n]) for n in tensors)
    assert json.loads((folder / f"export-2-{name}-{stage}" / "config.json").read_text())["model_type"] == "qwen2"


@pytest.mark.parametrize("stage", STAGES)
def test_every_rank_scores_its_own_micro_batches(results, stage):
    from openrl_reason.core.batch import unsplit_tokens

    one, two, _ = results
    batch = random_batch(LENGTHS, seed=0)

    def whole(ranks, num_ranks):
        pieces = [piece["logprobs"] for rank in ranks for piece in rank["tied", stage][3]]
        lists = [indices for plan in plan_micro_batches(LENGTHS, num_ranks, 48) for indices in plan]
        return unsplit_tokens(pieces, lists, batch)

    torch.testing.assert_close(whole(two, 2), whole([one], 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_ranks_go_on_bit_by_bit(results, stage):
    one, two, _ = results
    assert one["resume", stage] and two[0]["resume", stage] and two[1]["resume", stage]


def test_a_partitioned_reference_takes_over_the_weights_of_a_partitioned_policy(results):
    one, two, _ = results
    assert one["refresh"] and two[0]["refresh"] and two[1]["refresh"]
