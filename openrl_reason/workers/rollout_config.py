"""What goes into and comes out of the rollout engines. Light: the standard library alone."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from openrl_reason.errors import ConfigError

if TYPE_CHECKING:
    from openrl_reason.core.trajectory import StopReason

DTYPES = ("float32", "bfloat16", "float16")
MAX_LABELS = 128
"""vLLM's limit of tokens to be scored by one request."""
TRANSPORTS = ("auto", "shared_memory", "object_store", "gloo", "nccl")


@dataclass(frozen=True)
class SamplingConfig:
    """How completions are sampled."""

    temperature: float = 1.0
    """Softmax temperature; 0 is greedy."""
    top_p: float = 1.0
    """Nucleus sampling: the smallest set of tokens with this much probability. 1 keeps all."""
    top_k: int = -1
    """Sample among the k most likely tokens. -1 keeps all."""
    max_new_tokens: int = 256
    """Longest completion, in tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion. Their tokens are kept: the ids that the policy sampled are the truth."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ConfigError(f"temperature is {self.temperature}: use 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}: use a number above 0, up to 1 (1 keeps every token)")
        if self.top_k < 1 and self.top_k != -1:
            raise ConfigError(f"top_k is {self.top_k}: use -1 (every token) or 1 and more")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}: use 1 or more")
        if any(not text for text in self.stop):
            raise ConfigError("stop holds an empty string, which would end every completion at once: remove it")


@dataclass(frozen=True)
class RolloutConfig:
    """The vLLM engines that generate."""

    num_engines: int = 1
    """vLLM engines; each is one Ray actor."""
    tensor_parallel: int = 1
    """GPUs that one engine spans."""
    dtype: str = "bfloat16"
    """Dtype of the engines' weights and activations: float32, bfloat16 or float16. Weight updates are sent in this dtype."""
    max_model_len: int = 1024
    """Longest prompt plus completion, in tokens."""
    max_num_seqs: int = 256
    """Sequences that one engine decodes together."""
    kv_cache_gib: float = 0.25
    """KV cache of one engine on a CPU, in GiB."""
    gpu_memory_utilization: float = 0.5
    """Share of a GPU's memory that an engine may use for weights, activations and KV cache."""
    block_size: int = 32
    """Tokens per KV block. On CPUs a multiple of 32."""
    enforce_eager: bool = True
    """No CUDA graphs and no compilation: starts faster; on a GPU, false generates faster."""
    prefix_caching: bool = True
    """Keep the KV cache of prompts (until the next weight update), so that siblings and branches do not compute them again."""
    partial_prefix_reuse: str = "auto"
    """Share prefixes to the token, not by whole KV blocks alone, by copies of part-filled blocks (models with plain attention): always, never, or
    auto (on CPUs; it has not been run on GPUs, where vLLM's asynchronous scheduling is turned off for it)."""
    weight_transport: str = "auto"
    """How weights reach the engines: shared_memory (one node), object_store (any nodes), gloo or nccl; auto: one of the first two."""
    sync_checksum: bool = False
    """Send a CRC-32 of every tensor with each weight update and verify it on arrival."""
    request_timeout_s: float = 300.0
    """An engine that gives no sign of life for this long is declared hung and restarted."""
    start_timeout_s: float = 600.0
    """Seconds that an engine may take to start."""
    max_restarts: int = 3
    """Restarts per engine before the run stops with an error."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""

    def __post_init__(self) -> None:
        for name in ("num_engines", "tensor_parallel", "max_model_len", "max_num_seqs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"rollout.{name} is {getattr(self, name)}: use 1 or more")
        if self.dtype not in DTYPES:
            raise ConfigError(f"rollout.dtype is {self.dtype!r}: use one of {', '.join(DTYPES)}")
        if self.partial_prefix_reuse not in ("auto", "always", "never"):
            raise ConfigError(f"rollout.partial_prefix_reuse is {self.partial_prefix_reuse!r}: use auto, always or never")
        if self.weight_transport not in TRANSPORTS:
            raise ConfigError(f"rollout.weight_transport is {self.weight_transport!r}: use one of {', '.join(TRANSPORTS)}")
        if self.block_size < 1 or self.block_size % 16:
            raise ConfigError(f"rollout.block_size is {self.block_size}: use a multiple of 16 (on CPUs of 32)")
        if self.kv_cache_gib <= 0:
            raise ConfigError(f"rollout.kv_cache_gib is {self.kv_cache_gib}: use a positive number")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"rollout.gpu_memory_utilization is {self.gpu_memory_utilization}: use a number above 0, up to 1")
        if self.request_timeout_s <= 0 or self.start_timeout_s <= 0:
            raise ConfigError("rollout.request_timeout_s and rollout.start_timeout_s must be positive")
        if self.max_restarts < 0:
            raise ConfigError(f"rollout.max_restarts is {self.max_restarts}: use 0 or more")


@dataclass
class Request:
    """One completion to sample."""

    request_id: str
    """Unique among the unfinished requests of a pool."""
    prompt_ids: list[int]
    """Token ids to continue."""
    seed: int
    """Seed of this sample alone, derived from its identity (``core.seeds.derive_seed``)."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How to sample."""
    group: str | None = None
    """Requests of one group go to one engine, so that they share their prefix in its cache. None: the prompt decides."""
    movable: bool = False
    """The engine of its group is a preference: where that one has clearly more to do, the request goes to the idlest."""
    label_ids: tuple[int, ...] = ()
    """Tokens whose log-probs at the first generated position are wanted (at most 128), whatever is sampled there."""


