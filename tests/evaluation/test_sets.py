"""Which items a set has, what it inherits, what is refused, and what a run of it says."""

import json
import re
from pathlib import Path

import pytest

from openrl_reason.config import parse_config, save_config
from openrl_reason.errors import ConfigError, DataError
from openrl_reason.evaluation.config import EvalConfig, EvalSetConfig
from openrl_reason.evaluation.evaluate import EvaluateConfig, _metrics, beside, evaluate_model, refuse_leaks
from openrl_reason.evaluation.recording import RecordingPool
from openrl_reason.evaluation.sets import Evaluator, SetDefaults, prepare_sets, training_sets
from openrl_reason.rewards.base import RewardResult
from openrl_reason.tasks.base import TaskConfig, load_task
from openrl_reason.workers.rollout_config import SamplingConfig
from tests.evaluation.conftest import AnsweringPool, Characters

SAMPLED = SetDefaults(num_samples=4, sampling=SamplingConfig(temperature=1.0, max_new_tokens=40, top_p=0.9))


def prepare(*configs, task, defaults=SAMPLED, limit=100):
    return prepare_sets(configs, default_task=task, tokenizer=Characters(), defaults=defaults, max_model_len=limit)


def evaluator(grader, pool=None, **more):
    return Evaluator(tokenizer=Characters(), pool=pool or AnsweringPool(), grader=grader, **more)


def test_a_set_inherits_what_it_leaves_out(sums):
    plain, own = prepare(EvalSetConfig(), EvalSetConfig(name="own", num_samples=2, temperature=0.5, max_new_tokens=10, stop=("END",)), task=sums)
    assert (plain.name, plain.num_samples, plain.sampling, plain.ks) == ("sums", 4, SAMPLED.sampling, (4,))
    assert own.sampling == SamplingConfig(temperature=0.5, max_new_tokens=10, top_p=0.9, stop=("END",)) and own.ks == (2,)
    assert (len(plain.items), plain.num_overlong) == (4, 1) and (len(own.items), own.num_overlong) == (5, 0)  # 100 - 40 and 100 - 10 tokens


def test_items_are_chosen_by_id_and_stay_the_same(sums, tmp_path):
    file = tmp_path / "ids.txt"
    file.write_text("sum-3\n\nsum-1\n")
    config = EvalSetConfig(name="few", ids=("sum-2",), ids_file=str(file))
    first, again = (prepare(config, task=sums, defaults=SetDefaults(num_items=1), limit=300)[0] for _ in range(2))
    assert [item.info["id"] for item in first.items] == ["sum-2", "sum-3", "sum-1"]  # the command's num_items is for whole splits
    assert first.identity == again.identity != prepare(EvalSetConfig(ids=("sum-1",)), task=sums)[0].identity
    with pytest.raises(DataError, match="evaluation set 'few'.*'sum-9'"):
        prepare(EvalSetConfig(name="few", ids=("sum-9",)), task=sums)


def test_greedy_adds_a_pass_of_its_own(sums):
    sampled, greedy = prepare(EvalSetConfig(name="both", greedy=True), task=sums)
    assert (sampled.name, sampled.num_samples) == ("both", 4)
    assert (greedy.name, greedy.num_samples, greedy.sampling.temperature, greedy.sampling.top_p) == ("both/greedy", 1, 0.0, 1.0)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"name": "g", "temperature": 0.0}, "evaluation set 'g': num_samples is 4 at temperature 0"),
        ({"name": "g", "ks": (8,)}, r"'g': ks is \[8\]: with num_samples 4 use k from 1 to 4"),
        ({"name": "g", "also_grade": ("gsm9k",)}, "'g': also_grade: grader 'gsm9k' is unknown"),
        ({"name": "g", "also_grade": ("a.b:gsm8k",)}, "'g': also_grade is .*two graders would be called alike"),
        ({"name": "g", "max_new_tokens": 100}, "'g': max_new_tokens is 100: it leaves no room"),
        ({"name": "g", "task": TaskConfig(name="nothing")}, "'g': task 'nothing' is unknown"),
    ],
)
def test_what_cannot_work_names_the_set(config, expected, sums):
    with pytest.raises(ConfigError, match=expected):
        prepare(EvalSetConfig(**config), task=sums)


