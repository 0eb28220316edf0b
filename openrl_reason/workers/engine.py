"""One vLLM engine, driven step by step: token ids in, token ids out, no thread of its own. Usable without Ray.

vLLM runs in this process and `RolloutEngine.pump` steps it. Nothing happens between pumps, so weights can be replaced between any two of
them, and what an engine does is decided by its caller alone. In float32 on a CPU a sample depends on its request only (prompt, seed,
sampling settings, weights): not on what else is in the batch, on the order of arrival, on preemption, or on the prefix cache. That holds
to the bit for models of some millions of parameters; at 135 M, one sequence decoded alone differed by 2e-6 in log-probability.

Tested on CPUs (tensor_parallel 2 by hand). The code for GPUs is the same and has not been run; there, batch composition changes rounding.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from openrl_reason.core.trajectory import StopReason
from openrl_reason.environment import device_kind, lasting_imports, prepare_environment, require
from openrl_reason.errors import ConfigError, WorkerError
from openrl_reason.models.turn_end import KNOWN_ENDS, end_token_ids
from openrl_reason.workers.network import node_address
from openrl_reason.workers.prefix_reuse import HeldRequests, attach
from openrl_reason.workers.rollout_config import Completion, Request, RolloutConfig, check_requests
from openrl_reason.workers.weight_sync import Manifest, SharedMemorySender, host_identity, received_tensors

RETURN_SECONDS = 0.02
"""A pump that has something to tell ends after this time: long enough for its call to cost little."""


class RolloutEngine:
    """A vLLM engine in this process.

    Args:
        config: engine settings.
        model_path: Hugging Face model folder (or hub name) with the first weights.
        version: version of those weights.
        seed: seed of the engine itself; requests bring their own.
    """

    def __init__(self, config: RolloutConfig, model_path: str, *, version: int = 0, seed: int = 0) -> None:
        self.config, self.model_path = config, str(model_path)
        vllm = import_vllm(config, self.model_path)
        self._on_cpu = require("vllm.platforms").current_platform.is_cpu()
        if self._on_cpu:  # torch may have been imported before the variable was set; more threads round differently from batch to batch
            require("torch").set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self._eos_ids = read_eos_ids(self.model_path, config.trust_remote_code)
        self._has_tokenizer = any(_cached(self.model_path, name) for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
        self._engine = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**self._engine_args(seed)))
        reuse = attach(self._engine) if config.prefix_caching and self._reuses_parts else None
        self._held = HeldRequests(reuse.is_computed) if reuse else None
        self._vocab_size = self._engine.model_config.get_vocab_size()
        self._tokens_of_stops: dict[tuple[str, ...], dict[int, str]] = {}
        self._unfinished: dict[str, Request] = {}
        self._version: int | None = version
        self._relay = SharedMemorySender(config.dtype)
        self.seconds_busy = 0.0

    def _engine_args(self, seed: int) -> dict[str, Any]:
        config = self.config
        if self._on_cpu:
            if config.block_size % 32:
                raise ConfigError(f"rollout.block_size is {config.block_size}: on a CPU use a multiple of 32")
            device = {
                "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30),
                # A prompt cut over two steps makes vLLM rewind the request's generator, which torch cannot do on a CPU ("CPU Generator does
                # not use offset"): whole prompts only.
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(config.max_model_len, 4096),
            }
        else:
            device = {"gpu_memory_utilization": config.gpu_memory_utilization, "enable_sleep_mode": True}
            if self._reuses_parts:  # what was computed in the step before must be known when the next one is scheduled
                device["async_scheduling"] = False
        return device | {
            "model": self.model_path,
            "dtype": config.dtype,
            "tensor_parallel_size": config.tensor_parallel,
            "distributed_executor_backend": "mp" if config.tensor_parallel > 1 else None,  # inside a Ray actor vLLM would pick Ray
            "max_model_len": config.max_model_len,
            "max_num_seqs": config.max_num_seqs,
            "block_size": config.block_size,
            "enforce_eager": config.enforce_eager,
            "enable_prefix_caching": config.prefix_caching,
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",  # sampling settings come from requests alone, never from the model's folder
            "skip_tokenizer_init": not self._has_tokenizer,  # needed for stop strings alone
            "trust_remote_code": config.trust_remote_code,
            "seed": seed,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "worker_extension_cls": f"{__name__}.WeightLoader",
        }

    @property
    def _reuses_parts(self) -> bool:
        wanted = self.config.partial_prefix_reuse
        return wanted == "always" or (wanted == "auto" and self._on_cpu)

    @property
    def version(self) -> int | None:
        """Version of the weights in use; None after a load that failed."""
        return self._version

    @property
    def num_unfinished(self) -> int:
        """Requests in the engine."""
        return len(self._unfinished)

    def pump(self, new_requests: Sequence[Request] = (), max_seconds: float = 0.1) -> list[Completion]:
        """Adds requests and steps the engine for about ``max_seconds``, or until nothing is left to do, or, after ``RETURN_SECONDS``, until
        something has finished: whoever waits for it may have the next request ready (a search, a branch of what has finished).

        Returns:
            what finished meanwhile.

        Raises:
            ConfigError: a request cannot be served (none of ``new_requests`` has been added then).
            WorkerError: the last `load_weights` failed.
        """
        if self._version is None:
            raise WorkerError("this engine has no usable weights: the last load_weights failed")
        check_requests(new_requests, self.config, [self._unfinished])
        if not self._has_tokenizer and any(request.sampling.stop for request in new_requests):
            raise ConfigError(f"requests have stop strings, but {self.model_path} has no tokenizer to find them with")
        for request in new_requests:
            ids = (*request.prompt_ids, *request.label_ids)
            if not 0 <= min(ids) <= max(ids) < self._vocab_size:
                wrong = next(token for token in ids if not 0 <= token < self._vocab_size)
                raise ConfigError(f"request {request.request_id!r} holds token id {wrong}, but the model has {self._vocab_size} tokens")
        started = time.perf_counter()
        self._unfinished.update((request.request_id, request) for request in new_requests)
        if self._held:
            self._held.release(self._add)  # one that ended with its first step leads nobody any more
            self._held.admit(new_requests, self._add)
        else:
            for request in new_requests:
                self._add(request)
        completions: list[Completion] = []
        while self._unfinished:
            if self._held:
                self._held.release(self._add)
            completions += [self._completion(output) for output in self._engine.step()]
            elapsed = time.perf_counter() - started
            if elapsed >= max_seconds or (completions and elapsed >= RETURN_SECONDS):
                break
        self.seconds_busy += time.perf_counter() - started
        return completions

    def _add(self, request: Request) -> str:
        """Gives vLLM a request; vLLM's own id of it."""
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        sampling = request.sampling
        # A request with stop strings is detokenised token by token, unless single tokens say where they are.
        tokens = self._stop_tokens(sampling.stop)
        texts = () if tokens is not None else sampling.stop
        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=request.seed,
            max_tokens=sampling.max_new_tokens,
            stop=list(texts) or None,
            stop_token_ids=[*self._eos_ids, *(tokens or ())],
            include_stop_str_in_output=True,
            detokenize=bool(texts),
            logprobs=None if request.label_ids else 0,  # 0: of the sampled token alone; labels come beside it, by the next line
            logprob_token_ids=list(request.label_ids) or None,
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        own_id = self._engine.add_request(request.request_id, tokens_input(list(request.prompt_ids)), params)
        if params.detokenize:
            # vLLM then writes the text of each token beside its log-probability, too. Nobody reads that, and it takes longer than all else.
            self._engine.output_processor.request_states[own_id].logprobs_processor.tokenizer = None
        return own_id

    def _stop_tokens(self, stop: tuple[str, ...]) -> dict[int, str] | None:
        """The tokens in which a stop string is, with the first one of ``stop`` that is; None where one may lie across several tokens."""
        if not stop or any(len(text) != 1 or not text.isascii() or text == " " for text in stop):
            return None
        if stop not in self._tokens_of_stops:
            tokenizer = self._engine.get_tokenizer()
            texts = tokenizer.batch_decode([[token] for token in range(self._vocab_size)], skip_special_tokens=True)
            found = {token: next((one for one in stop if one in text), None) for token, text in enumerate(texts)}
            self._tokens_of_stops[stop] = {token: one for token, one in found.items() if one is not None and token not in self._eos_ids}
        return self._tokens_of_stops[stop]

    def _completion(self, output: Any) -> Completion:
        request = self._unfinished.pop(output.request_id)
        sample, flat = output.outputs[0], output.outputs[0].logprobs
        logprobs = [flat.logprobs[start] for start in flat.start_indices]  # at each position the sampled token comes first, then the labels
        first = flat.start_indices[0] + 1
        labels = tuple(flat.logprobs[first : first + len(request.label_ids)])
        assert tuple(flat.token_ids[first : first + len(labels)]) == tuple(request.label_ids), (flat.token_ids, request.label_ids)
        assert len(logprobs) == len(sample.token_ids), (len(logprobs), len(sample.token_ids))
        if sample.finish_reason == "length":
            reason, stop_string = StopReason.LENGTH, None
        elif sample.finish_reason == "stop" and isinstance(sample.stop_reason, str):
            reason, stop_string = StopReason.STOP_STRING, sample.stop_reason
        elif sample.finish_reason == "stop" and sample.stop_reason in (found := self._stop_tokens(request.sampling.stop) or {}):
            reason, stop_string = StopReason.STOP_STRING, found[sample.stop_reason]
        elif sample.finish_reason == "stop":
            reason, stop_string = StopReason.EOS, None
        else:
            raise WorkerError(f"vLLM ended request {output.request_id!r} with {sample.finish_reason!r} ({sample.stop_reason!r})")
        return Completion(
            request_id=output.request_id,
            token_ids=list(sample.token_ids),
            logprobs=logprobs,
            stop_reason=reason,
            stop_string=stop_string,
            policy_version=self._version,
            num_cached_tokens=output.num_cached_tokens or 0,
            label_logprobs=labels,
        )

    def abort_all(self) -> None:
        """Forgets every unfinished request."""
        for request_id in self._held.clear() if self._held else ():
            del self._unfinished[request_id]  # vLLM has never heard of it
        self._engine.abort_request(list(self._unfinished))
        self._unfinished.clear()

    def load_weights(self, manifest: Manifest, version: int) -> None:
        """Replaces the weights and empties the prefix cache.

        Raises:
            ConfigError: requests are unfinished: their KV cache belongs to the old weights.
            WorkerError: version or checksum differ, or a weight is missing. The engine then refuses to generate until a load succeeds.
        """
        if self._unfinished:
            raise ConfigError(f"{self.num_unfinished} requests are unfinished: finish or abort them before loading weights")
        self._version = None
        if manifest.transport == "object_store" and self.config.tensor_parallel > 1:  # the workers are no Ray processes
            with received_tensors(manifest, version) as tensors:
                manifest = self._relay.send(tensors, version)
        self._engine.collective_rpc("load_openrl_weights", args=(manifest, version))
        self.reset_prefix_cache()
        self._version = version

    def reset_prefix_cache(self) -> None:
        """Empties the prefix cache; `load_weights` does this by itself."""
        if not self._engine.reset_prefix_cache():
            raise WorkerError("vLLM did not empty its prefix cache: blocks are still in use")

    def sleep(self) -> None:
        """On a GPU, moves the weights to host memory and drops the KV cache (vLLM's level 1). On a CPU does nothing."""
        if self._unfinished:
            raise ConfigError(f"{self.num_unfinished} requests are unfinished: finish or abort them before the engine sleeps")
        if not self._on_cpu:
            self.reset_prefix_cache()
            self._engine.sleep(level=1)

    def wake(self) -> None:
        """Undoes `sleep`."""
        if not self._on_cpu and self._engine.is_sleeping():
            self._engine.wake_up()

    def stats(self) -> dict[str, float]:
        """Seconds spent in `pump`, and unfinished requests."""
        return {"seconds_busy": self.seconds_busy, "unfinished": self.num_unfinished}

    def close(self) -> None:
        """Frees the engine's memory and workers."""
        self.abort_all()
        self._engine.engine_core.shutdown()


