"""Two results on the same items: the right test, the right pairs, and no comparison of different items by accident."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from openrl_reason.config import flag_names, parse_config
from openrl_reason.errors import ConfigError, DataError
from openrl_reason.evaluation.compare import RESULT_FORMAT, CompareConfig, compare_files, compare_results
from openrl_reason.evaluation.intervals import IntervalConfig, mcnemar

CONFIG = IntervalConfig(num_resamples=2000)
ROOT = Path(__file__).resolve().parents[2]


def result(scores, ids=None, name="s", votes=None, temperature=0.0):
    ids = ids or [f"item-{place}" for place in range(len(scores))]
    votes = votes or [[0 if score else 1 for score in row] for row in scores]
    items = [{"id": one, "scores": row, "votes": vote} for one, row, vote in zip(ids, scores, votes, strict=True)]
    one = {"name": name, "num_samples": len(scores[0]), "items": items, "estimates": {"gsm8k": {}}, "sampling": {"temperature": temperature}}
    return {"format": RESULT_FORMAT, "model": {"path": f"models/{name}"}, "sets": [one]}


def test_one_sample_each_is_mcnemar_with_counts():
    first, second = result([[1.0]] * 8 + [[0.0]] * 4), result([[1.0]] * 3 + [[0.0]] * 8 + [[1.0]])
    (one,) = compare_results(first, second, config=CONFIG)
    assert (one.wins, one.losses, one.ties, one.test) == (5, 1, 6, "McNemar, exact")
    assert one.p_value == mcnemar(5, 1) and one.difference.value == pytest.approx(4 / 12)
    assert one.difference.interval.low < 4 / 12 < one.difference.interval.high and one.notes == ()


def test_the_comparison_is_antisymmetric():
    rng = np.random.default_rng(0)
    first, second = (result(rng.integers(0, 2, (40, 4)).astype(float).tolist(), temperature=t) for t in (1.0, 0.7))
    (one,), (other,) = compare_results(first, second, config=CONFIG), compare_results(second, first, config=CONFIG)
    assert one.test == "permutation" and one.p_value == other.p_value
    assert (one.wins, one.losses) == (other.losses, other.wins) and one.difference.value == -other.difference.value
    assert one.notes == ("temperature: 1.0 and 0.7",)


def test_a_real_difference_is_found_and_none_is_not_claimed():
    rng = np.random.default_rng(1)
    difficulty = rng.uniform(0.1, 0.8, 200)

    def sample(better):
        return result(rng.binomial(1, np.clip(difficulty + better, 0, 1)[:, None], (200, 4)).astype(float).tolist())

    (better,) = compare_results(sample(0.15), sample(0.0), config=CONFIG)
    assert better.p_value < 0.01 and better.difference.interval.low > 0
    false_alarms = sum(compare_results(sample(0.0), sample(0.0), config=CONFIG)[0].p_value < 0.05 for _ in range(60))
    assert false_alarms <= 8


def test_order_does_not_matter_and_repeated_ids_match_in_turn():
    first = result([[1.0], [0.0], [1.0]], ids=["a", "b", "a"])
    second = result([[0.0], [1.0], [1.0]], ids=["b", "a", "a"])
    (one,) = compare_results(first, second, config=CONFIG)
    assert (one.wins, one.losses, one.ties) == (0, 0, 3) and one.p_value == 1.0 and one.difference.interval.method == "wilson"


def test_different_items_are_refused_by_name_unless_asked_for():
    first, second = result([[1.0], [1.0]], ids=["a", "b"]), result([[0.0], [1.0]], ids=["b", "c"])
    with pytest.raises(DataError, match=r"1 only in the first \(a\), 1 only in the second \(c\), 1 in both: pass --common_items true"):
        compare_results(first, second, config=CONFIG)
    (one,) = compare_results(first, second, config=CONFIG, common_items=True)
    assert (one.wins, one.ties) == (1, 0)
    with pytest.raises(DataError, match="no item in common"):
        compare_results(first, result([[1.0]], ids=["z"]), config=CONFIG, common_items=True)


def test_items_whose_grading_failed_are_left_out_and_counted():
    (one,) = compare_results(result([[None], [1.0]]), result([[1.0], [0.0]]), config=CONFIG)
    assert (one.left_out, one.wins, one.losses) == (1, 1, 0)


def test_other_metrics_are_compared_item_by_item():
    first = result([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]], votes=[[0, 1, 0], [0, 0, 1]])
    second = result([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], votes=[[0, 1, 2], [0, 1, None]])
    (maj,) = compare_results(first, second, config=CONFIG, metric="maj@3")
    assert (maj.first, maj.second) == pytest.approx((0.5, 1 / 6))
    (best,) = compare_results(first, second, config=CONFIG, metric="pass@3")
    assert (best.first, best.second) == (1.0, 0.5)
    with pytest.raises(ConfigError, match="--metric is 'pass@4': set 's' has 3 samples"):
        compare_results(first, second, config=CONFIG, metric="pass@4")


def test_sets_are_matched_by_name():
    with pytest.raises(ConfigError, match="no set in common"):
        compare_results(result([[1.0]], name="x"), result([[1.0]], name="y"), config=CONFIG)
    with pytest.raises(ConfigError, match="--sets is 'q'"):
        compare_results(result([[1.0]]), result([[1.0]]), config=CONFIG, names=["q"])
    with pytest.raises(ConfigError, match="--metric is 'pass@x'"):
        CompareConfig(metric="pass@x")


def test_the_command_prints_a_table_and_writes_json(tmp_path):
    for name, scores in (("a", [[1.0], [1.0], [0.0]]), ("b", [[0.0], [1.0], [0.0]])):
        (tmp_path / f"{name}.json").write_text(json.dumps(result(scores)))
    words = [str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--output", str(tmp_path / "c.json")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "openrl_reason", "compare", *words], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "1 / 0 / 2" in done.stdout and "McNemar" in done.stdout
    (one,) = json.loads((tmp_path / "c.json").read_text())["comparisons"]
    assert one["wins"] == 1 and one["difference"]["value"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(("text", "expected"), [("[1]", "not a result"), ("{", "not JSON"), (None, "No such file")])
def test_what_is_no_result_file_is_told(text, expected, tmp_path):
    if text is not None:
        (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=expected):
        compare_files(CompareConfig(first=str(tmp_path / "a.json"), second=str(tmp_path / "a.json")))
    with pytest.raises(ConfigError, match="give two files"):
        compare_files(CompareConfig(first="a.json"))


def test_every_flag_of_the_command_has_a_help_text(capsys):
    with pytest.raises(SystemExit):
        parse_config(CompareConfig, ["--help"], prog="test")
    text = " ".join(capsys.readouterr().out.split())
    for name in flag_names(CompareConfig):
        after = text.split(f"--{name} ", 1)[1]
        assert len(after.split("(type:")[0].split()) > 2, f"--{name} has no help"


def test_an_output_that_cannot_be_written_and_a_damaged_result_are_told_at_once(tmp_path):
    whole, damaged = tmp_path / "a.json", tmp_path / "b.json"
    whole.write_text(json.dumps(result([[1.0]])))
    damaged.write_text(json.dumps({"format": RESULT_FORMAT, "model": {"path": "m"}, "sets": [{"name": "s"}]}))
    with pytest.raises(DataError, match="b.json is a result .* with parts missing"):
        compare_files(CompareConfig(first=str(whole), second=str(damaged)))
    with pytest.raises(ConfigError, match="--output is .*give a file name in a folder"):
        compare_files(CompareConfig(first=str(whole), second=str(whole), output=str(tmp_path)))
