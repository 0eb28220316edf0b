"""KTO on two ranks is KTO on one, reference point included, and goes on bit by bit from a checkpoint. One pair of processes runs it all."""

import pickle
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

from openrl_reason.algorithms.kto import KTOLossConfig, LabelLoss, counts_of, mismatched, other_questions
from openrl_reason.algorithms.reference_scores import response_logprobs
from openrl_reason.core.batch import TokenBatch, unsplit_tokens
from openrl_reason.core.losses import kto_reference_point
from openrl_reason.core.partition import plan_micro_batches
from openrl_reason.workers.model_config import TrainedModelConfig
from openrl_reason.workers.model_worker import ModelWorker
from tests.algorithms.kto_helpers import Responses
from tests.helpers_models import full_weights, relative_difference, write_tiny_model

STAGES = (2,)


def score(worker, batch):
    """Summed log-probs [B], as a model group has them: every rank scores its part, and the parts come together."""
    plan = plan_micro_batches(batch.lengths.tolist(), worker.world_size, 60)
    pieces = [piece["logprobs"] for piece in worker.logprobs(batch.split(plan[worker.rank]))]
    everyone = [pieces]
    if worker.world_size > 1:
        everyone = [None] * worker.world_size
        torch.distributed.all_gather_object(everyone, pieces)
    lists = [indices for rank_plan in plan for indices in rank_plan]
    return response_logprobs(unsplit_tokens([piece for part in everyone for piece in part], lists, batch), batch)


class Run:
    """The steps of a KTO run on one rank of a group."""

    def __init__(self, worker):
        self.worker, self.store = worker, Responses(5, 4)
        rows = np.arange(len(self.store))
        self.partners = other_questions(rows, rows, self.store.questions, 0)
        batches = self.batches(rows)
        self.reference = [score(worker, batch) for batch in batches]

    def batches(self, rows):
        own, others = self.store.trajectories(rows), self.store.trajectories(self.partners[rows])
        mixtures = [mismatched(row, other, 64) for row, other in zip(own, others, strict=True)]
        return TokenBatch.from_trajectories(own), TokenBatch.from_trajectories(mixtures)

    def steps(self, numbers):
        history = []
        for number in numbers:
            rows = np.random.default_rng(number).permutation(len(self.store))[:8]
            batch, mixtures = self.batches(rows)
            kl = float(kto_reference_point(score(self.worker, mixtures), self.reference[1][rows]))
            labels = torch.from_numpy(self.store.labels[rows].astype(np.float32))
            batch = batch.with_sequences(ref_logprobs=self.reference[0][rows], desirable=labels)
            plan = plan_micro_batches(batch.lengths.tolist(), self.worker.world_size, 60)
            loss = LabelLoss(KTOLossConfig(beta=0.5), kl)
            metrics = self.worker.update(batch.split(plan[self.worker.rank]), loss, counts_of(self.store.labels[rows]))
            history.append({name: value for name, value in metrics.items() if not name.startswith("seconds/")} | {"kl": kl})
        return history


def run_rank(rank, world_size, port, folder):
    torch.set_num_threads(1)
    results = {}
    for stage in STAGES:

        def start(stage=stage):
            config = TrainedModelConfig(path=f"{folder}/tiny", dtype="float32", lr=3e-3, warmup_ratio=0.0, schedule="constant", zero_stage=stage)
            return ModelWorker(config, total_steps=8, rank=rank, world_size=world_size, master_port=port, seed=5)

        straight, state = Run(start()), Path(folder) / f"state-{world_size}-{stage}"
        history = straight.steps([0, 1])
        straight.worker.save_state(state)
        expected = straight.steps([2, 3])
        resumed = Run(start())  # the reference is scored before the checkpoint is loaded
        resumed.worker.load_state(state)
        same = resumed.steps([2, 3]) == expected
        ours, theirs = full_weights(resumed.worker), full_weights(straight.worker)
        results[stage] = history + expected, theirs, same and all(torch.equal(ours[name], theirs[name]) for name in ours)
    (Path(folder) / f"results-{world_size}-{rank}.pickle").write_bytes(pickle.dumps(results))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(one rank's results, [two ranks' results])"""
    folder = tmp_path_factory.mktemp("ranks")
    write_tiny_model(folder / "tiny")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = torch.multiprocessing.get_context("spawn").Process(target=run_rank, args=(0, 1, 0, str(folder)))
    alone.start()
    torch.multiprocessing.spawn(run_rank, args=(2, port, str(folder)), nprocs=2)
    alone.join()
    assert alone.exitcode == 0
    one, *two = [pickle.loads((folder / f"results-{n}-{r}.pickle").read_bytes()) for n, r in ((1, 0), (2, 0), (2, 1))]
    return one, two


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_have_the_reference_points_metrics_and_weights_of_one(results, stage):
    one, two = results
    history, weights, _ = one[stage]
    assert [record["kl"] for record in history][0] == pytest.approx(0.0, abs=1e-5) and history[-1]["kl"] > 0.01
    for ranks in (one, *two):
        found, other, _ = ranks[stage]
        for record, expected in zip(found, history, strict=True):
            for name in ("train/loss", "kto/reward_desirable", "kto/reward_undesirable", "kl", "grad_norm"):
                assert record[name] == pytest.approx(expected[name], rel=2e-4, abs=1e-5), name
        assert relative_difference(other, weights) < 1e-4
    assert two[0][stage][0] == two[1][stage][0], "every rank reports the same"


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_goes_on_bit_by_bit(results, stage):
    one, two = results
    assert one[stage][2] and two[0][stage][2] and two[1][stage][2]
