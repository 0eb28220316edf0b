"""Iterated training: what each round starts from, and a run killed at any point that ends as the straight one. Stages are stand-ins here."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from openrl_reason.algorithms import iterate as module
from openrl_reason.algorithms import iterate_summary
from openrl_reason.algorithms.collection_config import CollectConfig
from openrl_reason.algorithms.dpo_config import DPOConfig
from openrl_reason.algorithms.iterate import Stages, iterate
from openrl_reason.algorithms.iterate_algorithms import ALGORITHMS
from openrl_reason.algorithms.iterate_config import IterateConfig
from openrl_reason.algorithms.iterate_manifest import Manifest
from openrl_reason.algorithms.kto_config import KTOConfig
from openrl_reason.algorithms.oreo_config import OREOAlgoConfig, OREOConfig
from openrl_reason.algorithms.sft import SFTConfig
from openrl_reason.core.trajectory import Trajectory, write_jsonl
from openrl_reason.data.offline_config import OfflineDataConfig
from openrl_reason.errors import CheckpointError, ConfigError, DataError, WorkerError
from openrl_reason.evaluation.compare import RESULT_FORMAT
from openrl_reason.evaluation.config import EvalConfig, EvalSetConfig
from openrl_reason.models.make import MakeModelConfig, make
from openrl_reason.tasks.base import TaskConfig
from openrl_reason.workers.model_config import TrainedModelConfig
from openrl_reason.workers.placement import PlacementConfig
from openrl_reason.workers.rollout_config import RolloutConfig, SamplingConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "start"
    make(MakeModelConfig(output=str(folder)))
    return str(folder)


@pytest.fixture(autouse=True)
def plots(monkeypatch, request):
    """Plots take half a second each: an empty file in their place."""
    if "plot" not in request.node.name:
        monkeypatch.setattr(iterate_summary, "plot_accuracy", lambda summary, file: file.touch())


class Fakes:
    """Stages that write what the real ones do. ``calls``: (stage, config) of each; the call of number ``stop_at`` ends half done."""

    def __init__(self, folder, stop_at=None, keep=True):
        self.folder, self.stop_at, self.keep, self.calls = folder, stop_at, keep, []

    def _call(self, stage, config, half):
        self.calls.append((stage, config))
        if len(self.calls) - 1 == self.stop_at:
            half.parent.mkdir(parents=True, exist_ok=True)
            half.write_text("half")
            raise KeyboardInterrupt

    def collect(self, config):
        folder = Path(config.output)
        self._call("collect", config, folder / "trajectories.half")
        sample = Trajectory.from_completion([1], [2], None, task_id=config.model, group_id="g", sample_index=config.seed)
        if self.keep:
            write_jsonl(folder / "trajectories/part-00000.jsonl", [sample])
        return {"statistics": {"samples": 1, "right_rate": 0.5, "kept": {"kept": 1}}}

    def train(self, algorithm, config):
        folder = Path(config.run.output_dir)
        self._call("train", (algorithm, config), folder / "metrics.jsonl")
        for name in ("model", "critic"):
            shutil.copytree(config.policy.path, folder / name, dirs_exist_ok=True)

    def evaluate(self, config):
        self._call("evaluate", config, Path(config.output).parent / "evaluate.partial.jsonl")
        right = 1 + len([part for part in Path(config.output).parts if part.startswith("round-")])
        items = [{"id": str(n), "scores": [float(n < right)], "votes": [0]} for n in range(4)]
        mean = {"value": right / 4, "low": 0.1, "high": 0.9, "stderr": 0.1, "method": "wilson", "items": 4}
        one = {"name": "arithmetic", "items": items, "num_samples": 1, "sampling": {}, "estimates": {"arithmetic": {"pass@1": mean}}}
        Path(config.output).write_text(json.dumps({"format": RESULT_FORMAT, "sets": [one], "model": {"path": config.model}}))

    @property
    def stages(self):
        return Stages(self.collect, self.train, self.evaluate)


@pytest.fixture
def run(tmp_path, model):
    """A function that runs a whole iteration on stand-ins and returns them."""

    def iterated(output="run", stop_at=None, keep=True, **changes):
        fakes = Fakes(tmp_path / output, stop_at, keep)
        settings = {"rounds": 3, "task": TaskConfig(num_train=8, num_test=4), "eval": EvalConfig(num_items=4)} | changes
        iterate(IterateConfig(model=model, output=str(fakes.folder), **settings), stages=fakes.stages)
        return fakes

    return iterated


def trained(fakes):
    return [(algorithm, config) for stage, (algorithm, config) in (call for call in fakes.calls if call[0] == "train")]


def manifest(folder):
    """Without seconds and the folder's own name."""
    state = json.loads((folder / "manifest.json").read_text())
    del state["settings"]["output"]
    for stages in [state["start"], *(one["stages"] for one in state["rounds"])]:
        for about in stages.values():
            del about["seconds"]
    return state