@dataclass
class Completion:
    """What the policy produced for a request."""

    request_id: str
    """The request's id."""
    token_ids: list[int]
    """Sampled token ids, including EOS and the tokens of a stop string."""
    logprobs: list[float]
    """Log-probability of each sampled token under the distribution it was drawn from (temperature, top-k and top-p applied)."""
    stop_reason: StopReason
    """EOS, STOP_STRING or LENGTH."""
    stop_string: str | None
    """The stop string that ended it, if one did."""
    policy_version: int
    """Version of the weights that sampled it."""
    num_cached_tokens: int
    """Prompt tokens served from the prefix cache."""
    label_logprobs: tuple[float, ...] = ()
    """Log-probability of each of the request's ``label_ids`` under the model's whole distribution at the first generated position."""


def check_requests(requests: Iterable[Request], config: RolloutConfig, in_use: Sequence[Container[str]]) -> None:
    """Refuses requests that no engine could serve. ``in_use``: where ids are looked for that are taken, without going through them all.

    Raises:
        ConfigError: a prompt is empty, prompt plus completion do not fit ``max_model_len``, labels cannot be scored, or an id is not unique.
    """
    taken: set[str] = set()
    for request in requests:
        _check_length(request, config)
        _check_labels(request)
        if request.request_id in taken or any(request.request_id in ids for ids in in_use):
            raise ConfigError(f"request id {request.request_id!r} is in use: ids must be unique among unfinished requests")
        taken.add(request.request_id)


def _check_length(request: Request, config: RolloutConfig) -> None:
    length, budget = len(request.prompt_ids), request.sampling.max_new_tokens
    if not length:
        raise ConfigError(f"request {request.request_id!r} has an empty prompt: a prompt needs at least one token")
    if length + budget > config.max_model_len:
        raise ConfigError(
            f"request {request.request_id!r} has {length} prompt tokens and may generate {budget}: {length + budget} tokens do not fit"
            f" rollout.max_model_len {config.max_model_len}. Shorten the prompt, lower max_new_tokens, or raise rollout.max_model_len"
        )


def _check_labels(request: Request) -> None:
    labels, sampling = request.label_ids, request.sampling
    if len(labels) > MAX_LABELS or len(set(labels)) < len(labels):
        raise ConfigError(f"request {request.request_id!r} has {len(labels)} label_ids: at most {MAX_LABELS} are possible, each of them once")
    reshaped = sampling.temperature not in (0, 1) or sampling.top_p < 1 or sampling.top_k != -1
    if labels and reshaped:  # the engine reports the distribution that it samples from, and a label's share of the model's own is wanted
        raise ConfigError(
            f"request {request.request_id!r} has label_ids and temperature {sampling.temperature}, top_p {sampling.top_p}, top_k {sampling.top_k}:"
            " labels are scored under the model's own distribution, so use temperature 0 or 1 without top_p and top_k"
        )
