"""The analyze-values command as users run it: engines, critics, a reference, a reward of one's own, and the page in a browser."""

import csv
import json
import subprocess
import sys

import pytest

from tests.e2e.conftest import ENV, ROOT, command, run

sys.path.insert(0, str(ROOT / "benchmarks"))

from _browser import browser, chromium  # noqa: E402


@pytest.fixture(scope="module")
def words(sft_run, tiny_model, tmp_path_factory):
    """A model that solves nothing has values all the same with a reward that any text may earn."""
    file = tmp_path_factory.mktemp("reward") / "parity.py"
    file.write_text("def reward_func(responses, **kwargs):\n    return [float(len(response) % 2) for response in responses]\n")
    model = sft_run / "model"
    return [
        "analyze-values", "--model", model, "--task.levels", "[1]", "--reward.function", f"{file}:reward_func", "--num_items", "8",
        "--num_states", "12", "--truth_rollouts", "12", "--mc", "[1, 3]", "--critic", model, "--oreo_critic", tiny_model, "--oreo_affine", "[2, 0.5]",
        "--reference", tiny_model, "--step_kind", "fixed:4", "--ranking_states", "4", "--ranking_truth_rollouts", "6",
        "--sampling.max_new_tokens", "16", "--rollout.max_model_len", "64", "--rollout.dtype", "float32", "--rollout.kv_cache_gib", "0.05",
        "--scoring.dtype", "float32",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def analysis(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("values") / "out"
    return folder, run(*words, "--output", folder).stdout


def test_states_critics_and_next_steps_are_analyzed(analysis, words):
    folder, printed = analysis
    assert "values of 12 states" in printed and "ranking of next steps" in printed and "all its values are 0" in printed
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["estimators"]) == ["MC K=1", "MC K=3", "critic", "OREO critic"]
    assert [*summary["ranking"]] == ["MC K=1", "MC K=3", "critic", "OREO critic", "implicit advantage"]
    assert summary["model"]["weights_fingerprint"] and summary["counts"]["without_reward"] == 0
    assert 0 < summary["truth"]["mean"] < 1 and summary["truth"]["noise_mae"] > 0
    rows = list(csv.DictReader((folder / "states.csv").open()))
    assert len(rows) == 12 * 4
    # New heads say 0, which the affine map makes 0.5.
    assert {(row["estimator"], row["prediction"]) for row in rows if "critic" in row["estimator"]} == {("critic", "0"), ("OREO critic", "0.5")}
    ranked = [row for row in csv.DictReader((folder / "ranking.csv").open(newline="")) if row["estimator"] == "implicit advantage"]
    assert len(ranked) == summary["counts"]["ranking_next_steps"] >= 3
    assert len({row["prediction"] for row in ranked}) > 1, "the policy has been trained, so it differs from its reference"
    assert run_fails(*words, "--output", folder) == f"error: --output is {str(folder)!r}: it exists: choose another folder, or pass --overwrite true"


def run_fails(*words):
    result = subprocess.run(command(*words), capture_output=True, text=True, env=ENV, timeout=100)
    assert result.returncode == 2
    return result.stderr.strip().splitlines()[-1]


@pytest.mark.skipif(chromium() is None, reason="no chromium on this machine (Debian: apt install chromium)")
def test_the_page_draws_itself_and_asks_for_nothing(analysis):
    folder, _ = analysis
    with browser() as window:
        window.open(folder / "values.html")
        window.wait("document.querySelectorAll('.plot .main-svg').length > 0")
        assert window.run("document.getElementById('errors').textContent") == "" and window.complaints() == []
        assert all(url.startswith(("file:", "data:", "blob:")) for url in window.requests())
        assert window.run("document.querySelectorAll('figure').length") == 7 and window.run("document.querySelectorAll('table').length") == 3