class EngineActor:
    """`RolloutEngine` as a Ray actor."""

    def start(self, config: RolloutConfig, model_path: str, version: int, seed: int) -> None:
        """Makes the engine. Not in ``__init__``, so that what goes wrong arrives as itself and not as a dead actor."""
        node_address()  # in a private cluster the engine keeps to the loopback interface, too
        with lasting_imports():
            import_vllm(config, model_path)
        self._engine = RolloutEngine(config, model_path, version=version, seed=seed)

    def describe(self) -> dict[str, Any]:
        """Process, host and log of this actor."""
        return {"pid": os.getpid(), "host": host_identity(), "log": os.readlink("/proc/self/fd/2")}  # Ray points stderr at its log

    def pump(self, requests: list[Request], max_seconds: float) -> tuple[list[Completion], float]:
        """What finished, and the seconds this call worked."""
        before = self._engine.seconds_busy
        completions = self._engine.pump(requests, max_seconds)
        return completions, self._engine.seconds_busy - before

    def load_weights(self, manifest: Manifest, version: int) -> float:
        """Seconds that the load took."""
        started = time.perf_counter()
        self._engine.load_weights(manifest, version)
        return time.perf_counter() - started

    def abort_all(self) -> None:
        """See `RolloutEngine.abort_all`."""
        self._engine.abort_all()

    def sleep(self) -> None:
        """See `RolloutEngine.sleep`."""
        self._engine.sleep()

    def wake(self) -> None:
        """See `RolloutEngine.wake`."""
        self._engine.wake()


