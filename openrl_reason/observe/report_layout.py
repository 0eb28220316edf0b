"""Which metrics share a chart, what the chart is called, and what it says. A metric that is not named here goes to "other metrics"."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Chart:
    """Metrics (patterns) drawn together."""

    title: str
    metrics: tuple[str, ...]
    text: str = ""
    """One sentence for the reader."""
    share: bool = False
    """The values are shares of one: the axis shows per cent."""


GROUPS: dict[str, tuple[Chart, ...]] = {
    "Reward": (
        Chart("Reward", ("train/reward", "train/baseline"), "Mean over the graded responses of a step."),
        Chart("Spread of rewards", ("train/reward_std",), "Standard deviation within a step. At zero there is nothing to compare."),
        Chart(
            "Groups without variance", ("train/zero_variance_groups",), "Prompts whose siblings all got the same reward: they teach nothing.", True
        ),
        Chart("Return", ("train/return", "train/returns/*"), "Mean advantage over the tokens of the policy."),
        Chart("Advantages", ("train/advantage_*",), "Mean and standard deviation over the tokens of the policy, before whitening."),
        Chart("What went wrong in grading", ("reward/*_rate",), "Share of responses by status.", True),
        Chart("Reward terms", ("reward/*",), "Each source of the reward by itself."),
    ),
    "Policy": (
        Chart("Loss", ("train/loss", "train/policy_loss", "train/value_loss"), "Over the global batch."),
        Chart("Entropy", ("train/entropy",), "Nats per token. A fall towards zero means that exploration has ended."),
        Chart("Distance to the reference", ("train/kl",), "KL per token, estimated from the sampled ones or exact (--algo.kl.kind)."),
        Chart("Weight of the KL", ("train/kl_coef",), "Fixed or adaptive."),
        Chart("Clipped tokens", ("train/clip_fraction/*", "train/clip_fraction"), "Share of tokens whose gradient the clip removed.", True),
        Chart("Importance ratio", ("train/ratio/*",), "Present over sampling policy, extremes of a step."),
        Chart("Size of an update", ("train/approx_kl",), "KL of the present to the sampling policy."),
        Chart("Gradient norm", ("train/grad_norm", "train/grad_norm/*"), "Before clipping."),
        Chart("Learning rate", ("train/lr",)),
        Chart("Skipped updates", ("train/skipped_update",), "1 where a non-finite gradient was left out, or no response had a reward."),
    ),
    "Critic": (
        Chart("Explained variance", ("critic/vf_explained_var",), "1 is perfect, 0 no better than a constant."),
        Chart("Critic loss", ("critic/*loss*",)),
        Chart("Error of the values", ("critic/value_error",), "Mean absolute distance from the returns, before the critic is trained on them."),
        Chart("Clipped values", ("critic/value_clip_fraction",), "Share of tokens whose clipped error was the larger one.", True),
        Chart("Values and returns", ("critic/*value*", "critic/*return*")),
        Chart("Gradient norm of the critic", ("critic/grad_norm",), "Before clipping."),
        Chart("Learning rate of the critic", ("critic/lr",)),
        Chart("The critic alone, and updates it skipped", ("train/critic_warmup", "critic/skipped_update"), "1 where it was so."),
    ),
    "Length": (
        Chart("Response length", ("response_length/mean", "response_length/max", "response_length/min"), "Tokens."),
        Chart("Cut off by the limit", ("response_length/clip_ratio",), "Unfinished is not the same as wrong.", True),
        Chart("Prompt length", ("prompt_length/*",), "Tokens."),
    ),
    "Engine": (
        Chart(
            "Difference of log-probs, mean",
            ("sampling/logprob_difference/mean",),
            "Absolute, of the sampled tokens. Rounding in float32 is about 1e-5.",
        ),
        Chart("Difference of log-probs, largest", ("sampling/logprob_difference/max",), "The worst token of a step."),
        Chart(
            "Rollouts",
            ("rollout/engine_restarts", "rollout/resubmitted", "rollout/ungraded"),
            "Counts per step: restarts, requests sent again, ungraded.",
        ),
        Chart("Prefix cache", ("rollout/prefix_cache_hit*",), "Prompt tokens served from the cache."),
        Chart("Sampling", ("sampling/*",)),
    ),
    "Time": (
        Chart("Step time", ("timing/step", "timing/generate", "timing/generate_busy", "timing/update"), "Wall seconds."),
        Chart("Throughput", ("perf/*tokens_per_second",), "Tokens per second."),
        Chart("Parts of an update", ("timing/forward_backward", "timing/optimizer", "timing/sync"), "Wall seconds."),
        Chart("The critic's updates", ("timing/critic_*",), "Wall seconds."),
        Chart(
            "Waiting and scoring",
            ("timing/credit", "timing/grade", "timing/score", "timing/values", "timing/reference_wait", "timing/branch"),
            "Wall seconds. branch: rollouts that were not there when the last response was.",
        ),
        Chart("Hidden rollouts", ("perf/branch_hidden_share",), "Share of the Monte-Carlo tokens that were there when the last response was.", True),
        Chart("Evaluation time", ("timing/evaluate",), "Wall seconds."),
    ),
}
ONE_EACH = {"Credit": "credit/*", "Offline": "offline/*"}
"""Groups in which every metric gets a chart of its own."""
OTHER = "Other"
_BOUND = re.compile(r".+(_low|_high|_stderr)$")


def layout(names: Sequence[str]) -> list[dict[str, Any]]:
    """Groups of charts, each with the metrics that exist; every metric is in exactly one chart (bounds of intervals are drawn as bands)."""
    left = dict.fromkeys(name for name in names if not (_BOUND.match(name) and _BOUND.sub("", name) != name and _base(name) in names))
    groups = [_group("Evaluation", _evaluation_charts(left))]
    for title, charts in GROUPS.items():
        groups.append(_group(title, [_take(chart, left) for chart in charts]))
    for title, pattern in ONE_EACH.items():
        groups.append(_group(title, _singles(fnmatch.filter(left, pattern), left)))
    groups[0]["charts"] += _singles(fnmatch.filter(left, "eval/*"), left)  # of trainers that evaluate on one set, without a name
    groups.append(_group(OTHER, _singles(list(left), left)))
    return [group for group in groups if group["charts"]]


def _base(name: str) -> str:
    return re.sub(r"(_low|_high|_stderr)$", "", name)


def _group(title: str, charts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"title": title, "id": slug(title), "charts": [chart for chart in charts if chart["metrics"]], "collapsed": title == OTHER}


def slug(text: str) -> str:
    """An id for a link."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _take(chart: Chart, left: dict[str, None]) -> dict[str, Any]:
    metrics = [name for pattern in chart.metrics for name in fnmatch.filter(left, pattern)]
    for name in metrics:
        left.pop(name, None)
    return asdict(chart) | {"metrics": list(dict.fromkeys(metrics))}


