"""The command on engines that are a chain and on tiny models in this process: what is sampled, credited, compared, written and refused."""

import contextlib
import csv
import importlib
import json
import math

import numpy as np
import pytest
import torch

from openrl_reason.algorithms.vine import VineConfig
from openrl_reason.errors import ConfigError, DataError, WorkerError
from openrl_reason.evaluation.analyze_policy import FORMAT, analyze_policy
from openrl_reason.evaluation.folders import without_nan
from openrl_reason.evaluation.gradient_noise import gradient_noise
from openrl_reason.evaluation.policy_config import AnalyzePolicyConfig, GradientConfig, KLAnalysisConfig, PolicyScoringConfig
from openrl_reason.evaluation.policy_gradients import credited, draw_batches
from openrl_reason.models.tiny import make_model
from openrl_reason.rewards.base import RewardResult
from openrl_reason.rewards.config import RewardConfig
from openrl_reason.workers.model_config import ScalarModelConfig
from openrl_reason.workers.model_worker import ModelWorker
from openrl_reason.workers.rollout_config import RolloutConfig, SamplingConfig
from tests.algorithms.toy_chain import Chain, ToyPool, ToyRewarder, ToyTask, parity, toy_vineppo

TINY = {"hidden_size": 32, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "intermediate_size": 32, "initializer_range": 0.3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, seed in (("policy", 0), ("reference", 1)):
        make_model(root / name, seed=seed, **TINY)
    make_model(root / "short", max_position=32, **TINY)
    return {name: str(root / name) for name in ("policy", "reference", "short")}


class LocalGroup:
    """A model group of one rank in this process."""

    def __init__(self, config):
        self.worker = ModelWorker(config)
        if isinstance(config, ScalarModelConfig):  # a new head says 0
            torch.nn.init.constant_(self.worker.model.model.score.weight, 0.05)

    def logprobs(self, batch, temperature):
        return self.worker.logprobs([batch], temperature)[0]

    def values(self, batch):
        return self.worker.values([batch])[0]["values"]

    def gradient_sketch(self, batch, *args, **settings):
        half = batch.num_sequences // 2
        cut = [range(half), range(half, batch.num_sequences)]
        return self.worker.gradient_sketch(batch.split(cut), *args, **settings)


@pytest.fixture
def analyze(monkeypatch, folders):
    """Runs the command; ``started`` tells what was started, in order."""
    module = importlib.import_module("openrl_reason.evaluation.analyze_policy")
    started = []

    def run(models=("policy",), reference="reference", score=parity, order=0, **changes):
        started.clear()

        @contextlib.contextmanager
        def engines(config, path, **_):
            started.append(f"engines {path.rsplit('/', 1)[-1]}")
            yield ToyPool(Chain(seed=len(path) % 7), order=order), ToyRewarder(score)

        @contextlib.contextmanager
        def group(config, role, placement, seed):
            started.append(role)
            yield LocalGroup(config)

        monkeypatch.setattr(module, "rewarded_engines", engines)
        monkeypatch.setattr(module, "running_group", group)
        monkeypatch.setattr(module, "Placement", lambda config, roles: contextlib.nullcontext())
        paths = tuple(folders.get(name, name) for name in models)
        return analyze_policy(config(models=paths, reference=folders.get(reference, reference), **changes), task=ToyTask("bcdefg"))

    run.started = started
    return run


def config(**changes):
    base = {"rollout": RolloutConfig(max_model_len=64), "sampling": SamplingConfig(max_new_tokens=12), "num_items": 0}
    gradient = GradientConfig(num_batches=5, prompts_per_batch=3, samples_per_prompt=3, vine=VineConfig(num_rollouts=3))
    return AnalyzePolicyConfig(**base | {"gradient": gradient} | changes)


ALL = {
    "analyses": ("weights", "kl", "gradient"), "kl": KLAnalysisConfig(samples_per_prompt=2, reverse=True),
    "gradient": GradientConfig(num_batches=4, prompts_per_batch=3, samples_per_prompt=3, credits=("group", "critic", "vine"), critic="CRITIC",
                               vine=VineConfig(num_rollouts=3)),
}  # fmt: skip


def everything(folders, **changes):
    gradient = GradientConfig(**vars(ALL["gradient"]) | {"critic": folders["policy"], **changes})
    return ALL | {"gradient": gradient}


# ---- the whole command -------------------------------------------------------------------------------------------------------------


def test_all_analyses_of_one_model(analyze, folders, tmp_path, capsys):
    summary = analyze(**everything(folders), output=str(tmp_path / "out"))
    assert analyze.started == ["engines reference", "engines policy", "critic", "policy", "reference"]
    out = tmp_path / "out"
    assert {file.name for file in out.iterdir()} == {"summary.json", "weights.csv", "kl.csv", "gradients.csv"}
    written = json.loads((out / "summary.json").read_text())
    assert written["format"] == FORMAT and written["reference"]["weights_fingerprint"] != written["models"][0]["identity"]["weights_fingerprint"]
    (model,) = written["models"]
    assert model["weights"]["total"]["relative"] > 0 and {one["name"] for one in model["weights"]["by_layer"]} >= {"layer 0", "model.norm"}
    assert set(model["kl"]) == {"policy", "reference"} and all(one["responses"] == 12 for one in model["kl"].values())
    # From the files alone the numbers can be computed again.
    rows = list(csv.DictReader((out / "kl.csv").open()))
    for who, found in model["kl"].items():
        own = [row for row in rows if row["sampled_by"] == who]
        total = {name: sum(float(row[name]) for row in own) for name in ("tokens", "k1", "k3")}
        assert found["tokens"] == total["tokens"] and found["k3"]["per_token"]["value"] == pytest.approx(total["k3"] / total["tokens"], rel=1e-5)
        assert found["k1"]["per_response"]["value"] == pytest.approx(total["k1"] / 12, rel=1e-5)
    credits = model["gradient"]["credits"]
    assert list(credits) == ["group", "critic", "vine"] and "relative_variance" not in credits["group"]
    products = np.zeros((4, 4))
    for row in csv.DictReader((out / "gradients.csv").open()):
        if row["credit"] == "vine":
            i, j = int(row["batch"]), int(row["other_batch"])
            products[i, j] = products[j, i] = float(row["inner_product"])
    again = gradient_noise(products)
    assert credits["vine"]["variance"]["value"] == pytest.approx(again["variance"]["value"], rel=1e-6) and credits["vine"]["variance"]["value"] > 0
    assert len({round(one["variance"]["value"], 9) for one in credits.values()}) == 3, "the credits differ"
    counts = model["gradient"]["counts"]
    assert counts["responses"] == 4 * 9 and counts["without_reward"] == 0 and counts["rollouts"] > 0 and counts["sketch_error"] < 1e-5
    weights = list(csv.DictReader((out / "weights.csv").open()))
    total = math.sqrt(sum(float(row["distance"]) ** 2 for row in weights))
    assert total == pytest.approx(summary["models"][0]["weights"]["total"]["distance"], rel=1e-5)
    printed = capsys.readouterr().out
    assert "KL(ref||policy) / token" in printed and "noise / signal" in printed and "gradients kept whole" in printed


def test_nothing_depends_on_the_order_in_which_completions_arrive(analyze, folders):
    first, second = (
        without_nan(analyze(**everything(folders, credits=("vine",), critic="", num_batches=2), order=order)["models"][0]) for order in (0, 7)
    )
    assert first["kl"] == second["kl"] and first["gradient"] == second["gradient"]


def test_a_model_is_its_own_reference_at_distance_0_and_several_models_share_the_references_responses(analyze, folders):
    summary = analyze(models=("reference", "policy"), analyses=("weights", "kl"), kl=KLAnalysisConfig(samples_per_prompt=2, reverse=True))
    assert analyze.started == ["engines reference", "engines reference", "policy", "engines policy", "policy", "reference"]
    same, other = summary["models"]
    assert same["weights"]["total"]["distance"] == 0 and same["weights"]["total"]["cosine"] == 1
    for who in ("policy", "reference"):
        assert all(abs(same["kl"][who][kind]["per_response"]["value"]) < 1e-5 for kind in ("k1", "k2", "k3"))
        assert other["kl"][who]["k2"]["per_response"]["value"] > 0.01
    assert same["kl"]["reference"]["tokens"] == other["kl"]["reference"]["tokens"]


def test_weights_alone_start_nothing(analyze, folders):
    (model,) = analyze()["models"]
    assert analyze.started == [] and set(model) == {"path", "identity", "weights"}


def test_gradients_need_no_reference_and_a_dry_run_starts_nothing(analyze, folders, capsys):
    assert analyze(reference="", analyses=("gradient",), dry_run=True) == {} and analyze.started == []
    assert "5 batches x 3 prompts x 3 = 45 responses of each model; credits group" in capsys.readouterr().out
    (model,) = analyze(reference="", analyses=("gradient",))["models"]
    assert analyze.started == ["engines policy", "policy"] and model["gradient"]["num_batches"] == 5


def test_whitened_advantages_change_the_scale_and_checkpointing_changes_nothing(analyze, folders):
    def mean_square(whiten, checkpointing):
        gradient = GradientConfig(num_batches=3, prompts_per_batch=3, samples_per_prompt=3, whiten=whiten)
        scoring = PolicyScoringConfig(gradient_checkpointing=checkpointing)
        (model,) = analyze(reference="", analyses=("gradient",), gradient=gradient, scoring=scoring)["models"]
        return model["gradient"]["credits"]["group"]["mean_square"]["value"]

    plain = mean_square("none", False)
    assert mean_square("none", True) == pytest.approx(plain, rel=1e-4)
    assert abs(mean_square("scale", False) - plain) > 0.01 * plain


# ---- batches and credits -----------------------------------------------------------------------------------------------------------


def test_batches_are_drawn_independently_and_hold_different_items():
    items = list(range(20))
    batches = draw_batches(items, 200, 5, (0,))
    assert all(len(set(batch)) == 5 for batch in batches) and draw_batches(items, 200, 5, (0,)) == batches != draw_batches(items, 200, 5, (1,))
    counts = np.bincount(np.concatenate(batches), minlength=20)
    assert counts.min() > 25 and counts.max() < 80, "each is expected 50 times"
    assert draw_batches(items, 3, 5, (0,)) == batches[:3]
    with pytest.raises(ConfigError, match="prompts_per_batch is 21, but there are 20 items"):
        draw_batches(items, 2, 21, (0,))


def test_the_credit_of_vine_is_vineppos(monkeypatch):
    trainer = toy_vineppo(prompts="bcd", samples=3, num_rollouts=4)
    rollouts = trainer.collect()
    expected, _ = trainer.credit(rollouts)
    counts = dict.fromkeys(("rollouts", "states_without_value"), 0)
    found = credited(rollouts, GradientConfig(samples_per_prompt=3, credits=("group", "vine")), 0.0, counts)
    assert torch.equal(found.advantages["vine"], expected.tokens["advantages"]) and counts["rollouts"] == rollouts.beside.num_rollouts
    rewards = rollouts.rewards.reshape(3, 3)
    by_hand = rewards - (rewards.sum(axis=1, keepdims=True) - rewards) / 2
    for row, advantage in enumerate(by_hand.flatten()):
        own = found.batch.select([row])
        tokens = found.advantages["group"][found.batch.token_index([row])][own.action_mask]
        assert torch.allclose(tokens, torch.tensor(advantage, dtype=torch.float32))


def failing(share):
    def score(sample):
        if sum(map(ord, sample.response)) % 100 < share:
            return RewardResult(math.nan, "timeout", detail="too slow")
        return parity(sample)

    return score


def test_responses_without_a_reward_are_left_out_and_counted_and_too_many_end_the_command(analyze, folders):
    kept = {"analyses": ("gradient",), "reward": RewardConfig(max_failed_rate=0.9)}
    (model,) = analyze(score=failing(30), **kept)["models"]
    counts = model["gradient"]["counts"]
    assert 0 < counts["without_reward"] < counts["responses"] == 45
    with pytest.raises(WorkerError, match="rewards failed .*too slow"):
        analyze(score=failing(30), analyses=("gradient",))
    with pytest.raises(DataError, match="not one of the 9 responses of batch 0 has a reward"):
        analyze(score=failing(100), analyses=("gradient",), reward=RewardConfig(max_failed_rate=1.0))


# ---- what is refused ---------------------------------------------------------------------------------------------------------------

KL, GRADIENT = {"analyses": ("kl",)}, {"analyses": ("gradient",)}
BAD = [
    ({"analyses": ()}, "--analyses is .*one or more of weights, kl, gradient"),
    ({"analyses": ("weight",)}, "--analyses"),
    ({"analyses": ("kl", "kl")}, "--analyses .*once"),
    ({"models": ("a", "a")}, "--models .*once"),
    ({"split": "dev"}, "--split"),
    ({"num_items": -1}, "--num_items"),
    ({"scoring": PolicyScoringConfig(dtype="float16")}, "--scoring: dtype is 'float16'"),
    (KL | {"sampling": SamplingConfig(temperature=0.0)}, "--sampling.temperature"),
    (KL | {"sampling": SamplingConfig(top_p=0.9)}, "--sampling.top_p is 0.9: responses must come from the whole distribution"),
    (KL | {"sampling": SamplingConfig(top_k=5)}, "--sampling.top_k is 5"),
    (KL | {"sampling": SamplingConfig(max_new_tokens=64)}, "--sampling.max_new_tokens"),
    (KL | {"kl": KLAnalysisConfig(samples_per_prompt=0)}, "--kl.samples_per_prompt"),
    (GRADIENT | {"gradient": GradientConfig(num_batches=1)}, "--gradient.num_batches is 1"),
    (GRADIENT | {"gradient": GradientConfig(samples_per_prompt=1)}, "--gradient.samples_per_prompt is 1: .*siblings"),
    (GRADIENT | {"gradient": GradientConfig(credits=("rloo",))}, "--gradient.credits is .*group, critic, vine"),
    (GRADIENT | {"gradient": GradientConfig(credits=())}, "--gradient.credits"),
    (GRADIENT | {"gradient": GradientConfig(credits=("critic",))}, "--gradient.critic is '': name the folder"),
    (GRADIENT | {"gradient": GradientConfig(critic="x")}, "--gradient.critic is 'x': add the credit critic"),
    (GRADIENT | {"models": ("a", "b"), "gradient": GradientConfig(credits=("critic",), critic="x")}, "--models .*one model"),
    (GRADIENT | {"gradient": GradientConfig(loss_reduction="mean")}, "--gradient.loss_reduction"),
    (GRADIENT | {"gradient": GradientConfig(whiten="yes")}, "--gradient.whiten"),
    (GRADIENT | {"gradient": GradientConfig(sketch_size=10)}, "--gradient.sketch_size"),
    (GRADIENT | {"gradient": GradientConfig(credits=("vine",), vine=VineConfig(num_rollouts=0))}, "--gradient.vine.num_rollouts is 0"),
    (GRADIENT | {"gradient": GradientConfig(credits=("vine",), vine=VineConfig(step_kind="newlin"))}, "--gradient.vine.step_kind: .*did you mean"),
]  # fmt: skip


@pytest.mark.parametrize("changes, message", BAD, ids=[message for _, message in BAD])
def test_settings_that_cannot_work_are_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_folders_that_cannot_work_are_refused_before_anything_starts(analyze, folders, tmp_path):
    for error, message, settings in (
        (ConfigError, r"--models is \[\]: name one", {"models": ()}),
        (ConfigError, "--reference is '': .*for weights", {"reference": ""}),
        (ConfigError, "--reference is '': .*for weights and kl", {"reference": "", "analyses": ("weights", "kl", "gradient")}),
        (ConfigError, "--output .*exists", {"output": str(tmp_path)}),
        (DataError, "no model at .*nowhere", {"reference": str(tmp_path / "nowhere")}),
        (DataError, "--reference .*32 positions", KL | {"reference": "short"}),
        (DataError, "--gradient.critic .*32 positions",
         GRADIENT | {"gradient": GradientConfig(prompts_per_batch=2, credits=("critic",), critic=folders["short"])}),
        (ConfigError, "prompts_per_batch is 16, but there are 6 items", GRADIENT | {"gradient": GradientConfig()}),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            analyze(**settings)
        assert analyze.started == []