@pytest.mark.parametrize(
    "config", [{"name": "x", "temperature": -1.0}, {"name": "x", "top_p": 0.0}, {"name": "x", "split": "dev"}, {"name": "x", "ids_file": "/none"},
               {"name": "x/"}, {"name": "x", "num_samples": 0}, {"name": "x", "ks": (0,)}]
)  # fmt: skip
def test_a_value_out_of_range_is_refused_at_once(config):
    with pytest.raises(ConfigError, match="set 'x"):
        EvalSetConfig(**config)


def test_two_sets_of_one_name_are_refused(sums):
    with pytest.raises(ConfigError, match="two evaluation sets are called 'sums'"):
        prepare(EvalSetConfig(), EvalSetConfig(num_samples=1), task=sums)


def test_sets_come_from_flags_and_yaml_and_read_back(tmp_path):
    sets = '[{"name": "easy", "task": {"name": "arithmetic", "levels": [1]}, "num_samples": 8, "temperature": 0.7}, {"name": "hard", "ids": ["a"]}]'
    config = parse_config(EvaluateConfig, ["--sets", sets], prog="test")
    assert config.sets[0].task.levels == (1,) and config.sets[1] == EvalSetConfig(name="hard", ids=("a",))
    save_config(config, tmp_path / "c.yaml")
    assert parse_config(EvaluateConfig, ["--config", str(tmp_path / "c.yaml")], prog="test") == config
    with pytest.raises(ConfigError, match=r"--sets: unknown setting 'num_sample' in an entry \(did you mean 'num_samples'\?\)"):
        parse_config(EvaluateConfig, ["--sets", '[{"name": "easy", "num_sample": 8}]'], prog="test")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--num_samples", "4"], "--num_samples is 4: at temperature 0"),
        (["--num_samples", "4", "--sampling.temperature", "1", "--ks", "[8]"], "--ks is .8.*use k from 1 to 4"),
        (["--num_samples", "4", "--sampling.temperature", "1", "--ks", "[0, 2]"], "--ks is .0, 2.: every k must be at least 1"),
        (["--greedy"], "--greedy is True: every response is greedy already"),
        (["--ids_file", "nosuch.txt"], "^--ids_file is 'nosuch.txt': there is no such file"),
        (["--sets", '[{"name": "a"}]', "--greedy"], "--greedy is True: with --sets"),
        (["--intervals.confidence", "95"], "--intervals.confidence is 95"),
    ],
)
def test_the_command_refuses_what_cannot_work(words, expected):
    with pytest.raises(ConfigError, match=expected):
        parse_config(EvaluateConfig, words, prog="test")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (EvaluateConfig(), "^--model is ''"),
        (EvaluateConfig(model="m", output="a/../r.json", compare_to="r.json"), "--compare_to is 'r.json': that is also the --output"),
    ],
)
def test_the_command_refuses_files_that_cannot_work(config, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=expected):
        evaluate_model(config)


def test_each_result_has_samples_of_its_own():
    assert [beside(name, "samples").name for name in ("r/a.json", "r/a", "r/a v1.0", "r/a v1.1")] == [
        "a.samples.jsonl", "a.samples.jsonl", "a v1.0.samples.jsonl", "a v1.1.samples.jsonl",
    ]  # fmt: skip


