"""The best model of a run: kept by any trainer, replaced as a whole, found again by a resumed run."""

import contextlib
import json
from dataclasses import dataclass, field

import pytest

from openrl_reason.algorithms import trainer as trainer_module
from openrl_reason.algorithms.best import BestModel
from openrl_reason.algorithms.trainer import RunConfig, Trainer
from openrl_reason.errors import CheckpointError, ConfigError
from openrl_reason.workers.placement import PlacementConfig

SCORES = [0.2, 0.5, float("nan"), 0.5, 0.4, 0.7, 0.1]
"""By finished steps."""


@dataclass(frozen=True)
class Config:
    run: RunConfig
    placement: PlacementConfig = field(default_factory=PlacementConfig)


class Scripted(Trainer):
    """Steps that do nothing, evaluations from ``SCORES``; its model is the number of steps. ``stop_at``: a step that never ends."""

    stop_at = None

    def roles(self):
        return []

    def plan(self):
        return []

    def prepare(self): ...

    def build(self, placement, stack): ...

    def step(self):
        if self.done == self.stop_at:
            raise KeyboardInterrupt
        return {"train/loss": 0.0}

    def evaluate(self):
        return {"eval/toy/pass@1": SCORES[self.done], "eval/toy/pass@1_low": 0.0, "eval/loss": -SCORES[self.done]}

    def export(self, folder):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(str(self.done))

    def save_workers(self, folder):
        self.export(folder / "model")

    def load_workers(self, folder): ...

    def order(self):
        return {}


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """A function that makes the trainer of a run in ``tmp_path/run``."""
    monkeypatch.setattr(trainer_module, "Placement", lambda config, roles: contextlib.nullcontext())
    monkeypatch.setattr(trainer_module, "print_plan", lambda trainer: None)
    monkeypatch.setattr(trainer_module, "plot_curves", lambda *args, **kwargs: None)

    def make(**run):
        run = {"best_metric": "eval/toy/pass@1", "eval_every": 1, "steps": len(SCORES) - 1} | run
        return Scripted(Config(RunConfig(output_dir=str(tmp_path / "run"), report=False, **run)))

    return make


def kept(tmp_path):
    """(steps of the model, record) in the run's best folder."""
    folder = tmp_path / "run/best"
    assert {path.name for path in folder.iterdir()} == {"model", "best.json"}
    return int((folder / "model/config.json").read_text()), json.loads((folder / "best.json").read_text())


@pytest.mark.parametrize(
    ("run", "step", "value"),
    [({}, 5, 0.7), ({"steps": 4}, 1, 0.5), ({"best_mode": "min"}, 6, 0.1), ({"best_metric": "eval/loss", "best_mode": "min"}, 5, -0.7),
     ({"eval_every": 3}, 3, 0.5), ({"eval_every": 0, "eval_at_start": False}, 6, 0.1)],
)  # fmt: skip
def test_the_model_of_the_best_evaluation_is_kept_the_earlier_of_two_alike(scripted, tmp_path, capsys, run, step, value):
    one = scripted(**run)
    one.fit()
    mode = run.get("best_mode", "max")
    assert kept(tmp_path) == (step, {"metric": run.get("best_metric", "eval/toy/pass@1"), "mode": mode, "value": value, "step": step})
    assert (one.best.value, one.best.step) == (value, step)
    assert int((tmp_path / "run/model/config.json").read_text()) == one.run.steps, "the final model is the final one"
    out = capsys.readouterr().out
    assert f"{value:.4g} after {step} steps, in {tmp_path}/run/best/model" in out
    assert ("has no value after 2 steps: not compared" in out) == (run.get("eval_every", 1) == 1)
    assert not list((tmp_path / "run").glob(".*")), "nothing unfinished is left"


def test_without_a_metric_nothing_is_kept(scripted, tmp_path):
    scripted(best_metric="").fit()
    assert not (tmp_path / "run/best").exists()


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4, 5])
def test_a_killed_run_goes_on_to_the_same_best_model_and_the_same_checkpoints(scripted, tmp_path, stop_at):
    one = scripted(save_every=2)
    one.stop_at = stop_at
    with pytest.raises(KeyboardInterrupt):
        one.fit()
    found = kept(tmp_path)
    assert found[0] == found[1]["step"] == (1 if stop_at < 5 else 5)
    again = scripted(save_every=2, resume=True)
    again.start()
    if again.done:
        assert (again.best.step, again.best.value) == (found[1]["step"], found[1]["value"])
    again.close()
    scripted(save_every=2, resume=True).fit()
    assert kept(tmp_path) == (5, {"metric": "eval/toy/pass@1", "mode": "max", "value": 0.7, "step": 5})
    assert [path.name for path in sorted((tmp_path / "run/checkpoints").glob("step-*"))] == ["step-00000004", "step-00000006"]


def test_a_run_that_begins_anew_in_its_folder_forgets_the_best_model_of_the_run_before(scripted, tmp_path, monkeypatch):
    one = scripted()
    one.stop_at = 5
    with pytest.raises(KeyboardInterrupt):
        one.fit()
    monkeypatch.setattr(f"{__name__}.SCORES", [0.1, 0.3, 0.2, 0.0, 0.0, 0.0, 0.0])
    scripted(resume=True).fit()  # there was no checkpoint
    assert kept(tmp_path)[1]["value"] == 0.3


def test_another_metric_is_not_compared_with_the_value_of_the_first(scripted, tmp_path):
    scripted(save_every=2).fit()
    for run in ({"best_metric": "eval/loss"}, {"best_mode": "min"}):
        with pytest.raises(ConfigError, match="--run.best_metric .* was chosen by eval/toy/pass@1 max"):
            scripted(save_every=2, resume=True, **run).start()
    (tmp_path / "run/best/best.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot read .*best.json"):
        scripted(save_every=2, resume=True).start()


def test_a_metric_that_does_not_exist_is_refused_at_the_first_evaluation_with_those_that_do(scripted):
    with pytest.raises(ConfigError, match=r"--run.best_metric is 'eval/toy/pass1'.*: there are eval/toy/pass@1, eval/loss \(did you mean"):
        scripted(best_metric="eval/toy/pass1").fit()
    with pytest.raises(ConfigError, match="nothing is held out"):
        BestModel(scripted().folder, "eval/loss", "min").offer({"timing/evaluate": 1.0}, 0, lambda folder: None)


def test_an_export_that_fails_leaves_the_best_model_as_it_was(scripted, tmp_path):
    one = scripted()
    one.export(tmp_path / "other")
    best = BestModel(one.folder, "score", "max")
    best.offer({"score": 1.0}, 0, one.export)

    def half(folder):
        folder.mkdir()
        (folder / "weights").write_text("half")
        raise OSError("No space left on device")

    with pytest.raises(CheckpointError, match="No space left"):
        best.offer({"score": 2.0}, 7, half)
    with pytest.raises(CheckpointError, match="shared disk"):
        best.offer({"score": 2.0}, 7, lambda folder: folder.mkdir())
    assert kept(tmp_path) == (0, {"metric": "score", "mode": "max", "value": 1.0, "step": 0}) and best.value == 1.0
    assert {path.name for path in one.folder.iterdir()} == {"best"}


@pytest.mark.parametrize(
    ("run", "flag"),
    [({"best_mode": "most"}, "best_mode"), ({"best_metric": "eval/loss", "eval_at_start": False, "eval_at_end": False}, "best_metric")],
)
def test_settings_that_cannot_work_are_refused(run, flag):
    with pytest.raises(ConfigError, match=f"--run.{flag}"):
        Scripted(Config(RunConfig(**run)))
