"""Schedules end where they should, and settings that cannot work name what would."""

import math

import pytest

from openrl_reason.errors import ConfigError
from openrl_reason.workers.model_config import LoraConfig, ModelConfig, TrainedModelConfig, learning_rate


def rates(total, **settings):
    config = TrainedModelConfig(lr=1.0, **settings)
    return [learning_rate(config, step, total) for step in range(total)]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("total", [1, 2, 3, 10, 100, 1001])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.1, 0.5])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_the_rate_climbs_to_its_peak_and_descends_to_its_floor_at_the_last_step(schedule, total, warmup, floor):
    values = rates(total, schedule=schedule, warmup_ratio=warmup, min_lr_ratio=floor)
    peak = values.index(max(values))
    assert math.isclose(max(values), 1.0) and peak == max(round(warmup * total) - 1, 0)
    assert values[: peak + 1] == sorted(values[: peak + 1]) and values[peak:] == sorted(values[peak:], reverse=True)
    assert values[0] > 0
    if total > 1 and peak < total - 1:
        assert math.isclose(values[-1], floor, abs_tol=1e-12)


def test_warm_up_is_linear_and_constant_stays():
    assert rates(10, schedule="constant", warmup_ratio=0.4) == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 7)


def test_cosine_is_half_way_down_in_the_middle():
    assert rates(101, warmup_ratio=0.0)[50] == pytest.approx(0.5)


def test_beyond_the_last_step_the_floor_remains():
    config = TrainedModelConfig(lr=1.0, min_lr_ratio=0.2)
    assert learning_rate(config, 150, 100) == pytest.approx(0.2)


@pytest.mark.parametrize("settings,message", [
    (dict(dtype="float16"), "'float32' or 'bfloat16'"), (dict(zero_stage=4), "0, 1, 2 or 3"),
    (dict(offload_parameters=True), "needs zero_stage 3"),
    (dict(attention="eager"), "'auto', 'packed'"), (dict(num_ranks=0), "num_ranks is 0"), (dict(tokens_per_micro_batch=0), "at least 1"),
    (dict(schedule="step"), "'cosine', 'linear' or 'constant'"), (dict(zero_stage=0, offload_optimizer=True), "zero_stage 1, 2 or 3"),
    (dict(lr=-1.0), "lr is -1.0"), (dict(lr=math.nan), "lr is nan"), (dict(warmup_ratio=2.0), "at most 1.0"),
    (dict(min_lr_ratio=-0.1), "min_lr_ratio"),
])  # fmt: skip
def test_settings_that_cannot_work_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainedModelConfig(**settings)
    with pytest.raises(ConfigError, match="dropout is 1.0"):
        LoraConfig(dropout=1.0)
    assert ModelConfig().zero_stage == 1
