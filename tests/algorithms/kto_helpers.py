"""Labelled responses in memory, with what the drivers ask of a token store."""

import numpy as np

from openrl_reason.core.seeds import content_id
from openrl_reason.core.trajectory import Trajectory
from tests.helpers_models import VOCAB


class Responses:
    """A store of kind "responses": ``per_question`` responses of 2 to ``longest`` tokens to each question, rewards 0 and 1 in turns."""

    kind = "responses"
    folder = "memory"

    def __init__(self, num_questions=6, per_question=3, *, longest=30, seed=0):
        rng = np.random.default_rng(seed)
        self._rows = []
        for question in range(num_questions):
            prompt = rng.integers(2, VOCAB, rng.integers(3, 7)).tolist()
            for sample in range(per_question):
                response, about = rng.integers(2, VOCAB, rng.integers(2, longest)).tolist(), f"q{question}"
                reward = float((question + sample) % 2)
                self._rows.append(
                    Trajectory.from_completion(prompt, response, None, task_id=about, group_id=about, sample_index=sample, reward=reward)
                )
        self.identity = content_id(*(row.trajectory_id for row in self._rows))
        self.lengths = np.array([row.num_tokens for row in self._rows])
        self.prompt_lengths = np.array([row.num_prompt_tokens for row in self._rows])
        self.rewards = np.array([row.reward for row in self._rows], np.float32)
        self.has_reward = np.ones(len(self._rows), bool)
        self.labels = self.rewards > 0
        self.questions = np.array([int(row.task_id[1:]) for row in self._rows], np.uint64)

    def __len__(self):
        return len(self._rows)

    def trajectory(self, row):
        return self._rows[row]

    def trajectories(self, rows):
        return [self._rows[row] for row in rows]
