"""A batched reward function, in OpenRLHF's form: one call for up to ``--reward.batch_size`` responses, in a process of its own.

openrl-reason reinforce ... --reward.function examples/python/reward_func.py
"""

import re

import torch

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def reward_func(queries, prompts, labels, **kwargs):
    """1 for the right number at the end of the response, and 0.1 for any number at all.

    ``queries`` are prompt and response in one text, ``labels`` the gold answers. ``kwargs`` holds responses, items, steps and more.
    """
    found = [NUMBER.findall(query[len(prompt) :]) for query, prompt in zip(queries, prompts, strict=True)]
    right = torch.tensor([bool(numbers) and numbers[-1] == label for numbers, label in zip(found, labels, strict=True)], dtype=torch.float32)
    rewards = torch.maximum(right, 0.1 * torch.tensor([float(bool(numbers)) for numbers in found]))
    return {"rewards": rewards, "scores": right, "extra_logs": {"numbers": [len(numbers) for numbers in found]}}
