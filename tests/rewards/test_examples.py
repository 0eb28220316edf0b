"""The examples and the page about rewards do what they say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from reward_helpers import make_sample, score_all

from openrl_reason.config import parse_config
from openrl_reason.rewards.calling import BoundFunction, Caller
from openrl_reason.rewards.config import RewardConfig, RewardServerConfig
from openrl_reason.rewards.functions import function_rewards
from openrl_reason.rewards.server import ServerRewards
from openrl_reason.rewards.shaping import ShapedRewardConfig

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "rewards.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def test_every_python_block_of_the_page_is_a_reward_function_that_works():
    forms = {}
    for block in blocks("python"):
        names = {}
        exec(compile(block, "docs/rewards.md", "exec"), names)
        for name in re.findall(r"^(?:async )?def (\w+)", block, re.MULTILINE):
            bound, results = BoundFunction(names[name]), {}
            caller = Caller(bound, 5.0, 4)
            caller.run([make_sample("It is 4"), make_sample("It is 5")], results.__setitem__)
            caller.close()
            assert {result.status for result in results.values()} == {"ok"}, (name, results)
            forms[name] = bound.form
    assert forms == {"reward_func": "batch", "closeness": "sample", "short_steps": "sample", "ask_a_service": "sample", "accuracy": "columns"}


def test_every_setting_of_the_page_is_accepted(tmp_path):
    for block in blocks("yaml"):
        (tmp_path / "reward.yaml").write_text(yaml.safe_dump(yaml.safe_load(block)["reward"]))
        assert len(parse_config(RewardConfig, ["--config", str(tmp_path / "reward.yaml")], prog="test").terms) == 4
    named = set(re.findall(r"--reward\.([\w.]+)", PAGE))
    for name in named - {"remote_url"}:
        owner = RewardServerConfig if name.startswith("server.") else ShapedRewardConfig
        assert name.removeprefix("server.") in owner.__dataclass_fields__, name


def test_the_batched_example_rewards_right_numbers():
    source = function_rewards(str(ROOT / "examples/python/reward_func.py"), RewardConfig())
    results = score_all(source, [make_sample(text) for text in ("1+3 is 4", "it is 5", "no idea")])
    assert [round(result.score, 3) for result in results] == [1.0, 0.1, 0.0]
    assert results[0].logs == {"numbers": 3.0, "scores": 1.0}
    source.close()


@pytest.mark.parametrize("function", ["check_steps", "check_steps_record"])
def test_the_example_with_step_rewards_checks_every_line(function):
    source = function_rewards(f"{ROOT}/examples/python/reward_per_step.py:{function}", RewardConfig())
    steps = ("2 * 3 = 6\n", "so\n", "6 + 1 = 8\n", "1 / 0 = 0, 4 / 2 = 2\n", "8")
    result = score_all(source, [make_sample("".join(steps), steps=steps)])[0]
    assert (result.step_scores, result.score) == ((1.0, 0.0, -1.0, -1.0, 0.0), -1.0)
    assert (result.parsed, result.logs) == (("8", {"false_steps": 2.0}) if function == "check_steps_record" else (None, {}))
    source.close()


def test_the_example_server_answers():
    server = subprocess.Popen([sys.executable, str(ROOT / "examples/python/reward_server.py"), "0"], stdout=subprocess.PIPE, text=True)
    try:
        url = server.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        source = ServerRewards([url], RewardServerConfig())
        assert [result.score for result in score_all(source, [make_sample("It is 4."), make_sample("It is 5.")])] == [1.0, 0.0]
        source.close()
    finally:
        server.terminate()
        server.wait()
        server.stdout.close()