def relative(path, fakes):
    return str(Path(path).relative_to(fakes.folder)) if Path(path).is_relative_to(fakes.folder) else Path(path).name


# ---- what a round starts from --------------------------------------------------------------------------------------------------------


def test_stages_follow_one_another_and_each_round_goes_on_from_the_policy_before(run):
    fakes = run()
    assert [stage for stage, _ in fakes.calls] == ["evaluate", *["collect", "train", "evaluate"] * 3]
    collected = [config for stage, config in fakes.calls if stage == "collect"]
    assert [relative(c.model, fakes) for c in collected] == ["start", "round-00/train/model", "round-01/train/model"]
    assert [relative(c.policy.path, fakes) for _, c in trained(fakes)] == ["start", "round-00/train/model", "round-01/train/model"]
    evaluated = [config for stage, config in fakes.calls if stage == "evaluate"]
    assert [relative(c.model, fakes) for c in evaluated] == ["start", *(f"round-{n:02d}/train/model" for n in range(3))]
    assert len({c.seed for c in evaluated}) == 1 and len({c.seed for c in collected} | {c.run.seed for _, c in trained(fakes)}) == 6
    assert all(0 <= c.seed < 2**31 for c in collected) and all(c.run.resume for _, c in trained(fakes))


def test_stages_get_the_settings_of_the_run(run):
    own = dict(
        task=TaskConfig(num_train=6, num_test=4, seed=3), rollout=RolloutConfig(max_model_len=512, dtype="float32"),
        placement=PlacementConfig(device="cpu"),
        collect=CollectConfig(mode="balanced", sampling=SamplingConfig(temperature=0.8, max_new_tokens=400), grader_processes=2),
        eval=EvalConfig(num_items=3, num_samples=2, temperature=0.5, ks=(2,)), sft=SFTConfig(epochs=2, batch_size=7), rounds=1,
    )  # fmt: skip
    fakes = run(**own)
    (_, evaluated), (_, collected), (_, (_, config)), _ = fakes.calls
    assert collected.rollout == evaluated.rollout == own["rollout"] and collected.task == evaluated.task == own["task"]
    assert collected.mode == "balanced"
    assert (evaluated.num_items, evaluated.num_samples, evaluated.ks) == (3, 2, (2,)) and evaluated.grader_processes == 2
    assert evaluated.sampling == SamplingConfig(temperature=0.5, max_new_tokens=400)
    assert (config.epochs, config.batch_size) == (2, 7) and config.placement == own["placement"] and config.data.min_reward == 1.0


@pytest.mark.parametrize("data", ["latest", "union"])
def test_data_are_the_rounds_own_or_those_of_all_so_far_oldest_first(run, data):
    def names(round_):
        return [f"round-{n:02d}/collect/trajectories/part-00000.jsonl" for n in (range(round_ + 1) if data == "union" else [round_])]

    fakes = run("oreo", data=data, algorithm="oreo")
    assert [[relative(path, fakes) for path in c.data.path] for _, c in trained(fakes)] == [names(n) for n in range(3)]
    assert [one["inputs"]["data"] for one in manifest(fakes.folder)["rounds"]] == [names(n) for n in range(3)]
    linked = run("sft", data=data, algorithm="sft")
    for number, (_, config) in enumerate(trained(linked)):
        folder = Path(config.data.path)
        assert [relative(link.resolve(), linked) for link in sorted(folder.iterdir())] == names(number)
        assert not any(Path(link.readlink()).is_absolute() for link in folder.iterdir()), "the run can be moved"


