"""openrl_reason: train language models to reason, by online and offline reinforcement learning on Ray.

The public names below are imported on first use, so that ``import openrl_reason`` is quick and needs neither vLLM, DeepSpeed nor flash-attn.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Trajectory": "core.trajectory",
    "StopReason": "core.trajectory",
    "TokenBatch": "core.batch",
    "SFTConfig": "algorithms.sft",
    "SFTTrainer": "algorithms.sft",
    "ReinforceConfig": "algorithms.reinforce",
    "ReinforceTrainer": "algorithms.reinforce",
    "PPOConfig": "algorithms.ppo",
    "PPOTrainer": "algorithms.ppo",
    "VinePPOConfig": "algorithms.vineppo",
    "VinePPOTrainer": "algorithms.vineppo",
    "RestEMConfig": "algorithms.restem",
    "RestEMTrainer": "algorithms.restem",
    "DPOConfig": "algorithms.dpo",
    "DPOTrainer": "algorithms.dpo",
    "KTOConfig": "algorithms.kto",
    "KTOTrainer": "algorithms.kto",
    "OREOConfig": "algorithms.oreo",
    "OREOTrainer": "algorithms.oreo",
    "CollectConfig": "algorithms.collection",
    "collect_samples": "algorithms.collection",
    "IterateConfig": "algorithms.iterate",
    "iterate": "algorithms.iterate",
    "EvaluateConfig": "evaluation.evaluate",
    "evaluate_model": "evaluation.evaluate",
    "SearchConfig": "search.config",
    "search_model": "search.command",
    "best_of_k": "search.actions",
    "AnalyzeValuesConfig": "evaluation.analyze_values",
    "analyze_values": "evaluation.analyze_values",
    "AnalyzePolicyConfig": "evaluation.analyze_policy",
    "analyze_policy": "evaluation.analyze_policy",
    "Task": "tasks.base",
    "TaskItem": "tasks.base",
    "load_task": "tasks.base",
    "grade": "workers.grading",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'openrl_reason' has no attribute {name!r}")
    value = getattr(import_module(f"openrl_reason.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
