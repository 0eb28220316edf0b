"""REINFORCE with a mean baseline in one process, without Ray: an environment, a policy, and a loop.

    python examples/python/gym_loop.py MODEL_FOLDER [steps]
"""

import sys

import torch

from openrl_reason import TokenBatch, load_task
from openrl_reason.core.losses import policy_loss
from openrl_reason.models.local_policy import LocalPolicy
from openrl_reason.tasks.base import TaskConfig


def loss(outputs, batch, denominators):
    return policy_loss(outputs.logprobs, outputs.logprobs.detach(), batch.tokens["advantages"], batch.action_mask, denominator=denominators["tokens"])


def main(model: str, steps: int = 20) -> None:
    task = load_task(TaskConfig(name="arithmetic", levels=(1,), num_train=64, num_test=8))
    policy = LocalPolicy(model, lr=3e-4)
    for step in range(steps):
        episodes = []
        for item in task.items("train")[:8]:
            env = task.env(item)
            text, trajectory = policy.act(env.reset(), max_new_tokens=24, task_id=item.task_id)
            _, reward, _, _ = env.step(text)
            trajectory.rewards[-1] = reward
            episodes.append(trajectory)
        batch = TokenBatch.from_trajectories(episodes)
        rewards = batch.sequences["rewards"]
        advantages = (rewards - rewards.mean())[batch.sequence_ids]
        metrics = policy.update(batch.with_tokens(advantages=advantages), loss, {"tokens": batch.num_actions})
        print(f"step {step}: reward {rewards.mean():.3f}, loss {metrics['policy_loss']:.4f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 20)
