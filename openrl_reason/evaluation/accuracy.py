"""Accuracy of a set of graded samples. (pass@k, maj@k and intervals belong to the evaluation issue; this is the mean and its standard error.)"""

from __future__ import annotations

import numpy as np

from openrl_reason.algorithms.collect import GRADED, Rollouts
from openrl_reason.core.trajectory import StopReason


def accuracy_metrics(rollouts: Rollouts, num_samples: int, *, name: str) -> dict[str, float]:
    """``eval/<name>/...``: pass@1 (mean score over items and samples), its standard error over items, and what went wrong how often.

    A sample whose grader failed counts as neither right nor wrong: it is left out of the mean and shown in ``ungraded_rate``.
    """
    scores = rollouts.rewards.reshape(-1, num_samples)
    items = np.array([np.nanmean(row) for row in scores if np.isfinite(row).any()])
    truncated = [t.stop_reason == StopReason.LENGTH for t in rollouts.trajectories]
    statuses = rollouts.statuses
    return {
        f"eval/{name}/pass@1": float(items.mean()) if len(items) else float("nan"),
        f"eval/{name}/pass@1_stderr": float(items.std(ddof=1) / np.sqrt(len(items))) if len(items) > 1 else float("nan"),
        f"eval/{name}/response_length": float(np.mean([t.num_actions for t in rollouts.trajectories])),
        f"eval/{name}/truncated_rate": float(np.mean(truncated)),
        f"eval/{name}/no_answer_rate": statuses.count("no_answer") / len(statuses),
        f"eval/{name}/ungraded_rate": sum(status not in GRADED for status in statuses) / len(statuses),
    }
