"""PPO and VinePPO as users run them: killed and resumed, warm-started, and what their logs say."""

import signal

import pytest
from safetensors.torch import load_file

from openrl_reason.observe.run_log import read_records
from tests.e2e.conftest import comparable, run, run_until

REWARD = """
def reward_func(queries, prompts, labels, **kwargs):
    rewards = [float(len(query) % 2) for query in queries]
    return {"rewards": rewards, "scores": rewards, "extra_logs": {}}
"""


@pytest.fixture(scope="module")
def common(sft_run, tmp_path_factory):
    """Settings of every run here; half of all texts are rewarded, so that there is something to learn at once."""
    function = tmp_path_factory.mktemp("reward") / "reward.py"
    function.write_text(REWARD)
    return [
        "--policy.path", sft_run / "model", "--policy.dtype", "float32", "--policy.lr", "1e-3", "--rollout.dtype", "float32",
        "--rollout.max_model_len", "128", "--rollout.kv_cache_gib", "0.05", "--sampling.max_new_tokens", "24", "--task.levels", "[1]",
        "--task.num_train", "32", "--prompts_per_step", "4", "--samples_per_prompt", "4", "--eval.num_items", "0", "--run.eval_at_start", "false",
        "--run.eval_at_end", "false", "--run.steps", "4", "--run.save_every", "2", "--run.log_rollouts", "-1", "--run.report", "false",
        "--reward.function", function,
    ]  # fmt: skip


PPO = ["--critic.dtype", "float32", "--critic.lr", "1e-3", "--critic.warmup_steps", "1", "--algo.minibatches", "2", "--algo.lam", "0.95",
       "--algo.kl.where", "reward", "--algo.kl.kind", "k1", "--algo.kl.coef", "0.01"]  # fmt: skip
VINE = ["--vine.num_rollouts", "3", "--vine.interval_width", "0.7", "--vine.max_rollouts", "6", "--vine.step_kind", "fixed:2",
        "--algo.whiten", "none", "--algo.kl.where", "loss", "--algo.kl.coef", "0.01"]  # fmt: skip


@pytest.fixture(scope="module")
def straight(common, tmp_path_factory):
    """{name: (folder, what the command printed)} of whole runs."""
    folder, runs = tmp_path_factory.mktemp("runs"), {}
    for name, more in (("ppo", PPO), ("vineppo", VINE)):
        runs[name] = folder / name, run(name, *common, *more, "--run.output_dir", folder / name).stdout
    return runs


def killed_and_resumed(name, folder, words):
    """A run that ends by SIGKILL one step after its checkpoint, and goes on."""
    process = run_until(3, folder, name, *words, "--run.output_dir", folder)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    process.stdout.close()
    assert any((folder / "checkpoints").iterdir())
    run(name, *words, "--run.output_dir", folder, "--run.resume")


def train_records(folder):
    return [record for record in read_records(folder / "metrics.jsonl") if record["event"] == "train"]


def records_of(folder, *more):
    """``comparable`` without the seconds that the reward function took, and without ``more``."""
    names = ("reward/reward_func/seconds", *more)
    return [{name: value for name, value in record.items() if name not in names} for record in comparable(folder)]


def assert_same_weights(one, two):
    one, two = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)


def test_ppo_trains_critic_and_policy_and_logs_values_beside_the_tokens(straight):
    folder, printed = straight["ppo"]
    assert "critic-0" in printed and (folder / "critic/config.json").exists()
    train = train_records(folder)
    assert [record.get("train/critic_warmup", 0) for record in train] == [1, 0, 0, 0]
    assert train[0]["critic/value_mean"] == 0 != train[1]["critic/value_mean"], "a new head says 0, and the warm-up trains it"
    assert max(abs(record["train/kl"]) for record in train[:2]) < 1e-6 < abs(train[3]["train/kl"]), "the policy waits for the warm-up's end"
    assert all(record["critic/grad_norm"] > 0 and record["sampling/logprob_difference/mean"] < 1e-4 for record in train[1:])
    rollouts = [record for record in read_records(folder / "rollouts.jsonl") if record["source"] == "train"]
    assert len(rollouts) == 4 * 16
    for record in rollouts:
        assert len(record["token_data"]["advantage"]) == len(record["token_data"]["value"]) == record["num_tokens"]


