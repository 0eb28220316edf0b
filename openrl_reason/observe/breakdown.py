"""Where the wall time of a step goes, from ``metrics.jsonl`` alone."""

from __future__ import annotations

from pathlib import Path

from openrl_reason.observe.run_log import read_records

PARTS = {
    "generation": ("timing/generate_busy",),
    "forward and backward": (
        "timing/forward_backward", "timing/score", "timing/reference_wait", "timing/values", "timing/critic_forward_backward",
    ),
    "optimizer": ("timing/optimizer", "timing/critic_optimizer"),
    "weight sync": ("timing/sync",),
    "grading": ("timing/grade",),
}
"""part -> the metrics whose sum it is. ``generate_busy`` is the time that the busiest engine spent in model steps, not in waiting."""


def time_breakdown(metrics_path: Path, *, skip: int = 1) -> dict[str, float]:
    """Share of the steps' wall time by part, and ``rest`` (driver, transport, waiting); empty if there are too few steps.

    The first ``skip`` steps are left out: they warm caches and allocate.
    """
    steps = [record for record in read_records(metrics_path) if record["event"] == "train"][skip:]
    total = sum(record["timing/step"] for record in steps)
    if not total:
        return {}
    shares = {part: sum(record.get(name) or 0.0 for record in steps for name in names) / total for part, names in PARTS.items()}
    shares["forward and backward"] -= sum(record.get("timing/update_overlap") or 0.0 for record in steps) / total  # two models side by side
    shares = {part: share for part, share in shares.items() if share > 0}
    return shares | {"rest": 1.0 - sum(shares.values())}
