"""The logs of a run: one line per step, none twice after a resume, no NaN in JSON."""

import json
import math

from openrl_reason.observe.plots import plot_curves
from openrl_reason.observe.run_log import RunLog, read_records


def write(folder, steps, start=0):
    log = RunLog(folder, total_steps=6, start_step=start, headline=("train/loss",))
    for step in steps:
        log.train(step, {"train/loss": 1.0 / (step + 1), "train/kl": math.nan})
        log.rollouts([{"step": step, "response": "a\ud800b"}])
        if step == 1:
            log.evaluation(2, {"eval/toy/pass@1": 0.5})
    log.close()


def test_a_resumed_log_equals_the_straight_one(tmp_path, capsys):
    (tmp_path / "straight").mkdir(), (tmp_path / "killed").mkdir()
    write(tmp_path / "straight", range(6))
    write(tmp_path / "killed", range(4))
    with (tmp_path / "killed/metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "event": "tr')  # the kill cut a line short
    write(tmp_path / "killed", range(2, 6), start=2)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert read_records(tmp_path / "killed" / name) == read_records(tmp_path / "straight" / name)


def test_nan_is_written_as_null_and_shown_as_a_dash(tmp_path, capsys):
    log = RunLog(tmp_path, total_steps=1, headline=("train/kl", "train/loss"))
    log.train(0, {"train/kl": math.nan, "train/loss": 0.25})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 0, "event": "train", "train/kl": None, "train/loss": 0.25}
    assert capsys.readouterr().out == "step 1/1  kl -  loss 0.25\n"


def test_curves_are_drawn_from_the_log_alone(tmp_path, capsys):
    write(tmp_path, range(4))
    plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", train=("train/loss", "train/absent"), title="t")
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
