"""What the report reads of a run: curves keep their spikes, damaged and unfinished logs still give a report, every metric is in one chart."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from openrl_reason.errors import ConfigError, DataError
from openrl_reason.observe import report_data
from openrl_reason.observe.report import ReportConfig, parse_report_words
from openrl_reason.observe.report_data import curves, end_means, facts, key_figures, read_run, read_runs, short_names, thin, timing_table
from openrl_reason.observe.report_layout import layout


def write_metrics(folder, records, config=""):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if config:
        (folder / "config.yaml").write_text(config)
    return folder


def train(step, **metrics):
    return {"step": step, "event": "train", **{name.replace("__", "/"): value for name, value in metrics.items()}}


def test_a_thinned_curve_keeps_every_spike_and_the_means_keep_the_whole():
    rng = np.random.default_rng(0)
    y = rng.normal(size=10_000)
    spikes = rng.choice(10_000, size=20, replace=False)
    y[spikes] = np.where(np.arange(20) % 2, 50.0, -50.0)
    y[123] = math.nan
    thinned = thin(np.arange(10_000.0), y)
    assert len(thinned["x"]) <= report_data.MAX_POINTS and thinned["x"] == sorted(thinned["x"])
    kept = dict(zip(thinned["x"], thinned["y"], strict=True))
    assert all(kept[int(spike)] == y[spike] for spike in spikes)
    assert np.mean(thinned["my"]) == pytest.approx(np.nanmean(y), abs=1e-4)
    assert thinned["per"] == 10.0


def test_a_short_curve_is_as_it_was_and_a_gap_stays_a_gap():
    assert thin(np.arange(3.0), np.array([1.0, math.nan, 0.25])) == {"x": [0, 1, 2], "y": [1, None, 0.25]}
    assert None in thin(np.arange(5000.0), np.where(np.arange(5000) < 100, math.nan, 1.0))["y"]


def test_a_log_cut_by_a_kill_or_with_foreign_lines_is_read_as_far_as_it_goes(tmp_path):
    folder = write_metrics(tmp_path / "run", [train(0, train__reward=0.5), train(1, train__reward=None), train(1, train__reward=0.75)])
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'[1]\n{"event": "train"}\n\xff\xfe\n' + b"[" * 100_000 + b'\n{"step": 2, "event": "tr')
    run = read_run(folder, "run")
    assert [(record["step"], record["train/reward"]) for record in run.train] == [(0, 0.5), (1, 0.75)]
    assert run.num_damaged == 5
    assert curves(run)["train/reward"] == {"x": [0, 1], "y": [0.5, 0.75]}


def test_evaluations_of_one_step_are_joined_and_carry_their_intervals(tmp_path):
    rows = [
        {"step": 0, "event": "eval", "eval/a/pass@1": 0.5, "eval/a/pass@1_low": 0.4, "eval/a/pass@1_high": 0.7},
        {"step": 0, "event": "eval", "eval/b/pass@1": 0.25, "eval/b/pass@1_stderr": 0.1},
        {"step": 9, "event": "eval", "eval/a/pass@1": 0.9, "eval/a/pass@1_low": 0.8, "eval/a/pass@1_high": 1.0},
    ]
    run = read_run(write_metrics(tmp_path / "run", rows), "run")
    found = curves(run)
    assert found["eval/a/pass@1"] == {"x": [0, 9], "y": [0.5, 0.9], "eval": True, "low": [0.4, 0.8], "high": [0.7, 1]}
    assert found["eval/b/pass@1"]["low"] == [pytest.approx(0.054)]
    tile = next(tile for tile in key_figures(run) if tile["label"] == "a/pass@1")
    assert (tile["first"], tile["last"], tile["bounds"]) == (0.5, 0.9, [[0.4, 0.7], [0.8, 1.0]])


def test_the_header_knows_steps_state_and_what_the_config_says(tmp_path):
    config = "run: {steps: 3, seed: 7}\npolicy: {path: m/tiny}\ntask: {name: arithmetic}\nalgo: {advantage: grpo}\n"
    folder = write_metrics(tmp_path / "run", [train(step, timing__step=2.0) for step in range(3)], config)
    lines = dict(facts(read_run(folder, "run")))
    assert lines == {
        "algorithm": "reinforce (grpo)", "steps": "3 of 3", "state": "finished", "model": "m/tiny", "task": "arithmetic", "seed": "7",
    }  # fmt: skip
    write_metrics(folder, [train(0, timing__step=2.0)])
    assert "running" in dict(facts(read_run(folder, "run")))["state"]
    later = (folder / "metrics.jsonl").stat().st_mtime + 3600
    assert dict(facts(read_run(folder, "run"), now=later))["state"].startswith("stopped early")
    (folder / "progress.json").write_text('{"total_steps": 1}')  # steps that the epochs leave
    assert dict(facts(read_run(folder, "run")))["steps"] == "1 of 1" and dict(facts(read_run(folder, "run")))["state"] == "finished"


def test_the_parts_of_a_step_and_the_rest_make_up_its_time(tmp_path):
    rows = [train(s, timing__step=4.0, timing__generate_busy=2.0, timing__optimizer=0.5, timing__grade=None) for s in range(1000)]
    table = timing_table(read_run(write_metrics(tmp_path / "run", rows), "run"))
    assert table["shares"] == {"generation": 0.5, "optimizer": 0.125, "rest": 0.375}
    assert len(table["x"]) == report_data.MAX_TIMING_BARS and table["last"][-1] == 999
    assert set(table["parts"]["rest"]) == {1.5}
    assert timing_table(read_run(write_metrics(tmp_path / "none", [train(0)]), "none")) == {}


def test_start_and_end_are_means_over_a_tenth_of_the_run():
    assert end_means(np.arange(100.0)) == (4.5, 94.5, 10)
    assert end_means(np.array([math.nan, 3.0])) == (3.0, 3.0, 1)


def test_every_metric_is_in_exactly_one_chart_and_bounds_are_in_none():
    names = ["train/reward", "train/kl", "timing/step", "odd[1]*", "eval/my set/pass@1", "eval/my set/pass@1_low", "eval/my set/pass@1_high",
             "eval/my set/pass@1_stderr", "eval/my set/deep/er", "credit/x", "reward/timeout_rate", "reward/format", "lonely_low"]  # fmt: skip
    charts = [chart for group in layout(names) for chart in group["charts"]]
    drawn = [metric for chart in charts for metric in chart["metrics"]]
    assert sorted(drawn) == sorted(name for name in names if not re.search("pass@1_", name))
    assert [group["title"] for group in layout(names)][0] == "Evaluation"
    without_set = layout(["eval/value_loss", "train/kl"])
    assert [(group["title"], group["collapsed"]) for group in without_set][0] == ("Evaluation", False)


def test_runs_get_the_shortest_names_that_tell_them_apart(tmp_path):
    assert short_names([Path("/x/a/rl")]) == ["rl"]
    assert short_names([Path("/x/a/rl"), Path("/x/b/rl")]) == ["a/rl", "b/rl"]
    assert short_names([Path("/x/rl"), Path("/x/rl")]) == ["rl", "rl (2)"]


def test_what_is_no_run_is_refused_with_a_hint(tmp_path, capsys):
    write_metrics(tmp_path / "quickstart" / "rl", [train(0)])
    with pytest.raises(DataError, match="no run folder .*did you mean 'quickstart'"):
        read_runs([str(tmp_path / "quickstar")])
    with pytest.raises(DataError, match="its folders rl hold runs"):
        read_runs([str(tmp_path / "quickstart")])
    (tmp_path / "quickstart" / "rl" / "config.yaml").write_text("a: [1")
    (found,) = read_runs([str(tmp_path / "quickstart" / "rl" / "metrics.jsonl")])
    assert found.config == {} and "config.yaml is left out, it is no readable YAML" in capsys.readouterr().out
    (tmp_path / "quickstart" / "rl" / "metrics.jsonl").write_bytes(b"\x80\x81\n{}\n")
    with pytest.raises(DataError, match="has nothing to show"):
        read_runs([str(tmp_path / "quickstart" / "rl")])


def test_run_folders_and_flags_may_come_in_any_order():
    config = parse_report_words(["a", "--title", "two words", "b c", "--max_trajectories=5", "--output", "x.html", "d"], "report")
    assert config == ReportConfig(runs=("a", "b c", "d"), output="x.html", title="two words", max_trajectories=5)
    refused = (
        ([], "name at least one"),
        (["a", "--max_trajectories", "-1"], "max_trajectories is -1"),
        (["a", "--titel", "x"], "did you mean 'title'"),
    )
    for words, expected in refused:
        with pytest.raises(ConfigError, match=expected):
            read_runs(parse_report_words(words, "report").runs)
