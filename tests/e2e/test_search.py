"""The search command as users run it: engines and a critic side by side; greedy decoding in steps; a result that compare reads."""

import json

import pytest

from tests.e2e.conftest import run


@pytest.fixture(scope="module")
def critic(sft_run, tmp_path_factory):
    """A critic with a head that says something, in the policy's vocabulary."""
    from transformers import AutoTokenizer

    from openrl_reason.models.scalar_model import load_scalar_model

    folder = tmp_path_factory.mktemp("critic") / "critic"
    load_scalar_model(str(sft_run / "model"), "float32", head_init="small", seed=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(sft_run / "model").save_pretrained(folder)
    return folder


def words(policy, critic, output, *more):
    return [
        "search", "--policy", policy, "--critic", critic, "--task.levels", "[1]", "--num_items", "6", "--step_kind", "fixed:6", "--step_tokens", "8",
        "--sampling.max_new_tokens", "24", "--rollout.max_model_len", "64", "--rollout.dtype", "float32", "--rollout.kv_cache_gib", "0.05",
        "--scoring.dtype", "float32", "--output", output, *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_beams_are_searched_and_greedy_steps_are_greedy_decoding(sft_run, critic, tmp_path):
    sampled, greedy = tmp_path / "sampled.json", tmp_path / "greedy.json"
    printed = run(*words(sft_run / "model", critic, sampled, "--beams", "[2]")).stdout
    assert "what it took" in printed and "most frequent answer of plain samples" in printed and "is discarded" in printed
    result = json.loads(sampled.read_text())
    search, baseline, _ = result["sets"]
    assert [one["name"] for one in result["sets"]] == ["arithmetic/beam-2", "arithmetic/beam-2/majority", "arithmetic/greedy"]
    n, tokens = baseline["search"]["num_samples"], baseline["search"]["generated_tokens"]
    assert abs(tokens - search["search"]["generated_tokens"]) <= tokens / n and search["search"]["states_valued"] > 6
    assert result["critic"]["weights_fingerprint"] and len(result["comparisons"]) == 1 and result["search/arithmetic/beam-2/tokens_per_second"] > 0
    records = [json.loads(line) for line in (tmp_path / "sampled.samples.jsonl").read_text().splitlines()]
    values = {value for record in records[:6] for value in record["search"]["step_values"]}
    assert len(records) == 18 and len(values) > 3, "the critic tells states apart"

    run(*words(sft_run / "model", critic, greedy, "--beams", "[1]", "--sampling.temperature", "0"))
    records = [json.loads(line) for line in (tmp_path / "greedy.samples.jsonl").read_text().splitlines()]
    assert [one["response"] for one in records[:6]] == [one["response"] for one in records[6:]] and len(records) == 12