@pytest.mark.parametrize("reference", ["previous", "sft"])
@pytest.mark.parametrize("policy", ["previous", "sft"])
@pytest.mark.parametrize("critic", ["fresh", "warm"])
def test_every_choice_of_policy_reference_and_critic_reaches_the_trainer_and_the_manifest(run, reference, policy, critic):
    fakes = run(algorithm="oreo", reference=reference, policy=policy, critic=critic)
    before = ["start", "round-00/train/model", "round-01/train/model"]
    policies, references = (before if choice == "previous" else ["start"] * 3 for choice in (policy, reference))
    critics = ["", "round-00/train/critic", "round-01/train/critic"] if critic == "warm" else [""] * 3
    for number, (_, config) in enumerate(trained(fakes)):
        assert relative(config.policy.path, fakes) == policies[number] and relative(config.critic.path, fakes) == critics[number]
        assert relative(config.reference.path or config.policy.path, fakes) == references[number]
    state = manifest(fakes.folder)
    assert state["choices"] == {"algorithm": "oreo", "policy": policy, "reference": reference, "critic": critic, "data": "latest"}
    inputs = [one["inputs"] for one in state["rounds"]]
    assert [Path(i["policy"]).name if i["policy"].endswith("start") else i["policy"] for i in inputs] == policies
    assert [Path(i["reference"]).name if i["reference"].endswith("start") else i["reference"] for i in inputs] == references
    assert [i["critic"] for i in inputs] == [one or "fresh" for one in critics]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_is_given_its_data_and_threshold(run, name):
    fakes = run(algorithm=name, collect=CollectConfig(threshold=0.25), rounds=1)
    ((algorithm, config),) = trained(fakes)
    assert algorithm is ALGORITHMS[name] and algorithm.trainer_class().__name__.endswith("Trainer")
    assert config.data.path and config.policy.path and config.run.output_dir.endswith("round-00/train")
    assert not config.data.allow_test_data
    fakes = run("meant", algorithm=name, collect=CollectConfig(threshold=0.25), rounds=1, task=TaskConfig(allow_test_data_in_training=True))
    assert trained(fakes)[0][1].data.allow_test_data, "what the task may train on, the round's trainer may"
    thresholds = {"rejection": lambda: config.data.min_reward, "dpo": lambda: config.pairs.threshold, "kto": lambda: config.label_threshold,
                  "oreo": lambda: config.algo.right_threshold}  # fmt: skip
    assert thresholds.get(name, lambda: 0.25)() == 0.25
    algorithm.trainer_class()(config)  # takes the settings


def test_kto_labels_are_those_of_the_shaped_rewards(run):
    fakes = run(algorithm="kto", kto=KTOConfig(data=OfflineDataConfig(reward_scale=2.0, reward_shift=-1.0)), rounds=1)
    assert trained(fakes)[0][1].label_threshold == 1.0


# ---- killed and gone on --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", range(10))
def test_a_run_killed_within_any_stage_ends_as_the_straight_one(run, stop_at):
    straight = run("straight", data="union")
    with pytest.raises(KeyboardInterrupt):
        run("killed", data="union", stop_at=stop_at)
    again = run("killed", data="union")
    assert manifest(again.folder) == manifest(straight.folder)
    assert [stage for stage, _ in again.calls] == [stage for stage, _ in straight.calls][stop_at:], "the stage is entered again, those before are not"

    def plain(fakes, calls):
        return [(stage, str(config).replace(str(fakes.folder), "RUN")) for stage, config in calls]

    assert plain(again, again.calls) == plain(straight, straight.calls[stop_at:])
    summaries = [json.loads((one.folder / "summary.json").read_text()) for one in (again, straight)]
    assert summaries[0] == summaries[1] and (again.folder / "accuracy.png").exists()
    assert [path for path in again.folder.rglob(".unfinished*")] == []


@pytest.mark.parametrize("number", range(10))
def test_one_killed_between_a_stage_and_its_note_ends_as_the_straight_one(run, number, monkeypatch):
    straight = run("straight")
    own, notes = Manifest.finish, []

    def finish(self, *about):
        notes.append(about)
        if len(notes) - 1 == number:
            raise KeyboardInterrupt
        own(self, *about)

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "finish", finish)
        with pytest.raises(KeyboardInterrupt):
            run("killed")
    again = run("killed")
    assert manifest(again.folder) == manifest(straight.folder)
    stages = [stage for stage, _ in straight.calls]
    # A result is there as a whole or not at all, so an evaluation need not be repeated; the other stages find themselves what they had done.
    assert [stage for stage, _ in again.calls] == stages[number + (stages[number] == "evaluate") :]


