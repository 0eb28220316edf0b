"""The analyze-policy command as users run it: real engines sample, critic, policy and reference score on ranks of their own."""

import csv
import json
import subprocess

import pytest

from tests.e2e.conftest import ENV, command, run


@pytest.mark.slow
def test_weights_kl_and_gradients_of_a_trained_policy(sft_run, tiny_model, tmp_path):
    reward = tmp_path / "parity.py"  # a model that solves nothing earns something all the same
    reward.write_text("def reward_func(responses, **kwargs):\n    return [float(len(response) % 2) for response in responses]\n")
    model, out = sft_run / "model", tmp_path / "out"
    words = [
        "analyze-policy", "--models", json.dumps([str(model)]), "--reference", tiny_model, "--analyses", '["weights", "kl", "gradient"]',
        "--task.levels", "[1]", "--reward.function", f"{reward}:reward_func", "--num_items", "12", "--kl.samples_per_prompt", "2",
        "--gradient.num_batches", "3", "--gradient.prompts_per_batch", "3", "--gradient.samples_per_prompt", "2",
        "--gradient.credits", '["group", "critic", "vine"]', "--gradient.critic", model, "--gradient.vine.num_rollouts", "2",
        "--gradient.vine.step_kind", "fixed:4", "--sampling.max_new_tokens", "12", "--rollout.max_model_len", "64", "--rollout.dtype", "float32",
        "--rollout.kv_cache_gib", "0.05", "--output", out,
    ]  # fmt: skip
    printed = run(*words).stdout
    assert "where they have changed most" in printed and "KL(policy||ref) / token" in printed and "gradients kept whole" in printed
    (found,) = json.loads((out / "summary.json").read_text())["models"]
    assert 0 < found["weights"]["total"]["relative"] < 1 and 0.5 < found["weights"]["total"]["cosine"] < 1
    assert found["kl"]["policy"]["responses"] == 24 and found["kl"]["policy"]["k3"]["per_token"]["value"] > 0
    assert found["kl"]["policy"]["logprob_difference"] < 1e-4, "the engine samples from the model that is analyzed"
    assert set(found["gradient"]["credits"]) == {"group", "critic", "vine"} and found["gradient"]["counts"]["rollouts"] > 0
    assert all(one["variance"]["value"] > 0 for one in found["gradient"]["credits"].values())
    assert len(list(csv.DictReader((out / "gradients.csv").open()))) == 3 * 6
    again = subprocess.run(command(*words), capture_output=True, text=True, env=ENV, timeout=100)
    assert again.returncode == 2 and "exists: choose another folder" in again.stderr
