"""Settings: flags and YAML give one frozen dataclass; what cannot work is refused with the flag, the value and a remedy."""

from dataclasses import FrozenInstanceError

import pytest

from openrl_reason.algorithms.reinforce import ReinforceConfig
from openrl_reason.algorithms.sft import SFTConfig
from openrl_reason.config import changed_settings, flag_names, parse_config, save_config, split_words, to_dict
from openrl_reason.errors import ConfigError
from openrl_reason.evaluation.evaluate import EvaluateConfig


def parse(*words, config_class=ReinforceConfig):
    return parse_config(config_class, words, prog="test")


def test_dotted_flags_override_yaml_and_later_files_override_earlier_ones(tmp_path):
    (tmp_path / "a.yaml").write_text("policy: {lr: 1e-4, zero_stage: 2}\nprompts_per_step: 16\n")
    (tmp_path / "b.yaml").write_text("prompts_per_step: 4\n")
    config = parse("--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml"), "--policy.lr", "3e-5", "--sampling.stop", '["END"]')
    assert (config.policy.lr, config.policy.zero_stage, config.prompts_per_step, config.sampling.stop) == (3e-5, 2, 4, ("END",))
    with pytest.raises(FrozenInstanceError):
        config.prompts_per_step = 5


@pytest.mark.parametrize("config_class", [ReinforceConfig, SFTConfig, EvaluateConfig])
def test_the_resolved_config_reads_back_as_itself(config_class, tmp_path):
    config = parse_config(config_class, [], prog="test")
    save_config(config, tmp_path / "config.yaml")
    assert parse_config(config_class, ["--config", str(tmp_path / "config.yaml")], prog="test") == config


def test_a_switch_needs_no_value():
    assert parse("--run.resume", "--run.steps", "3", "--run.dry_run").run.resume
    assert not parse("--run.resume", "false").run.resume


@pytest.mark.parametrize("config_class", [ReinforceConfig, SFTConfig, EvaluateConfig])
def test_every_flag_has_a_help_text(config_class, capsys):
    with pytest.raises(SystemExit):
        parse_config(config_class, ["--help"], prog="test")
    text = " ".join(capsys.readouterr().out.split())
    for name in flag_names(config_class):
        after = text.split(f"--{name} ", 1)[1]
        assert not after.split("(type:")[0].strip().endswith(("]", "}")) and len(after.split("(type:")[0].split()) > 1, f"--{name} has no help"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--policy.lrr", "1"], ["--policy.lrr", "policy.lr"]),
        (["--polcy.lr", "1"], ["--polcy.lr", "policy.lr"]),
        (["--policy.lr", "fast"], ["--policy.lr", "fast"]),
        (["--run.steps", "0"], ["--run.steps", "0", "at least 1"]),
        (["--prompts_per_step", "10", "--algo.minibatches", "4"], ["--prompts_per_step is 10", "algo.minibatches = 4", "8 or 12"]),
        (["--samples_per_prompt", "1"], ["--samples_per_prompt is 1", "rloo", "2 or more"]),
        (["--algo.advantage", "rlo"], ["--algo.advantage is 'rlo'", "rloo"]),
        (["--algo.gamma", "1.5"], ["--algo.gamma is 1.5"]),
        (["--algo.kl.where", "loss ", "--algo.kl.kind", "k9"], ["algo.kl"]),
        (["--reference.refresh_every", "2"], ["--reference.refresh_every is 2", "--algo.kl.where"]),
        (["--max_logprob_difference", "0.1", "--sampling.top_p", "0.9"], ["--max_logprob_difference", "top_p"]),
        (["--sampling.temperature", "0"], ["--sampling.temperature is 0", "greedy"]),
        (["--policy.zero_stage", "7"], ["zero_stage is 7"]),
        (["--policy.zero", "2"], ["--policy.zero", "policy.zero_stage"]),
        (["--policy.betas", "[2, 0.9]"], ["betas are (2.0, 0.9)"]),
        (["--algo.dual_clip", "0.5"], ["--algo.dual_clip is 0.5", "exceed 1"]),
        (["--algo.clip_low", "2"], ["--algo.clip_low is 2.0"]),
        (["--algo.ratio_level", "word"], ["--algo.ratio_level is 'word'", "token or sequence"]),
        (["--algo.importance_correction", "clip"], ["--algo.importance_correction is 'clip'", "truncate"]),
        (["--algo.importance_correction", "mask", "--sampling.top_k", "5"], ["--algo.importance_correction", "top_k"]),
        (["--algo.return_clamp", "[5, 1]"], ["--algo.return_clamp is (5.0, 1.0)"]),
        (["--algo.kl.target", "1"], ["--algo.kl.target is 1.0", "--algo.kl.where"]),
        (["--algo.kl.where", "loss", "--algo.kl.coef", "-1"], ["--algo.kl.coef is -1.0"]),
        (["--reference.prompts_per_chunk", "0"], ["--reference.prompts_per_chunk is 0"]),
        (["--eval.num_samples", "0"], ["--eval.num_samples is 0"]),
        (["--eval.temperature", "-1"], ["--eval.temperature is -1"]),
        (["--grader_processes", "0"], ["--grader_processes is 0"]),
        (["--sampling.max_new_tokens", "2000"], ["--sampling.max_new_tokens is 2000", "--rollout.max_model_len 1024"]),
        (["--rollout.weight_transport", "nccl"], ["--rollout.weight_transport is 'nccl'", "colocate false"]),
        (["--config", "/nowhere.yaml"], ["/nowhere.yaml"]),
    ],
)
def test_a_setting_that_cannot_work_is_refused_with_its_name_and_a_remedy(words, expected):
    from openrl_reason.algorithms.reinforce import ReinforceTrainer

    with pytest.raises(ConfigError) as caught:
        ReinforceTrainer(parse(*words))
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in expected), message