def _singles(names: Sequence[str], left: dict[str, None]) -> list[dict[str, Any]]:
    return [_take(Chart(name.split("/", 1)[-1].replace("_", " "), (_literal(name),)), left) for name in names]


def _literal(name: str) -> str:
    return re.sub(r"([\[*?])", r"[\1]", name)


def _evaluation_charts(left: dict[str, None]) -> list[dict[str, Any]]:
    """For each evaluated set: scores together, what went wrong together, length and loss by themselves."""
    sets = dict.fromkeys(match[1] for name in left if (match := re.fullmatch(r"eval/(.+)/[^/]+", name)))
    charts = []
    for name in sets:
        prefix = f"eval/{_literal(name)}/"
        charts += [
            _take(
                Chart(
                    f"{name}: score",
                    (prefix + "pass@*", prefix + "maj@*", prefix + "mean@*"),
                    "Held-out problems. The band is the 95 % interval.",
                    True,
                ),
                left,
            ),
            _take(Chart(f"{name}: loss", (prefix + "loss", prefix + "perplexity"), "Held-out."), left),
            _take(Chart(f"{name}: what went wrong", (prefix + "*_rate",), "Share of responses.", True), left),
            _take(Chart(f"{name}: response length", (prefix + "response_length*",), "Tokens."), left),
            _take(Chart(f"{name}: other", (prefix + "*",)), left),
        ]
    return charts