def test_a_finished_run_does_nothing_and_more_rounds_go_on_from_it(run, capsys):
    run(rounds=2)
    assert run(rounds=2).calls == []
    more = run(rounds=3, placement=PlacementConfig(device="cpu"), rollout=RolloutConfig(num_engines=4))
    assert [stage for stage, _ in more.calls] == ["collect", "train", "evaluate"] and relative(more.calls[0][1].model, more) == "round-01/train/model"
    assert "pass@1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"seed": 1}, "seed"), ({"algorithm": "sft"}, "algorithm"), ({"data": "union"}, "data"), ({"policy": "sft"}, "policy"),
        ({"collect": CollectConfig(num_samples=3)}, "collect.num_samples"), ({"eval": EvalConfig(num_items=5)}, "eval.num_items"),
        ({"sft": SFTConfig(epochs=1, eval_items=0, policy=TrainedModelConfig(lr=3e-5))}, "sft.policy.lr"),
        ({"rollout": RolloutConfig(dtype="float32")}, "rollout.dtype"), ({"task": TaskConfig(num_train=9, num_test=4)}, "task.num_train"),
    ],
)  # fmt: skip
def test_changed_settings_are_refused_by_name_and_nothing_is_touched(run, tmp_path, changes, name):
    with pytest.raises(KeyboardInterrupt):
        run(stop_at=4)
    before = (tmp_path / "run/manifest.json").read_bytes()
    with pytest.raises(CheckpointError, match=rf"other settings \({name}\): go on with its own.*--output"):
        run(**changes)
    assert (tmp_path / "run/manifest.json").read_bytes() == before


def test_another_start_is_refused_and_the_same_one_elsewhere_is_not(run, tmp_path, model):
    run(rounds=1)
    shutil.copytree(model, tmp_path / "moved")
    fakes = Fakes(tmp_path / "run")
    settings = dict(output=str(fakes.folder), rounds=1, task=TaskConfig(num_train=8, num_test=4), eval=EvalConfig(num_items=4))
    iterate(IterateConfig(model=str(tmp_path / "moved"), **settings), stages=fakes.stages)
    assert fakes.calls == []
    make(MakeModelConfig(output=str(tmp_path / "other"), seed=5))
    with pytest.raises(CheckpointError, match=r"other settings \(model\)"):
        iterate(IterateConfig(model=str(tmp_path / "other"), **settings), stages=fakes.stages)


def test_a_round_that_keeps_nothing_and_a_training_without_a_model_say_so(run, monkeypatch):
    with pytest.raises(DataError, match="round 0: no sample is kept.*--collect.threshold"):
        run("empty", keep=False)
    monkeypatch.setattr(Fakes, "train", lambda *_: None)
    with pytest.raises(WorkerError, match="round 0: training left no model"):
        run("lost")


def test_the_plot_is_drawn_even_of_sets_without_a_value(run, tmp_path):
    fakes = run(rounds=1)
    assert (fakes.folder / "accuracy.png").stat().st_size > 1000
    nothing = {"value": None, "low": None, "high": None}
    iterate_summary.plot_accuracy([{"round": "start", "sets": {"a": {"pass@1": nothing}}}], tmp_path / "nothing.png")
    assert (tmp_path / "nothing.png").exists()


def test_summary_has_gains_over_the_start_and_what_was_collected(run):
    fakes = run(rounds=2)
    start, first, second = json.loads((fakes.folder / "summary.json").read_text())
    assert "gain" not in start["sets"]["arithmetic"] and start["round"] == "start" and "collected" not in start
    assert first["sets"]["arithmetic"]["pass@1"]["value"] == 0.5 and first["sets"]["arithmetic"]["gain"]["value"] == 0.25
    assert first["collected"]["right_rate"] == 0.5 and first["model"] == "round-00/train/model" and second["round"] == "1"


