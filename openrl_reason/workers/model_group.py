"""A model on N Ray actors, driven as if it were one object: global batches in, flat tensors in the same order out."""

from __future__ import annotations

import importlib
import os
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from openrl_reason.core.batch import TokenBatch, unsplit_tokens
from openrl_reason.core.partition import plan_micro_batches
from openrl_reason.environment import lasting_imports
from openrl_reason.workers.actor_group import ActorGroup
from openrl_reason.workers.model_config import ModelConfig
from openrl_reason.workers.network import listening_store, node_address

if TYPE_CHECKING:
    from openrl_reason.workers.gradients import GradientSketch
    from openrl_reason.workers.model_worker import LossFunction

_INHERITED_ENVIRONMENT = ("HF_HUB_OFFLINE", "HF_HOME", "TRANSFORMERS_OFFLINE", "TOKENIZERS_PARALLELISM")


class Placement(Protocol):
    def actor_options(self, role: str, index: int) -> dict[str, Any]: ...


class AnyPlacement:
    """Lets Ray put every rank where it likes, with the given resources."""

    def __init__(self, num_cpus: float = 1.0, num_gpus: float = 0.0):
        self.options = {"num_cpus": num_cpus, "num_gpus": num_gpus}

    def actor_options(self, role: str, index: int) -> dict[str, Any]:
        return dict(self.options)


class _ModelActor:
    """What runs in each Ray actor: a shell around ModelWorker, which is only imported here."""

    store: Any = None

    def describe(self, rank: int) -> dict[str, Any]:
        address, port = node_address(), 0
        if rank == 0:  # the meeting place of all ranks; it listens from now on, so nobody can take its port
            self.store = listening_store(address)
            port = self.store.port
        # Ray redirects a worker's stderr to its log, so the link is the log's path.
        return {"pid": os.getpid(), "address": address, "port": port, "log": os.readlink("/proc/self/fd/2")}

    def start(self, config: ModelConfig, environment: dict[str, str], rank_0: dict[str, Any], **kwargs: Any) -> None:
        os.environ.update(environment)
        os.environ["OMP_NUM_THREADS"] = str(config.threads_per_rank)
        with lasting_imports():
            from openrl_reason.workers.deepspeed_engine import import_deepspeed
            from openrl_reason.workers.model_worker import ModelWorker

            import_deepspeed()
            importlib.import_module("transformers.models.auto.modeling_auto")
        rendezvous = {"master_addr": rank_0["address"], "master_port": rank_0["port"], "store": self.store}
        self.worker = ModelWorker(config, **rendezvous, **kwargs)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return getattr(self.worker, method)(*args, **kwargs)
        except Exception:
            traceback.print_exc()  # into this rank's log: the driver shows one line and says where this is
            raise


@dataclass
class PendingTokens:
    """Per-token numbers under way: log-probabilities or values. ``result()`` waits for them."""

    group: ModelGroup
    method: str
    batch: TokenBatch
    plan: list[list[list[int]]]
    refs: list[Any]

    def result(self) -> dict[str, Tensor]:
        per_rank = self.group._gather(self.refs, self.method)
        pieces = [piece for rank_pieces in per_rank for piece in rank_pieces]
        index_lists = [indices for rank_plan in self.plan for indices in rank_plan]
        return {name: unsplit_tokens([piece[name] for piece in pieces], index_lists, self.batch) for name in pieces[0]}