def test_ppo_resumed_after_kill_9_equals_the_straight_run(common, straight, tmp_path):
    folder, expected = tmp_path / "killed", straight["ppo"][0]
    killed_and_resumed("ppo", folder, [*common, *PPO])
    assert records_of(folder) == records_of(expected)
    for name in ("model", "critic"):
        assert_same_weights(folder / name, expected / name)
    assert read_records(folder / "rollouts.jsonl") == read_records(expected / "rollouts.jsonl")


@pytest.mark.slow
def test_the_critic_of_a_run_starts_that_of_another(common, straight, tmp_path):
    critic = straight["ppo"][0] / "critic"
    run("ppo", *common, "--critic.path", critic, "--critic.dtype", "float32", "--algo.whiten", "none", "--run.steps", "1",
        "--run.output_dir", tmp_path / "warm")  # fmt: skip
    (record,) = train_records(tmp_path / "warm")
    assert record["critic/value_mean"] != 0
    for rollout in read_records(tmp_path / "warm/rollouts.jsonl"):  # lambda 1, no KL: value and advantage add up to what was earned
        sums = [a + v for a, v in zip(rollout["token_data"]["advantage"], rollout["token_data"]["value"], strict=True)]
        assert sums == pytest.approx([rollout["reward"]] * len(sums), abs=2e-3)


def test_vineppo_has_no_critic_and_its_first_step_is_on_policy(straight):
    folder, printed = straight["vineppo"]
    assert "critic" not in printed and not list(folder.glob("**/critic*"))
    train = train_records(folder)
    assert abs(train[0]["train/kl"]) < 1e-6
    for record in train:
        assert record["train/ratio/max"] == record["train/ratio/min"] == 1 and record["sampling/logprob_difference/max"] < 1e-3
        assert 3 <= record["credit/rollouts_per_state"] <= 6 and record["credit/steps_per_trajectory"] > 1
        assert record["credit/failed_rate"] == record["credit/states_without_value"] == 0
        assert 0 < record["credit/value_mean"] < 1 and 0 < record["credit/unique_prefix_share"] <= 1
        assert record["credit/mc_tokens_per_training_token"] > 0 and 0 <= record["perf/branch_hidden_share"] <= 1
        assert not any(name.startswith("critic/") for name in record)
    assert train[0]["train/kl"] != train[-1]["train/kl"], "nothing was learnt"


def test_vineppo_logs_credit_that_telescopes(straight):
    rollouts = [record for record in read_records(straight["vineppo"][0] / "rollouts.jsonl") if record["source"] == "train"]
    assert len(rollouts) == 4 * 16 and len({record["trajectory_id"] for record in rollouts}) == 4 * 16
    for record in rollouts:
        advantages, values = record["token_data"]["advantage"], record["token_data"]["value"]
        assert len(advantages) == len(values) == record["num_tokens"]
        starts = record.get("step_starts", [0])  # written where there is more than one
        for first, after in zip(starts, [*starts[1:], len(values)], strict=True):
            assert len(set(advantages[first:after])) == len(set(values[first:after])) == 1
        assert sum(advantages[first] for first in starts) == pytest.approx(record["reward"] - values[0], abs=2e-3 * len(starts))


@pytest.mark.slow
def test_vineppo_resumed_after_kill_9_equals_the_straight_run(common, straight, tmp_path):
    folder, expected = tmp_path / "killed", straight["vineppo"][0]
    killed_and_resumed("vineppo", folder, [*common, *VINE])
    # Which request comes first decides what the prefix caches have, and how many rewards fill a call.
    timed = ("rollout/prefix_cache_hit", "credit/prefix_cache_hit", "reward/reward_func/calls")
    assert records_of(folder, *timed) == records_of(expected, *timed)
    assert_same_weights(folder / "model", expected / "model")
    assert read_records(folder / "rollouts.jsonl") == read_records(expected / "rollouts.jsonl")