def test_names_of_metrics_do_not_collide_and_ids_are_text(sums, tmp_path):
    with pytest.raises(ConfigError, match="a set is called 'a/gsm8k_lenient', and another set's metrics"):
        prepare_sets(
            [EvalSetConfig(name="a", also_grade=("gsm8k_lenient",)), EvalSetConfig(name="a/gsm8k_lenient")],
            default_task=sums, tokenizer=Characters(), defaults=SetDefaults(), max_model_len=2000,
        )  # fmt: skip
    (tmp_path / "ids.txt").write_bytes(b"a\n\xff\xfe")
    with pytest.raises(DataError, match="ids.txt: not UTF-8; expected one id a line"):
        EvalSetConfig(ids_file=str(tmp_path / "ids.txt")).wanted_ids()


def test_a_trainer_evaluates_the_first_test_items_or_its_sets(sums):
    args = {"task": sums, "tokenizer": Characters(), "sampling": SAMPLED.sampling, "max_model_len": 200}
    (one,) = training_sets(EvalConfig(num_items=3), **args)
    assert (one.name, len(one.items), one.sampling.temperature, one.sampling.max_new_tokens) == ("sums", 3, 0.0, 40)
    assert training_sets(EvalConfig(num_items=0), **args) == []
    config = EvalConfig(
        num_items=0, num_samples=4, temperature=0.6, ks=(2, 4), sets=(EvalSetConfig(name="a"), EvalSetConfig(name="b", num_samples=2))
    )
    a, b = training_sets(config, **args)
    assert (len(a.items), a.ks, b.ks, b.sampling.temperature) == (5, (2, 4), (2,), 0.6)
    with pytest.raises(ConfigError, match="--eval.num_samples is 4: at temperature 0"):
        EvalConfig(num_samples=4)


def test_a_run_gives_metrics_tables_and_samples(sums, grader):
    (one,) = prepare(EvalSetConfig(ks=(2, 4), also_grade=("gsm8k_lenient",)), task=sums)
    result = evaluator(grader).run(one, (0, "test"))
    metrics = result.metrics
    assert metrics["eval/sums/pass@1"] == 0.25 and metrics["eval/sums/maj@2"] == pytest.approx(2 / 6)  # two of six pairs tie with it, one is it alone
    assert metrics["eval/sums/pass@4"] == 1.0 and metrics["eval/sums/maj@4"] == pytest.approx(1 / 3)  # three answers tie, one abstains
    assert metrics["eval/sums/pass@2"] == pytest.approx(0.5)
    assert metrics["eval/sums/no_answer_rate"] == metrics["eval/sums/truncated_rate"] == 0.25
    assert metrics["eval/sums/gsm8k_lenient/pass@1"] == 0.25 and "eval/sums/gsm8k_lenient/truncated_rate" not in metrics
    records = result.records()
    assert len(records) == 16 and records[5]["sample_index"] == 1 and records[5]["source"] == "eval/sums"
    assert records[4]["also_graded"]["gsm8k_lenient"] == {"score": 1.0, "parsed": "4", "status": "ok"}
    few = result.records(step=7, limit=3)
    assert [record["trajectory_id"] for record in few] == [records[place]["trajectory_id"] for place in (0, 5, 10)] and few[1]["step"] == 7
    assert [record["sample_index"] for record in few] == [0, 1, 2]
    plain = json.loads(json.dumps(result.as_json(("level",)), allow_nan=False))
    assert plain["items"][0] == {"id": one.items[0].task_id, "scores": [1.0, 0.0, 0.0, 0.0], "votes": [0, 1, 2, None]}
    assert [(row["group"], row["items"]) for row in plain["tables"]["level"]] == [("0", 2), ("1", 2)]
    assert list(plain["estimates"]) == ["gsm8k", "gsm8k_lenient"] and plain["estimates"]["gsm8k"]["pass@1"]["method"] == "bootstrap"