def test_training_questions_among_the_evaluations_are_refused(run, tmp_path):
    rows = [json.dumps({"question": f"{n}+{n}=?", "answer": str(2 * n)}) for n in range(6)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    (tmp_path / "test.jsonl").write_text("\n".join(rows[:2]))
    task = TaskConfig(name="file", train_path=str(tmp_path / "train.jsonl"))
    sets = (EvalSetConfig(name="held", task=TaskConfig(name="file", test_path=str(tmp_path / "test.jsonl"))),)
    with pytest.raises(DataError, match="evaluation set 'held': 2 training questions"):
        run(task=task, eval=EvalConfig(sets=sets))
    run(task=replace(task, allow_test_data_in_training=True), eval=EvalConfig(sets=sets), rounds=1)


def test_a_dry_run_shows_every_stage_and_writes_nothing(run, tmp_path, capsys, monkeypatch):
    fakes = run(dry_run=True, algorithm="oreo")
    out = capsys.readouterr().out
    assert fakes.calls == [] and not (tmp_path / "run").exists()
    for text in ("3 rounds of collect, train, evaluate; algorithm oreo", "10 samples each", "plan: OREOTrainer", "4 test items of arithmetic"):
        assert text in out, text


# ---- settings ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algorithm": "dppo"}, "--algorithm is 'dppo': use rejection.*did you mean 'dpo'"),
        ({"rounds": 0}, "--rounds is 0"),
        ({"data": "all"}, "--data is 'all': use latest or union"),
        ({"reference": "sft"}, "--reference is 'sft': rejection has no reference"),
        ({"algorithm": "dpo", "critic": "warm"}, "--critic is 'warm': dpo has no critic"),
        ({"algorithm": "kto", "collect": CollectConfig(mode="rejection")}, "--collect.mode is 'rejection': kto learns from right and wrong"),
        ({"collect": CollectConfig(model="m")}, "--collect.model is 'm': is the whole run's: use --model"),
        ({"collect": CollectConfig(task=TaskConfig(name="gsm8k"))}, "--collect.task is '...': is the whole run's: use --task"),
        ({"collect": CollectConfig(overwrite=True)}, "--collect.overwrite"),
        ({"algorithm": "oreo", "oreo": OREOConfig(policy=TrainedModelConfig(path="p"))}, "--oreo.policy.path is 'p': iterate sets it"),
        ({"algorithm": "dpo", "dpo": DPOConfig(data=OfflineDataConfig(path=("x",)))}, "--dpo.data.path"),
        ({"collect": CollectConfig(sampling=SamplingConfig(max_new_tokens=1024))}, "--collect.sampling.max_new_tokens is 1024: leaves no room"),
        ({"eval": EvalConfig(num_items=0)}, "--eval.num_items is 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        IterateConfig(**settings)


def test_the_run_brings_the_engines_in_which_prompts_must_fit():
    IterateConfig(collect=CollectConfig(sampling=SamplingConfig(max_new_tokens=1500)), rollout=RolloutConfig(max_model_len=2048))


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_a_reference_that_is_the_policys_start_needs_no_model_of_its_own(run, name):
    for policy, reference, expected in (("previous", "previous", ["", ""]), ("sft", "sft", ["", ""]), ("previous", "sft", ["", "start"]),
                                        ("sft", "previous", ["", "round-00/train/model"])):  # fmt: skip
        fakes = run(f"{policy}-{reference}", algorithm=name, policy=policy, reference=reference, rounds=2)
        assert [config.reference_path and relative(config.reference_path, fakes) for _, config in trained(fakes)] == expected


def test_settings_of_the_algorithm_are_its_own(run):
    fakes = run(algorithm="oreo", oreo=OREOConfig(algo=OREOAlgoConfig(level="step"), epochs=2), rounds=1)
    assert trained(fakes)[0][1].algo.level == "step" and trained(fakes)[0][1].epochs == 2


def test_the_real_stages_are_the_commands(model, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "collect_samples", lambda config, **given: seen.append((config, given)) or {"statistics": {}})
    monkeypatch.setattr(module, "evaluate_model", lambda config, task: seen.append((config, task)))
    task, reward = object(), print
    one = module._Run(IterateConfig(model=model, output=str(tmp_path)), task, reward, None)
    one.stages.collect("c")
    one.stages.evaluate("e")
    assert seen == [("c", {"task": task, "reward_function": reward}), ("e", task)]
