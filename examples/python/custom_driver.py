"""Your own training loop in 30 lines: length-penalised RLOO with rejection of easy prompts' samples, from the parts of ``ReinforceTrainer``.

python examples/python/custom_driver.py MODEL_FOLDER OUTPUT_FOLDER
"""

import sys

from openrl_reason import ReinforceConfig, ReinforceTrainer
from openrl_reason.algorithms.trainer import RunConfig
from openrl_reason.workers.model_config import TrainedModelConfig
from openrl_reason.workers.rollout_config import RolloutConfig, SamplingConfig


def main(model: str, output: str, steps: int = 3) -> None:
    config = ReinforceConfig(
        run=RunConfig(output_dir=output, steps=steps),
        prompts_per_step=8,
        samples_per_prompt=4,
        policy=TrainedModelConfig(path=model, dtype="float32", lr=3e-4),
        rollout=RolloutConfig(dtype="float32", max_model_len=256),
        sampling=SamplingConfig(temperature=1.0, max_new_tokens=64),
    )
    with ReinforceTrainer(config) as trainer:
        for step in range(steps):
            rollouts = trainer.collect()
            for trajectory in rollouts.trajectories:
                trajectory.rewards[-1] -= 0.001 * trajectory.num_actions  # your reward
            batch, metrics = trainer.credit(rollouts)
            keep = [i for i, reward in enumerate(batch.sequences["rewards"]) if reward < 0.9 or i % 2]  # your filter
            metrics |= trainer.update(batch.select(keep) if keep else batch)
            metrics |= trainer.sync(step + 1)
            trainer.done += 1
            print(step, {name: round(float(metrics[name]), 4) for name in ("train/policy_loss", "train/entropy", "train/grad_norm")})
        print(trainer.evaluate())
        trainer.export(trainer.folder / "model")


if __name__ == "__main__":
    main(*sys.argv[1:3])
