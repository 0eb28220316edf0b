"""What the plan says about memory, and adapters that fit nothing, on tiny folders and without actors."""

import re

import pytest

from openrl_reason.algorithms.common import count_parameters, estimate_memory
from openrl_reason.algorithms.online_config import KLConfig, ReferenceConfig
from openrl_reason.algorithms.ppo import CriticConfig, PPOAlgoConfig, PPOConfig, PPOTrainer
from openrl_reason.algorithms.sft import SFTConfig, SFTTrainer
from openrl_reason.algorithms.trainer import RunConfig
from openrl_reason.errors import ConfigError
from openrl_reason.models.lora import count_trained
from openrl_reason.models.tiny import make_model
from openrl_reason.tasks.base import TaskConfig
from openrl_reason.workers.model_config import LoraConfig, TrainedModelConfig
from openrl_reason.workers.rollout_config import RolloutConfig

WRONG = LoraConfig(rank=2, target_modules="q_proj,qproj")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return str(make_model(tmp_path_factory.mktemp("models") / "small", hidden_size=256, num_layers=2, intermediate_size=512))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return str(make_model(tmp_path_factory.mktemp("models") / "large", hidden_size=512, num_layers=2, intermediate_size=1024))


def bytes_of(text):
    """{name: bytes} of an estimate."""
    return {name: float(size) * 2**30 for name, size in re.findall(r"(\w+) ([\d.]+) GiB", text)}


@pytest.mark.parametrize(
    ("stage", "dtype", "ranks", "per_weight", "per_trained"),
    [(0, "float32", 4, 16, 48), (1, "float32", 4, 16, 28), (2, "bfloat16", 4, 8, 16), (3, "bfloat16", 4, 2, 16)],
)
def test_adapters_alone_have_gradients_and_adam_states(large, stage, dtype, ranks, per_weight, per_trained):
    settings = dict(path=large, dtype=dtype, num_ranks=ranks, zero_stage=stage)
    count, lora = count_parameters(large), LoraConfig(rank=64)
    adapters = count_trained(large, lora)
    full = bytes_of(estimate_memory(TrainedModelConfig(**settings)))["policy"]
    adapted = bytes_of(estimate_memory(TrainedModelConfig(**settings, lora=lora)))["policy"]
    rounding = 0.006 * 2**30
    assert full == pytest.approx(count * (per_weight + per_trained), abs=rounding)
    assert adapted == pytest.approx((count + adapters) * per_weight + adapters * per_trained, abs=rounding)
    assert adapted < full


def test_a_reference_of_its_own_counts_with_its_own_size(small, large, tmp_path):
    policy = TrainedModelConfig(path=small, dtype="float32")
    sizes = {path: bytes_of(estimate_memory(policy, reference=ReferenceConfig(path=path, num_ranks=40)))["reference"] for path in ("", small, large)}
    assert sizes[""] == sizes[small] == pytest.approx(count_parameters(small) * 4 * 40, abs=0.006 * 2**30)
    assert sizes[large] == pytest.approx(count_parameters(large) * 4 * 40, abs=0.006 * 2**30) and sizes[large] > 2 * sizes[small]
    elsewhere = estimate_memory(policy, reference=ReferenceConfig(path="some/model"))
    assert elsewhere.startswith("policy ") and elsewhere.endswith("reference unknown (not a local folder)")


def test_adapters_that_fit_nothing_are_refused_before_any_actor_with_names_that_fit(small, tmp_path):
    run, task = RunConfig(output_dir=str(tmp_path / "run"), steps=2), TaskConfig(num_train=4)
    sft = SFTConfig(run=run, task=task, eval_items=0, batch_size=2, policy=TrainedModelConfig(path=small, lora=WRONG))
    expected = "--policy.lora.target_modules is 'q_proj,qproj': .*'qproj' .did you mean 'q_proj'.*; use all-linear, or some of q_proj, k_proj,"
    for begin in ("fit", "start"):
        with pytest.raises(ConfigError, match=expected):
            getattr(SFTTrainer(sft), begin)()


def test_a_critic_without_a_path_has_the_policys_modules(small, tmp_path):
    ppo = PPOConfig(
        run=RunConfig(output_dir=str(tmp_path / "run"), steps=2), task=TaskConfig(num_train=4, num_test=4), prompts_per_step=2, samples_per_prompt=2,
        policy=TrainedModelConfig(path=small, lora=LoraConfig(rank=2)), critic=CriticConfig(lora=WRONG),
        algo=PPOAlgoConfig(kl=KLConfig(where="none")), rollout=RolloutConfig(max_model_len=512),
    )  # fmt: skip
    for begin in ("fit", "start"):
        with pytest.raises(ConfigError, match="--critic.lora.target_modules is 'q_proj,qproj': .*did you mean 'q_proj'"):
            getattr(PPOTrainer(ppo), begin)()