class WeightLoader:
    """Mixed into vLLM's worker class (``worker_extension_cls``): loads received weights in each tensor-parallel worker."""

    _load_interrupted = False

    def load_openrl_weights(self, manifest: Manifest, version: int) -> None:
        """Maps the manifest's tensors and loads them in place.

        This is vLLM's own reload (what its ``reload_weights`` and its weight transfer engines do), called in its parts so as to see which
        parameters were loaded: its public entry only logs those that were not, and they would go stale without a sign.
        """
        import torch
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        model = self.model_runner.get_model()
        expected = {name for name, _ in model.named_parameters()}  # a tied head is the embedding's parameter, listed once
        if self._load_interrupted:
            raise WorkerError("an earlier load failed half-way, which left the model in parts: this engine has to be restarted")
        with torch.inference_mode(), set_current_vllm_config(self.vllm_config), received_tensors(manifest, version, self.rank) as tensors:
            self._load_interrupted = True
            initialize_layerwise_reload(model)
            loaded = model.load_weights(tensors)
            finalize_layerwise_reload(model, self.vllm_config.model_config)
            self._load_interrupted = False
            if missing := sorted(expected - loaded):
                raise WorkerError(f"weights version {version} lack {len(missing)} parameters of the engine, for instance {missing[:3]}")
            refresh_tied_heads(model, loaded)