def test_a_rewarder_can_stand_in_for_the_grader(sums, grader):
    from concurrent.futures import Future

    class Half:
        def submit(self, sample):
            answer = Future()
            answer.set_result(RewardResult(0.5 if sample.item.info["level"] else float("nan"), "ok" if sample.item.info["level"] else "timeout"))
            return answer

        def flush(self):
            self.flushed = True

        def metrics(self):
            return {}

    (one,) = prepare(EvalSetConfig(), task=sums, defaults=SetDefaults(), limit=300)
    metrics = evaluator(grader, rewarder=Half()).run(one, (0,)).metrics
    assert metrics["eval/sums/pass@1"] == 0.0 and metrics["eval/sums/score"] == 0.5
    assert metrics["eval/sums/timeout_count"] == 2 and metrics["eval/sums/score_failures_as_wrong"] < 0.5


def test_an_interrupted_evaluation_goes_on_with_what_it_has(sums, grader, tmp_path):
    (one,) = prepare(EvalSetConfig(), task=sums)
    path = tmp_path / "r.partial.jsonl"

    def attempt(pool, identity="x", resume=True):
        recording = RecordingPool(path, identity, resume=resume)
        recording.pool = pool
        try:
            return recording, evaluator(grader, recording).run(one, (0,))
        finally:
            recording.close()

    straight = evaluator(grader).run(one, (0,))
    with pytest.raises(KeyboardInterrupt):
        attempt(AnsweringPool(fail_after=7))
    with path.open("a") as file:
        file.write('{"request_id": "half a li')
    pool = AnsweringPool()
    recording, resumed = attempt(pool)
    assert len(recording.known) == 7 and len(pool.served) == 9
    assert resumed.records() == straight.records() and resumed.metrics == straight.metrics
    with pytest.raises(ConfigError, match="--resume false"):
        attempt(AnsweringPool(), identity="another seed")
    fresh = AnsweringPool()
    recording, _ = attempt(fresh, identity="another seed", resume=False)
    assert len(fresh.served) == 16
    recording.finish()
    assert list(tmp_path.iterdir()) == []


def test_the_speed_of_a_continued_evaluation_is_that_of_what_it_generated(sums, grader, tmp_path):
    class Counting(AnsweringPool):
        def stats(self):
            return super().stats() | {"generated_tokens": 100 * len(self.served)}

    (one,) = prepare(EvalSetConfig(), task=sums)
    for expected in (16, 0):  # the second finds everything in the file
        recording = RecordingPool(tmp_path / "r.partial.jsonl", "x", resume=True)
        recording.pool = Counting()
        result = evaluator(grader, recording).run(one, (0,))
        recording.close()
        speed = _metrics([result])["generated_tokens_per_second"]
        assert speed * result.rollouts.metrics["timing/generate"] == pytest.approx(100 * expected)


def test_training_questions_among_the_items_are_refused(tmp_path):
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text('{"question": "What is TWO plus two?", "answer": "4"}\n{"question": "q", "answer": "1"}\n')
    test.write_text('{"question": "what is two  plus two", "answer": "4"}\n{"question": "r", "answer": "2"}\n')
    for allow in (False, True):
        config = TaskConfig(name="file", train_path=str(train), test_path=str(test), grader="gsm8k", allow_test_data_in_training=allow)
        sets = prepare(EvalSetConfig(name="leaky"), task=load_task(config), defaults=SetDefaults(), limit=2000)
        if allow:
            refuse_leaks(sets)
        else:
            with pytest.raises(DataError, match="allow_test_data_in_training"):
                refuse_leaks(sets)


def test_the_yaml_of_the_docs_and_its_command_give_a_config(tmp_path, monkeypatch):
    text = (Path(__file__).resolve().parents[2] / "docs/evaluation.md").read_text()
    (tmp_path / "evaluation.yaml").write_text(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    (tmp_path / "hard_ids.txt").write_text("a\n")
    monkeypatch.chdir(tmp_path)
    words = re.search(r"^\$ openrl-reason evaluate (--config .*)$", text, re.MULTILINE)[1].split()
    config = parse_config(EvaluateConfig, words, prog="test")
    assert [one.name for one in config.sets] == ["gsm8k", "math-hard"] and config.sets[1].wanted_ids() == ["a"]