def test_an_unknown_key_in_a_file_names_the_nearest_one(tmp_path):
    (tmp_path / "a.yaml").write_text("sampling: {temprature: 0.5}\n")
    with pytest.raises(ConfigError, match=r"sampling.temprature.*did you mean 'sampling.temperature'"):
        parse("--config", str(tmp_path / "a.yaml"))
    (tmp_path / "b.yaml").write_text("prompt_per_step: 5\n")
    with pytest.raises(ConfigError, match=r"prompt_per_step.*did you mean 'prompts_per_step'"):
        parse("--config", str(tmp_path / "b.yaml"))


def test_values_of_fields_named_like_secrets_are_not_shown():
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Tracker:
        api_key: str = "s3cret"
        max_new_tokens: int = 3

    assert to_dict(Tracker()) == {"api_key": "***", "max_new_tokens": 3}


def test_a_nested_settings_own_check_is_led_by_its_group():
    from openrl_reason.algorithms.reinforce_config import ReinforceConfig

    with pytest.raises(ConfigError, match="^--sampling: top_p is 7"):
        parse_config(ReinforceConfig, ["--sampling.top_p", "7"], prog="test")
    with pytest.raises(ConfigError, match="^rollout.block_size is 3"):
        parse_config(ReinforceConfig, ["--rollout.block_size", "3"], prog="test")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"run:\n  steps: [\n", "run.yaml:3: malformed YAML"),
        (b"", "run.yaml is empty"),
        (b"hello", "run.yaml holds no settings"),
        (b"\xff\xfe\x00", "run.yaml is not UTF-8"),
    ],
)
def test_a_file_that_holds_no_settings_is_named(content, expected, tmp_path):
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=expected):
        parse("--config", str(tmp_path / "run.yaml"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--ids", "[a"], r"^--ids: Expected a list such as '\[\"1\", \"2\"\]'. Got value: \[a$"),
        (["--ids", "[1]"], r"^--ids: Expected a str. Got value: 1; entries that look like numbers need quotes"),
        (["--sets", "[1]"], r"^--sets: Expected a list such as '\[\{\"name\": ...\}\]'. Got entry: 1$"),
        (["--sets", '[{"temperature": "hot"}]'], "^--sets: temperature: Expected a float or null. Got value: hot$"),
        (["--sets", '[{"task": {"num_train": "all"}}]'], "^--sets: task: num_train: Expected a int. Got value: all$"),
    ],
)
def test_values_of_the_wrong_type_are_told_in_plain_words(words, expected):
    with pytest.raises(ConfigError, match=expected):
        parse_config(EvaluateConfig, words, prog="test")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--ids", "a"], ("a",)),
        (["--ids=a"], ("a",)),
        (["--ids", "a", "7", "b c", "--overwrite"], ("a", "7", "b c")),
        (["--ids", '["a", "b"]'], ("a", "b")),
        (["--ids", "[]"], ()),
    ],
)
def test_a_list_of_words_is_given_as_words_or_as_a_list(words, expected):
    assert parse_config(EvaluateConfig, words, prog="test").ids == expected


def test_a_key_that_is_set_twice_in_a_file_is_refused_with_both_lines(tmp_path):
    from openrl_reason.algorithms.reinforce_config import ReinforceConfig

    (tmp_path / "run.yaml").write_text("prompts_per_step: 8\npolicy: {lr: 1e-6}\nprompts_per_step: 16\n")
    with pytest.raises(ConfigError, match=r"run.yaml:3: 'prompts_per_step' is set a second time \(first on line 1\)"):
        parse_config(ReinforceConfig, ["--config", str(tmp_path / "run.yaml")], prog="test")


def test_files_may_stand_anywhere_between_flags():
    from openrl_reason.evaluation.compare import CompareConfig

    words = ["--metric", "pass@4", "a.json", "--common_items", "b.json", "--output=x.json"]
    assert split_words(CompareConfig, words) == (["a.json", "b.json"], ["--metric", "pass@4", "--common_items", "--output=x.json"])
    assert split_words(CompareConfig, ["--common_items", "false", "a"]) == (["a"], ["--common_items", "false"])


def test_settings_that_differ_from_saved_ones_are_named_with_both_values(tmp_path):
    from openrl_reason.algorithms.oreo_config import OREOConfig

    file = tmp_path / "config.yaml"
    before = parse_config(OREOConfig, ["--data.path", "a.jsonl"], prog="oreo")
    save_config(before, file)
    assert changed_settings(before, file) == []
    now = parse_config(OREOConfig, ["--data.path", "b.jsonl", "--algo.level", "step", "--algo.kl.coef", "0.1"], prog="oreo")
    assert changed_settings(now, file) == [
        '--data.path ["a.jsonl"] -> ["b.jsonl"]', '--algo.level "token" -> "step"', "--algo.kl.coef 0.01 -> 0.1",
    ]  # fmt: skip
    file.write_text("")
    assert changed_settings(now, file) == []
    file.write_text("{")
    assert changed_settings(now, file) == [] == changed_settings(now, tmp_path / "none.yaml")
