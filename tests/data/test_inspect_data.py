"""What a user sees before training: the counts, and which tokens are the policy's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from openrl_reason.data.inspect_data import InspectDataConfig, inspect_data, marked_text
from openrl_reason.data.offline import OfflineDataConfig
from openrl_reason.errors import ConfigError
from tests.data.offline_helpers import byte_tokenizer, one, write_lines, write_tokenizer_folder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tokenizer_folder(tmp_path_factory.mktemp("model") / "tiny")


def shown(tmp_path, rows, model, capsys, *, num_examples=1, first=0, **settings):
    path = write_lines(tmp_path / "rows.jsonl", rows)
    data = OfflineDataConfig(path=(path,), parallel="never", **settings)
    inspect_data(InspectDataConfig(model=model, data=data, output=str(tmp_path / "store"), num_examples=num_examples, first=first))
    return capsys.readouterr().out


def test_the_policys_tokens_stand_in_brackets_step_by_step():
    tokenizer = byte_tokenizer()
    row = {"prompt": "Q:\n", "response": "a [b]\ncé", "reward": 1}
    assert marked_text(one(row, tokenizer), tokenizer).plain == "<s>Q:\\n\n⟦a [b]\\n\n⟧⟦cé</s>⟧"
    messages = [{"role": role, "content": text} for role, text in (("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"))]
    trajectory = one({"messages": messages, "reward": 1}, tokenizer, template="minicpm", eos="none")
    assert marked_text(trajectory, tokenizer).plain == "<s><用户>1<AI>⟦2⟧<用户>3<AI>⟦4⟧"


def test_counts_lengths_and_rewards_are_printed(tmp_path, model, capsys):
    rows = [{"prompt": "1?", "response": "a\nb", "reward": number % 2} for number in range(6)] + [{"prompt": "1?", "response": "", "reward": 0}]
    output = shown(tmp_path, [*rows, {"prompt": "1?", "response": "a"}, "oops"], model, capsys, bad_rows="skip", num_examples=0)
    lines = {tuple(part.strip() for part in line.strip().split("  ", 1)) for line in output.splitlines() if "  " in line.strip()}
    assert {("rows", "9, of which 6 are kept"), ("left out: empty", "1"), ("left out: bad row, malformed", "1"), ("questions", "1")} <= lines
    assert {("left out: bad row, missing column", "1"), ("duplicates (equal to an earlier row)", "4"), ("rewards, how often", "0: 3, 1: 3")} <= lines
    assert ("reward", "mean 0.5, std 0.5, positive 50.0%") in lines and ("steps of a response", "mean 2.0, p50 2, p95 2, max 2") in lines


def test_an_example_says_where_it_comes_from_and_how_many_states_it_has(tmp_path, model, capsys):
    output = shown(tmp_path, [{"prompt": "1?", "response": "a\nb", "reward": 1}] * 3, model, capsys, first=1)
    assert f"row 1 ({tmp_path}/rows.jsonl:2): 6 tokens, 2 of them prompt, 2 steps, reward 1" in output
    assert "states: 4 token, 2 step, 1 response" in output and "1?⟦a\\n\n⟧⟦b<|endoftext|>⟧" in output


def test_both_sides_of_a_pair_and_the_labels_of_steps_are_shown(tmp_path, model, capsys):
    output = shown(tmp_path, [{"prompt": "1?", "chosen": "a", "rejected": "b"}], model, capsys)
    assert "row 0 chosen" in output and "row 1 rejected" in output
    output = shown(tmp_path, [{"prompt": "1?", "completions": ["a", "b"], "labels": [True, False]}], model, capsys)
    assert "of steps [1.0, 0.0]" in output
    with pytest.raises(ConfigError, match="--first is 5: the store has 1 rows"):
        shown(tmp_path, [{"prompt": "1?", "response": "a"}], model, capsys, first=5)


def test_the_command_prints_one_error_for_a_bad_row(tmp_path, model):
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": "1?", "response": "a", "reward": 1}, {"prompt": "1?", "response": "a", "reward": "x"}])
    words = ["inspect-data", "--model", model, "--data.path", f'["{path}"]', "--output", str(tmp_path / "store")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-m", "openrl_reason", *words], capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"error: {path}:2: column 'reward' holds 'x'; expected a finite number" in result.stderr
