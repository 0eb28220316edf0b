"""One rank of a model group: a plain class around a DeepSpeed engine, usable in any process, with or without Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from openrl_reason.atomic import naming_disk_errors
from openrl_reason.core.seeds import derive_seed
from openrl_reason.errors import ConfigError
from openrl_reason.models.attention import choose_attention
from openrl_reason.models.loading import check_vocabulary, load_causal_lm, load_output_head, load_tokenizer
from openrl_reason.models.policy import LanguageModel, ModelOutput
from openrl_reason.models.scalar_model import ScalarModel, load_scalar_model
from openrl_reason.workers.deepspeed_engine import ParkedMemory, build_engine, clips_itself, init_process_group, resident_tensors
from openrl_reason.workers.metric_sum import MetricSum
from openrl_reason.workers.model_config import ModelConfig, ScalarModelConfig, TrainedModelConfig, learning_rate
from openrl_reason.workers.model_weights import load_full_tensors, named_full_tensors
from openrl_reason.workers.weight_average import WeightAverage

if TYPE_CHECKING:
    from openrl_reason.core.batch import TokenBatch
    from openrl_reason.models.prefix_scores import PrefixScorer
    from openrl_reason.workers.gradients import GradientSketch

LossFunction = Callable[[ModelOutput, "TokenBatch", dict[str, float]], tuple[Tensor, dict[str, Any]]]
"""(outputs, micro_batch, denominators) -> (loss, metrics). The loss is a contribution to the global loss: a sum over the micro-batch,
divided by a denominator of the whole batch. Metrics add up over micro-batches and ranks, unless their names end in ``/max`` or ``/min``."""


class ModelWorker:
    """One data-parallel rank. Every method is called on all ranks alike, with the same number of micro-batches.

    A ``ScalarModelConfig`` makes it a model with one number per token (critic, reward model), which has ``values`` instead of ``logprobs``.
    ``total_steps``: optimiser steps of the whole run, which the learning-rate schedule needs; None: the model is only run. ``seed`` draws
    the initialisation of LoRA and of a new head (alike on all ranks) and dropout (different on each).
    ``store``: rank 0 may already hold the rendezvous that listens at ``master_addr:master_port``.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        master_addr: str = "127.0.0.1",
        master_port: int = 0,
        seed: int = 0,
        total_steps: int | None = None,
        role: str = "policy",
        timeout_s: float = 1800.0,
        store: torch.distributed.Store | None = None,
    ):
        torch.set_num_threads(config.threads_per_rank)
        if total_steps is not None and config.dtype == "bfloat16" and config.zero_stage == 0:
            # DeepSpeed's stage 0 adds gradients up in bfloat16, where the small ones of many micro-batches vanish, and its Adam has counted one
            # step before the first. Stage 1 is the same otherwise.
            config = replace(config, zero_stage=1)
        self.config, self.rank, self.world_size, self.role = config, rank, world_size, role
        self.total_steps, self.step, self.trained = total_steps, 0, total_steps is not None
        if self.trained and not isinstance(config, TrainedModelConfig):
            raise ConfigError(f"the {role} model is to be trained, so its config must be a TrainedModelConfig, not {type(config).__name__}")
        self._parked: ParkedMemory | None = None
        self._held: list[ModelOutput] = []
        self._prefix_scorer: PrefixScorer | None = None
        self._metrics, self._seconds = MetricSum(), 0.0  # of the optimiser step under way
        self.average: WeightAverage | None = None
        self.device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(seed)
        self.tokenizer = load_tokenizer(config.path, trust_remote_code=config.trust_remote_code)
        self.model = self._build_model(seed)
        self.engine = None
        if self.trained or config.zero_stage == 3:
            init_process_group(rank, world_size, master_addr, master_port, self.device, timeout_s, store)
            engine_config = config if self.trained else _inference_config(config)
            self.engine = build_engine(self.model, engine_config, self.device, self.model.model.config.hidden_size)
        else:
            # Without an optimiser and without partitioned parameters, DeepSpeed has nothing to add.
            self.model.to(self.device).requires_grad_(False)
        torch.manual_seed(derive_seed(seed, "dropout", rank))

    def _build_model(self, seed: int) -> LanguageModel | ScalarModel:
        config = self.config
        attn_impl = choose_attention(config.attention, self.device)
        settings = {"attn_implementation": attn_impl, "trust_remote_code": config.trust_remote_code}
        is_scalar = isinstance(config, ScalarModelConfig)
        if is_scalar:
            model = load_scalar_model(config.path, config.dtype, head_init=config.head_init, seed=derive_seed(seed, "head"), **settings)
        else:
            model = load_causal_lm(config.path, config.dtype, **settings)
        check_vocabulary(self.tokenizer, model.config, config.path)
        if isinstance(config, TrainedModelConfig) and config.lora.rank:
            from openrl_reason.models.lora import add_lora

            add_lora(model, config.lora, also_train=("score",) if is_scalar else ())
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if is_scalar:
            return ScalarModel(model, attn_impl=attn_impl)
        return LanguageModel(model, attn_impl=attn_impl, head_chunk_tokens=config.head_chunk_tokens)

    # ---- running the model ---------------------------------------------------------------------------------------------------------

    def logprobs(
        self,
        micro_batches: Sequence[TokenBatch],
        temperature: float = 1.0,
        with_entropy: bool = False,
        *,
        adapters: bool = True,
        average: bool = False,
        with_hidden: bool = False,
    ) -> list[dict[str, Tensor]]:
        """Per micro-batch, on the CPU: ``{"logprobs": [N]}`` and with ``with_entropy`` also ``"entropy": [N]``; 0.0 outside actions.

        ``adapters=False`` scores with the model as it was before LoRA: the reference policy without a second copy. ``average`` scores with
        the moving average of the weights. ``with_hidden`` adds ``"hidden"`` [N, H], the state that predicts each action, in the model's
        dtype: the ``ref_hidden`` of a model that takes its KL to this one.
        """
        from openrl_reason.models.lora import adapters_disabled

        forward = self.engine or self.model
        forward.eval()
        results = []
        assert not average or self.average is not None, "start_average comes first"
        weights = self.average.swapped() if average else nullcontext()
        with torch.no_grad(), weights, nullcontext() if adapters else adapters_disabled(self.model):
            for batch in micro_batches:
                token_ids, cu_seqlens = batch.token_ids.to(self.device), batch.cu_seqlens.to(self.device)
                mask = batch.action_mask.to(self.device)
                scores = forward(token_ids, cu_seqlens, temperature, with_entropy, mask, None, with_hidden)
                found = {"logprobs": scores[0]} | ({"entropy": scores[1]} if with_entropy else {}) | ({"hidden": scores[2]} if with_hidden else {})
                results.append({name: tensor.cpu() for name, tensor in found.items()})
        return results

    def values(self, micro_batches: Sequence[TokenBatch], *, shifted: bool = True, for_update: bool = False) -> list[dict[str, Tensor]]:
        """Per micro-batch, on the CPU: ``{"values": float32 [N]}`` of a scalar model at every token, see ``ScalarModel.forward``.

        ``for_update``: the call after this one is ``update`` with the same micro-batches. It goes on from this forward pass, whose activations
        stay until then, instead of taking one of its own.
        """
        assert isinstance(self.model, ScalarModel), f"the {self.role} model has no scalar head"
        if for_update:
            assert shifted and self.engine is not None and not self._held
            start = time.perf_counter()
            self.engine.train()
            self._held = [self._outputs(batch.to(self.device), 1.0, False) for batch in micro_batches]
            found = [{"values": outputs.values.detach().cpu()} for outputs in self._held]
            self._seconds += time.perf_counter() - start
            return found
        forward = self.engine or self.model
        forward.eval()
        with torch.no_grad():
            return [{"values": forward(b.token_ids.to(self.device), b.cu_seqlens.to(self.device), shifted).cpu()} for b in micro_batches]

    def prefix_scores(self, prefixes: Sequence[Sequence[int]], max_bytes: int) -> list[float]:
        """What a scalar model that is only run says after the last token of each prefix. Keys and values of up to ``max_bytes`` are kept for
        prefixes that continue these (see ``PrefixScorer``)."""
        from openrl_reason.models.prefix_scores import PrefixScorer

        assert isinstance(self.model, ScalarModel) and self.engine is None, f"the {self.role} model is no scalar model that is only run"
        if self._prefix_scorer is None:
            self._prefix_scorer = PrefixScorer(self.model.eval(), max_bytes=max_bytes, max_tokens=self.config.tokens_per_micro_batch)
        return self._prefix_scorer.scores(prefixes)

    def update(
        self,
        micro_batches: Sequence[TokenBatch],
        loss_fn: LossFunction,
        denominators: dict[str, float],
        temperature: float = 1.0,
        with_entropy: bool = False,
    ) -> dict[str, float]:
        """One optimiser step on the gradient summed over all micro-batches of all ranks. Collective.

        Returns the metrics of the loss over the global batch, alike on every rank, and ``grad_norm`` (before clipping), ``lr``,
        ``skipped_update`` (1.0 if the gradient was not finite and the step was left out), ``seconds/forward_backward``,
        ``seconds/optimizer`` (the slowest rank's). A loss that raises leaves half a gradient behind: the worker cannot be used after that.
        ``tokens["ref_hidden"]`` [N, H'] of the micro-batches makes ``outputs.kl`` (``set_reference_head`` comes first).
        """
        return self.update_keeping(micro_batches, loss_fn, denominators, temperature, with_entropy)[0]

    def update_keeping(
        self,
        micro_batches: Sequence[TokenBatch],
        loss_fn: LossFunction,
        denominators: dict[str, float],
        temperature: float = 1.0,
        with_entropy: bool = False,
        keep: Sequence[str] = (),
        last: bool = True,
    ) -> tuple[dict[str, float], list[dict[str, Tensor]]]:
        """``update``, and of each micro-batch the tensors of ``ModelOutput`` that ``keep`` names: what the weights before the step said.

        ``last=False``: more micro-batches follow in another call. The gradient is kept, and there are no metrics yet.
        """
        assert self.trained and self.engine is not None, f"the {self.role} model was started without total_steps: it can only be run"
        assert len(self._held) in (0, len(micro_batches)), "values(for_update=True) saw other micro-batches"
        start, held, kept = time.perf_counter(), self._held, []
        self._held = []
        self.engine.train()
        for index, batch in enumerate(micro_batches):
            self.engine.set_gradient_accumulation_boundary(last and index == len(micro_batches) - 1)
            batch = batch.to(self.device)
            outputs = held.pop(0) if held else self._outputs(batch, temperature, with_entropy)
            loss, loss_metrics = loss_fn(outputs, batch, denominators)
            if not loss.requires_grad:  # a micro-batch without actions must still run its backward: other ranks wait in it
                loss = loss + 0.0 * (outputs.logprobs if outputs.values is None else outputs.values).sum()
            # DeepSpeed averages over ranks, but the denominator is already the global batch's.
            self.engine.backward(loss * self.world_size, scale_wrt_gas=False)
            self._metrics.add(loss_metrics)
            kept.append({name: getattr(outputs, name).detach().cpu() for name in keep})
        middle = time.perf_counter()
        self._seconds += middle - start
        if not last:
            return {}, kept
        metrics, seconds = self._metrics, self._seconds
        self._metrics, self._seconds = MetricSum(), 0.0
        optimizer_metrics = self._optimizer_step()
        metrics.add({"seconds/forward_backward/max": seconds, "seconds/optimizer/max": time.perf_counter() - middle})
        reduced = metrics.reduce(self.world_size)
        for name in ("seconds/forward_backward", "seconds/optimizer"):
            reduced[name] = reduced.pop(f"{name}/max")
        return reduced | optimizer_metrics, kept

    def _outputs(self, batch: TokenBatch, temperature: float, with_entropy: bool) -> ModelOutput:
        if isinstance(self.model, ScalarModel):
            return ModelOutput(values=self.engine(batch.token_ids, batch.cu_seqlens))
        ref_hidden = batch.tokens.get("ref_hidden")
        scores = self.engine(batch.token_ids, batch.cu_seqlens, temperature, with_entropy, batch.action_mask, ref_hidden)
        return ModelOutput(logprobs=scores[0], entropy=scores[1], kl=None if ref_hidden is None else scores[2])

    def _optimizer_step(self) -> dict[str, float]:
        rate = learning_rate(self.config, self.step, self.total_steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        skipped = False
        if clips_itself(self.config):
            parameters = [p for p in self.model.parameters() if p.requires_grad]
            norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm or float("inf"))
            skipped = not bool(torch.isfinite(norm))
            if skipped:
                self.engine.zero_grad()
            else:
                self.engine.step()
        else:
            self.engine.step()
            norm, skipped = self.engine.get_global_grad_norm(), not self.engine.was_step_applied()
        if self.average is not None and not skipped:
            self.average.update()
        self.step += 1
        return {"grad_norm": float("inf") if skipped else float(norm), "lr": rate, "skipped_update": float(skipped)}

    def gradient_sketch(self, micro_batches: Sequence[TokenBatch], *args: Any, size: int, seed: int) -> GradientSketch:
        """The gradient of the loss summed over this rank's micro-batches, sketched; ``args`` as for ``update``. Nothing is stepped, and no other
        rank is waited for: the sketches of all ranks add up to the batch's. For a language model that is only run and whole on each rank."""
        from openrl_reason.workers.gradients import sketched_gradient

        if self.engine is not None or not isinstance(self.model, LanguageModel):
            raise ConfigError(f"the {self.role} model's gradient is asked for: it must be a language model that is only run, at zero_stage 0, 1 or 2")
        return sketched_gradient(self.model, micro_batches, *args, size=size, seed=seed)

    def set_schedule(self, total_steps: int, step: int) -> None:
        """From now on the learning-rate schedule spans ``total_steps`` and stands before ``step`` (0-based)."""
        self.total_steps, self.step = total_steps, step

    def skip_updates(self, count: int) -> None:
        """The learning-rate schedule goes on as if ``count`` updates had been taken; nothing else changes."""
        self.step += count

    def start_average(self, decay: float) -> None:
        """From now on a moving average of the trained weights follows every optimiser step (``logprobs(average=True)`` scores with it)."""
        self.average = WeightAverage([p for p in self.model.parameters() if p.requires_grad], decay)

    def set_reference_head(self, path: str, direction: str) -> None:
        """The output head of the reference at ``path``, for the exact KL in updates. ``direction``: "reverse", KL(this || it), or "forward"."""
        weight, bias = load_output_head(path, self.config.dtype, trust_remote_code=self.config.trust_remote_code)
        self.model.set_reference_head(weight.to(self.device), None if bias is None else bias.to(self.device), direction)

    # ---- weights -------------------------------------------------------------------------------------------------------------------

    def named_full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, whole tensor) of every weight, see ``model_weights.named_full_tensors``. Every rank must run it to its end."""
        return named_full_tensors(self.model.model)

    def publish_weights(self, sender: Any, version: int) -> Any:
        """Sends the weights through ``sender.send(iterator of (name, tensor), version)`` on rank 0; returns what that returns, there."""
        tensors = self.named_full_tensors()
        result = sender.send(tensors, version) if self.rank == 0 else None
        self.finish_gathering(tensors)
        return result

    def finish_gathering(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Under ZeRO-3 every rank takes part in every gathering, though only rank 0 uses what is gathered."""
        if self.config.zero_stage == 3:
            for _ in tensors:
                pass

    def collect_weights(self) -> list[tuple[str, str, Any]] | None:
        """(name, dtype, bytes as a uint8 array of the tensor's shape times its item size) of every weight, on rank 0; None elsewhere."""
        tensors = self.named_full_tensors()
        result = None
        if self.rank == 0:
            result = [
                (name, str(tensor.dtype).removeprefix("torch."), tensor.cpu().contiguous().view(torch.uint8).clone().numpy())
                for name, tensor in tensors
            ]
        self.finish_gathering(tensors)
        return result

    def load_collected(self, weights: list[tuple[str, str, Any]]) -> None:
        """Takes over what ``collect_weights`` of another group returned."""
        # The arrays lie read-only in shared memory; they are copied from, never written.
        self.load_full_tensors((name, torch.from_numpy(array.copy()).view(getattr(torch, dtype))) for name, dtype, array in weights)

    def load_full_tensors(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Overwrites the weights of a model that is only run (a reference refresh). Collective under ZeRO-3."""
        assert not self.trained, "a model in training keeps its master weights: resume it from a checkpoint instead"
        self._prefix_scorer = None  # what it keeps was computed with other weights
        load_full_tensors(self.model.model, named_tensors, is_first=self.rank == 0, role=self.role)

    def export_hf(self, folder: str | Path, dtype: str | None = None) -> None:
        """Writes a complete Hugging Face folder from rank 0. Collective. ``dtype``: float32, bfloat16 or None for the model's own."""
        from openrl_reason.models.export import export_hf

        tensors = self.named_full_tensors()
        if self.rank == 0:
            model = self.model.model
            export_hf(tensors, model.config, self.tokenizer, folder, generation_config=getattr(model, "generation_config", None), dtype=dtype)
        self.finish_gathering(tensors)

    # ---- checkpoints ---------------------------------------------------------------------------------------------------------------

    def save_state(self, folder: str | Path, step: int | None = None) -> None:
        """Writes what resuming needs: this rank's master weights, Adam's moments, RNG state and the optimiser steps it took (``step`` is
        only noted). A model that is only run writes its weights, from rank 0."""
        from openrl_reason.workers.model_state import save_frozen_weights, save_worker_state

        with naming_disk_errors(folder):
            if self.trained:
                save_worker_state(self, Path(folder), step)
                if self.average is not None and self.rank == 0:
                    self.average.save(Path(folder) / "average.safetensors")
            else:
                save_frozen_weights(self, Path(folder))

    def load_state(self, folder: str | Path) -> int:
        """Restores ``save_state`` bit by bit. Collective. Returns the optimiser steps taken. Raises CheckpointError if it does not fit."""
        from openrl_reason.workers.model_state import load_frozen_weights, load_worker_state

        if self.trained:
            load_worker_state(self, Path(folder))
            if self.average is not None:
                self.average.load(Path(folder) / "average.safetensors")
        else:
            load_frozen_weights(self, Path(folder))
        return self.step

    # ---- taking turns on a GPU -----------------------------------------------------------------------------------------------------

    def offload(self) -> None:
        """Moves weights and optimiser state to host memory. Does nothing on a CPU."""
        if self.device.type != "cpu" and self._parked is None:
            self._parked = ParkedMemory(resident_tensors(self.model, self.engine, self.device))
            torch.cuda.empty_cache()

    def reload(self) -> None:
        """Undoes ``offload``."""
        if self._parked is not None:
            self._parked.restore()
            self._parked = None


def _inference_config(config: ModelConfig) -> ModelConfig:
    """The plain ModelConfig part, so that no optimiser is built."""
    return ModelConfig(**{name: config.__dict__[name] for name in ModelConfig.__dataclass_fields__})
