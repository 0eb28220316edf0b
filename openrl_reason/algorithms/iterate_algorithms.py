"""What a round of ``openrl-reason iterate`` can train with. Another algorithm is an entry here, and a group of settings in ``IterateConfig``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

Configure = Callable[[Any, Any, "RoundInputs"], Any]


@dataclass(frozen=True)
class RoundInputs:
    """What a round trains from."""

    policy: str
    """Model folder that training starts from."""
    reference: str
    """Model folder of the reference; that of the policy where an algorithm has none."""
    critic: str
    """Model folder of the critic; empty: a fresh one."""
    data: tuple[str, ...]
    """Files of trajectories."""
    folder: Path
    """The run's folder; the model goes into ``model`` there, a critic into ``critic``."""
    seed: int


@dataclass(frozen=True)
class Algorithm:
    """One way to train."""

    settings: str
    """Group of ``IterateConfig`` with its settings."""
    trainer: str
    """module:class; it takes the settings and has ``fit()``, which goes on where a run that was killed had come to."""
    made: tuple[str, ...]
    """Settings of the group that iterate makes."""
    configure: Configure
    """(the group, the whole config, inputs) -> the group with what iterate makes."""
    has_reference: bool = False
    has_critic: bool = False
    one_path: bool = False
    """Its data are one path, not several."""

    def trainer_class(self) -> Any:
        """The trainer, imported when it is needed."""
        module, _, name = self.trainer.partition(":")
        return getattr(importlib.import_module(f"openrl_reason.algorithms.{module}"), name)

    def settings_for(self, config: Any, inputs: RoundInputs) -> Any:
        """The trainer's whole config for a round of ``config`` (an ``IterateConfig``)."""
        group = self.configure(getattr(config, self.settings), config, inputs)
        run = replace(group.run, output_dir=str(inputs.folder), resume=True, seed=inputs.seed)
        return replace(group, run=run, policy=replace(group.policy, path=inputs.policy), placement=config.placement)


def _data(group: Any, config: Any, path: Any, **more: Any) -> Any:
    """The group's settings of data with the round's files. Whoever trains on test data by the task's flag means it here, too."""
    meant = group.data.allow_test_data or config.task.allow_test_data_in_training
    return replace(group.data, path=path, allow_test_data=meant, **more)


def _sft(group: Any, config: Any, inputs: RoundInputs) -> Any:
    return replace(group, data=_data(group, config, inputs.data[0]))


def _rejection(group: Any, config: Any, inputs: RoundInputs) -> Any:
    return replace(group, data=_data(group, config, inputs.data[0], min_reward=config.collect.threshold))


def _dpo(group: Any, config: Any, inputs: RoundInputs) -> Any:
    data = _data(group, config, inputs.data)
    pairs = replace(group.pairs, threshold=_mapped_threshold(config, data))
    return replace(group, data=data, pairs=pairs, reference_path=_other_than_policy(inputs))


def _mapped_threshold(config: Any, data: Any) -> float:
    """``collect.threshold`` among the rewards as the loader maps them."""
    return config.collect.threshold * data.reward_scale + data.reward_shift


def _kto(group: Any, config: Any, inputs: RoundInputs) -> Any:
    data = _data(group, config, inputs.data)
    return replace(group, data=data, label_threshold=_mapped_threshold(config, data), reference_path=_other_than_policy(inputs))


def _oreo(group: Any, config: Any, inputs: RoundInputs) -> Any:
    reference, critic = replace(group.reference, path=_other_than_policy(inputs)), replace(group.critic, path=inputs.critic)
    data, algo = _data(group, config, inputs.data), replace(group.algo, right_threshold=_mapped_threshold(config, group.data))
    return replace(group, data=data, algo=algo, reference=reference, critic=critic)


def _other_than_policy(inputs: RoundInputs) -> str:
    """The reference, where it is not the policy's start: trainers need no second model for that."""
    return "" if inputs.reference == inputs.policy else inputs.reference


_COMMON = ("run.output_dir", "run.resume", "run.seed", "run.dry_run", "policy.path", "placement", "data.path")

ALGORITHMS: Mapping[str, Algorithm] = {
    "rejection": Algorithm("sft", "sft:SFTTrainer", (*_COMMON, "data.min_reward", "task"), _rejection, one_path=True),
    "sft": Algorithm("sft", "sft:SFTTrainer", (*_COMMON, "data.min_reward", "task"), _sft, one_path=True),
    "dpo": Algorithm(
        "dpo", "dpo:DPOTrainer", (*_COMMON, "sample", "pairs.path", "pairs.trajectories", "pairs.threshold", "reference_path"), _dpo,
        has_reference=True,
    ),
    "kto": Algorithm("kto", "kto:KTOTrainer", (*_COMMON, "label_threshold", "reference_path"), _kto, has_reference=True),
    "oreo": Algorithm(
        "oreo", "oreo:OREOTrainer", (*_COMMON, "reference.path", "critic.path", "algo.right_threshold"), _oreo, has_reference=True, has_critic=True,
    ),
}  # fmt: skip