def refresh_tied_heads(model: Any, loaded: Iterable[str]) -> None:
    """Packs anew the heads that share the embedding's weight: on CPUs they compute with a packed copy, which the reload leaves stale."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    tables = [module for _, module in model.named_modules() if isinstance(module, VocabParallelEmbedding)]
    addresses = {table.weight.data_ptr() for table in tables if not isinstance(table, ParallelLMHead)}
    for name, head in model.named_modules():
        if not isinstance(head, ParallelLMHead) or f"{name}.weight" in loaded:
            continue
        if head.weight.data_ptr() not in addresses:
            raise WorkerError(f"the output head {name} was neither in the weight update nor tied to an embedding: it would be stale")
        head.quant_method.process_weights_after_loading(head)


def import_vllm(config: RolloutConfig, model_path: str) -> ModuleType:
    """vllm, with what an engine is made of, and with the environment that it reads at import."""
    prepare_environment()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if Path(model_path).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if config.enforce_eager and device_kind() == "cpu":
        # Its sampler would compile a helper all the same, with g++, in the first request for log-probabilities.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    vllm = require("vllm", "to generate rollouts")
    assert vllm.EngineArgs and vllm.LLMEngine  # imported when they are first asked for
    return vllm


def read_eos_ids(model_path: str, trust_remote_code: bool = False) -> list[int]:
    """The token ids that end a completion, from ``generation_config.json``, ``config.json`` and the tokenizer of a model: its EOS token, and
    the token with which its chat template ends a turn, which base models do not list. May be empty."""

    def read(name: str) -> dict[str, Any]:
        path = _cached(model_path, name)
        return json.loads(Path(path).read_text()) if path else {}

    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        found = read(name).get("eos_token_id")
        ids.update([found] if isinstance(found, int) else found or [])
    settings = read("tokenizer_config.json")
    eos = settings.get("eos_token")
    text = eos["content"] if isinstance(eos, dict) else eos
    has_template = settings.get("chat_template") or _cached(model_path, "chat_template.jinja")
    ends = (text,) if has_template else (text, *KNOWN_ENDS)
    ids.update(token["id"] for token in read("tokenizer.json").get("added_tokens", []) if token["content"] in ends)
    if has_template:
        tokenizer = require("transformers").AutoTokenizer.from_pretrained(model_path, trust_remote_code=trust_remote_code)
        ids.update(end_token_ids(tokenizer))
    return sorted(ids)


def _cached(model_path: str, name: str) -> str | None:
    """A file of a model folder or of a hub model that the engine may load; None if there is no such file."""
    from transformers.utils import cached_file

    return cached_file(model_path, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False)