class ModelGroup(ActorGroup):
    """N ranks of one model. Any method may raise WorkerError, see ``ActorGroup``."""

    def __init__(self, config: ModelConfig, role: str, actors: list[Any], timeout_s: float):
        super().__init__(role, actors, timeout_s)
        self.config = config

    @classmethod
    def start(
        cls,
        config: ModelConfig,
        *,
        role: str = "policy",
        placement: Placement | None = None,
        seed: int = 0,
        total_steps: int | None = None,
        timeout_s: float = 1800.0,
        wait: bool = True,
    ) -> ModelGroup:
        """Starts ``config.num_ranks`` actors named ``<role>-rank<i>`` and loads the model in each. ``total_steps=None``: never trained.

        ``timeout_s``: a call that no rank finishes within this time counts as hung. ``wait=False`` returns while the ranks still load, so
        that several groups and engines load at once; ``ready()``, or the first call, waits for them.
        """
        import ray

        placement = placement or AnyPlacement()
        remote_class = ray.remote(_ModelActor)
        actors = []
        for rank in range(config.num_ranks):
            options = {"name": f"{role}-rank{rank}", "max_restarts": 0} | placement.actor_options(role, rank)
            actors.append(remote_class.options(**options).remote())
        group = cls(config, role, actors, timeout_s)
        group._describing = [actor.describe.remote(rank) for rank, actor in enumerate(actors)]
        environment = {name: os.environ[name] for name in _INHERITED_ENVIRONMENT if name in os.environ}
        group._starting = [
            # Ray hands rank 0's description on to every rank; the driver need not wait for it.
            actor.start.remote(
                config, environment, group._describing[0], rank=rank, world_size=len(actors), seed=seed, total_steps=total_steps, role=role,
                timeout_s=timeout_s,
            )
            for rank, actor in enumerate(actors)
        ]  # fmt: skip
        if wait:
            group.ready()
        return group

    # ---- running and training ------------------------------------------------------------------------------------------------------

    def logprobs(self, batch: TokenBatch, temperature: float = 1.0, with_entropy: bool = False, **options: bool) -> dict[str, Tensor]:
        """``{"logprobs": float32 [N]}``, with ``with_entropy`` also ``"entropy"``, in the order of ``batch``. See LanguageModel.

        ``options`` (``adapters``, ``average``, ``with_hidden``): those of ``ModelWorker.logprobs``.
        """
        return self.logprobs_async(batch, temperature, with_entropy, **options).result()

    def logprobs_async(self, batch: TokenBatch, temperature: float = 1.0, with_entropy: bool = False, **options: bool) -> PendingTokens:
        """The same, started now and waited for later: a reference model can score while others still generate."""
        return self._score("logprobs", batch, temperature, with_entropy, **options)

    def values(self, batch: TokenBatch, *, for_update: bool = False, units: Sequence[int] | None = None) -> Tensor:
        """float32 [N] of a scalar model: the value of the state before each token, 0.0 at a sequence's first.

        ``for_update``: the next call is ``update`` with the same batch and ``units``, and goes on from this forward pass (see ``rounds``).
        """
        return self._score("values", batch, units=units, **({"for_update": True} if for_update else {})).result()["values"]

    def values_async(self, batch: TokenBatch) -> PendingTokens:
        """The same, started now: ``result()["values"]``. A critic can look at finished trajectories while others still generate."""
        return self._score("values", batch)

    def scores(self, batch: TokenBatch) -> Tensor:
        """float32 [N] of a scalar model: the score of everything up to and with each token (rewards of responses, steps and prefixes)."""
        return self._score("values", batch, shifted=False).result()["values"]

    def prefix_scores(self, prefixes: Sequence[Sequence[Sequence[int]]], max_bytes: int) -> list[list[float]]:
        """Of a scalar model, after the last token of each of ``prefixes[rank]``; what each rank keeps of them makes continuing them cheap."""
        refs = [actor.call.remote("prefix_scores", own, max_bytes) for actor, own in zip(self._alive(), prefixes, strict=True)]
        return self._gather(refs, "prefix_scores")

    def _score(self, method: str, batch: TokenBatch, *args: Any, units: Sequence[int] | None = None, **kwargs: Any) -> PendingTokens:
        # Scoring needs the tokens alone; nothing else travels.
        bare = TokenBatch(batch.token_ids, batch.cu_seqlens, batch.action_mask, batch.step_ids, batch.behaviour_logprobs)
        plan = self._plan(bare, units)
        refs = [
            actor.call.remote(method, bare.split(rank_plan), *args, **kwargs)
            for actor, rank_plan in zip(self._alive(), plan, strict=True)
        ]  # fmt: skip
        return PendingTokens(self, method, bare, plan, refs)

    def update(
        self,
        batch: TokenBatch,
        loss_fn: LossFunction,
        denominators: dict[str, float],
        temperature: float = 1.0,
        with_entropy: bool = False,
        *,
        units: Sequence[int] | None = None,
    ) -> dict[str, float]:
        """One optimiser step on the whole batch, however it is cut. Returns ModelWorker.update's metrics, global over the batch.

        ``units``: sizes of runs of consecutive sequences that must meet in one micro-batch, in order (2 for each preference pair).
        """
        return self.update_keeping(batch, loss_fn, denominators, temperature, with_entropy, units=units)[0]

    def update_keeping(
        self,
        batch: TokenBatch,
        loss_fn: LossFunction,
        denominators: dict[str, float],
        temperature: float = 1.0,
        with_entropy: bool = False,
        keep: Sequence[str] = (),
        *,
        units: Sequence[int] | None = None,
        last: bool = True,
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """``update``, and the tensors [N] of ``ModelOutput`` that ``keep`` names, as the weights before the step had them.

        ``last=False``: more of the same batch follows in another call (``denominators`` are the whole batch's all along). The gradient is
        kept, no step is taken, and there are no metrics yet.
        """
        plan = self._plan(batch, units)
        refs = [
            actor.call.remote("update_keeping", batch.split(rank_plan), loss_fn, denominators, temperature, with_entropy, keep, last)
            for actor, rank_plan in zip(self._alive(), plan, strict=True)
        ]
        results = self._gather(refs, "update")
        pieces = [piece for _, kept in results for piece in kept]
        index_lists = [indices for rank_plan in plan for indices in rank_plan]
        return results[0][0], {name: unsplit_tokens([piece[name] for piece in pieces], index_lists, batch) for name in keep}

    def rounds(self, batch: TokenBatch) -> list[tuple[list[int], list[int]]]:
        """The batch in parts of one micro-batch for each rank: (sequences, their ``units`` for ``values`` and ``update_keeping``).

        For two models that need one another's forward pass before either can run backward: round by round, each holds the activations
        of one micro-batch, and no forward pass is taken twice.
        """
        turns = [[micro for micro in turn if micro] for turn in zip(*self._plan(batch), strict=True)]
        return [([index for micro in turn for index in micro], [len(micro) for micro in turn]) for turn in turns]

    def gradient_sketch(
        self,
        batch: TokenBatch,
        loss_fn: LossFunction,
        denominators: dict[str, float],
        temperature: float = 1.0,
        with_entropy: bool = False,
        *,
        size: int,
        seed: int,
    ) -> GradientSketch:
        """The gradient of the loss on the whole batch as a sketch of ``size`` numbers, without an optimiser step (see ``workers/gradients.py``).

        Raises ConfigError for a model that is trained, partitioned by ZeRO-3, or a scalar one.
        """
        from openrl_reason.workers.gradients import GradientSketch

        refs = [
            actor.call.remote("gradient_sketch", batch.split(rank_plan), loss_fn, denominators, temperature, with_entropy, size=size, seed=seed)
            for actor, rank_plan in zip(self._alive(), self._plan(batch), strict=True)
        ]
        return GradientSketch.total(self._gather(refs, "gradient_sketch"))

    def _plan(self, batch: TokenBatch, units: Sequence[int] | None = None) -> list[list[list[int]]]:
        lengths, first = batch.lengths.tolist(), [0, *accumulate(units if units is not None else [1] * batch.num_sequences)]
        if first[-1] != len(lengths):
            raise ValueError(f"the units hold {first[-1]} sequences, the batch has {len(lengths)}")
        members = [range(start, end) for start, end in pairwise(first)]
        plan = plan_micro_batches([sum(lengths[i] for i in unit) for unit in members], self.num_ranks, self.config.tokens_per_micro_batch)
        return [[[index for unit in micro for index in members[unit]] for micro in rank] for rank in plan]

    def start_average(self, decay: float) -> None:
        """A moving average of the trained weights from now on; ``logprobs(average=True)`` scores with it. Not under ZeRO-3."""
        self._call_all("start_average", decay)

    def set_reference_head(self, path: str, direction: str) -> None:
        """The output head of the reference at ``path``, so that ``tokens["ref_hidden"]`` of a batch gives ``outputs.kl`` in updates."""
        self._call_all("set_reference_head", path, direction)

    def set_schedule(self, total_steps: int, step: int) -> None:
        """From now on the learning-rate schedule spans ``total_steps`` and stands before ``step``: for training in rounds, each with its own."""
        self._call_all("set_schedule", total_steps, step)

    def skip_updates(self, count: int) -> None:
        """The learning-rate schedule goes on as if ``count`` updates had been taken: for planned ones that have nothing to learn from."""
        self._call_all("skip_updates", count)

    # ---- weights and checkpoints ---------------------------------------------------------------------------------------------------

    def save_state(self, folder: str | Path, step: int | None = None) -> None:
        """Every rank writes its files into ``folder`` (on a file system that all nodes share)."""
        self._call_all("save_state", str(folder), step)

    def load_state(self, folder: str | Path) -> int:
        """Restores every rank; returns the number of optimiser steps taken. Raises CheckpointError if the checkpoint does not fit."""
        return self._call_all("load_state", str(folder))[0]

    def export_hf(self, folder: str | Path, dtype: str | None = None) -> None:
        """Writes a folder that ``from_pretrained`` and vLLM load as it is."""
        self._call_all("export_hf", str(folder), dtype)

    def publish_weights(self, sender: Any, version: int) -> Any:
        """Rank 0 sends all weights through ``sender.send(named tensors, version)``; returns the manifest that it returned."""
        return self._call_all("publish_weights", sender, version)[0]

    def copy_weights_from(self, other: ModelGroup) -> None:
        """Takes over the weights of a group of the same architecture (reference refresh), through the object store; LoRA arrives merged."""
        refs = [actor.call.remote("collect_weights") for actor in other._alive()]
        # The weights stay in the object store: only their reference passes through the driver.
        loads = [actor.call.remote("load_collected", refs[0]) for actor in self._alive()]
        other._wait(refs, "collect_weights")
        self._gather(loads, "load_collected")

    def offload(self) -> None:
        """Leaves the GPU to someone else. Nothing on a CPU."""
        self._call_all("offload")

    def reload(self) -> None:
        """Undoes ``offload``."""
        self._call_all("reload")
