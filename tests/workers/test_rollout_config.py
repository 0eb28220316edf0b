"""Settings of rollouts are checked when they are made."""

import pytest

from openrl_reason.errors import ConfigError
from openrl_reason.workers.rollout_config import Request, RolloutConfig, SamplingConfig, check_requests


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": 0}, "top_k is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"stop": ("\n", "")}, "empty string"),
    ],
)
def test_impossible_sampling_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        SamplingConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_engines": 0}, "rollout.num_engines is 0"),
        ({"tensor_parallel": 0}, "rollout.tensor_parallel is 0"),
        ({"dtype": "fp32"}, "rollout.dtype is 'fp32': use one of float32"),
        ({"weight_transport": "carrier"}, "rollout.weight_transport is 'carrier': use one of auto"),
        ({"block_size": 20}, "rollout.block_size is 20"),
        ({"kv_cache_gib": 0.0}, "rollout.kv_cache_gib"),
        ({"gpu_memory_utilization": 1.2}, "rollout.gpu_memory_utilization is 1.2"),
        ({"request_timeout_s": 0.0}, "request_timeout_s"),
        ({"max_restarts": -1}, "rollout.max_restarts is -1"),
    ],
)
def test_impossible_engines_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        RolloutConfig(**settings)


def test_a_request_fits_exactly_or_is_refused_with_the_numbers():
    config, sampling = RolloutConfig(max_model_len=100), SamplingConfig(max_new_tokens=40)
    check_requests([Request("fits", [1] * 60, 0, sampling)], config, ())
    with pytest.raises(ConfigError, match=r"'long' has 61 prompt tokens and may generate 40: 101 tokens do not fit rollout.max_model_len 100"):
        check_requests([Request("fits", [1] * 60, 0, sampling), Request("long", [1] * 61, 0, sampling)], config, ())
    with pytest.raises(ConfigError, match="'a' is in use"):
        check_requests([Request("a", [1], 0, sampling)], config, {"a"})
