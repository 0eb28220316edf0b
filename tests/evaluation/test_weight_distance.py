"""Distances of hand-made weights, and folders that cannot be compared."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from openrl_reason.errors import DataError
from openrl_reason.evaluation import weight_distance as module
from openrl_reason.evaluation.weight_distance import grouped, summed, weight_distances

WEIGHTS = {
    "model.embed_tokens.weight": torch.tensor([[3.0, 4.0]]),
    "model.layers.0.mlp.weight": torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
    "model.layers.10.mlp.weight": torch.tensor([[2.0, 0.0], [0.0, 0.0]]),
    "model.layers.2.mlp.weight": torch.zeros(2, 2),
    "model.norm.weight": torch.ones(3),
}


def folder(path: Path, weights=WEIGHTS, shards=1, config=None) -> str:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "qwen2"} | (config or {})))
    names = sorted(weights)
    for shard in range(shards):
        save_file({name: weights[name].clone() for name in names[shard::shards]}, path / f"model-{shard}.safetensors")
    return str(path)


def moved(**changes):
    return WEIGHTS | {name.replace("__", "."): tensor for name, tensor in changes.items()}


def test_norms_cosines_and_groups_are_those_computed_by_hand(tmp_path):
    changed = WEIGHTS | {
        "model.embed_tokens.weight": torch.tensor([[4.0, 3.0]]),  # moved by sqrt 2, norm 5, cosine 24 / 25
        "model.layers.10.mlp.weight": torch.tensor([[2.0, 0.0], [0.0, -1.0]]),
        "model.layers.2.mlp.weight": torch.full((2, 2), 0.5),  # from nothing: no relative change
    }
    found = weight_distances(folder(tmp_path / "a", changed), folder(tmp_path / "b", shards=3))
    assert [one.name for one in found] == [  # layers by their number
        "model.embed_tokens.weight", "model.layers.0.mlp.weight", "model.layers.2.mlp.weight", "model.layers.10.mlp.weight", "model.norm.weight"
    ]  # fmt: skip
    embeddings, first, second, tenth, norm = found
    assert (embeddings.distance, embeddings.relative, embeddings.cosine) == pytest.approx((math.sqrt(2), math.sqrt(2) / 5, 24 / 25))
    assert (first.distance, first.relative, first.cosine) == (0.0, 0.0, 1.0) and norm.cosine == 1.0
    assert second.distance == 1.0 and math.isnan(second.relative) and math.isnan(second.cosine)
    assert (tenth.distance, tenth.relative, tenth.largest) == (1.0, 0.5, 1.0) and tenth.cosine == pytest.approx(2 / math.sqrt(5))
    total = summed("all", found)
    assert total.num_parameters == 2 + 4 + 4 + 4 + 3
    assert total.distance == pytest.approx(2.0) and total.relative == pytest.approx(2 / math.sqrt(25 + 2 + 4 + 3)) and total.largest == 1.0
    assert [one.name for one in grouped(found, lambda one: one.layer)] == ["model.embed_tokens", "layer 0", "layer 2", "layer 10", "model.norm"]
    (mlp,) = [one for one in grouped(found, lambda one: one.module) if "mlp" in one.name]
    assert mlp.name == "model.layers.*.mlp.weight" and mlp.distance == pytest.approx(math.sqrt(2)) and mlp.num_parameters == 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pieces_and_dtypes_do_not_change_the_numbers(tmp_path, monkeypatch, dtype):
    generator = torch.Generator().manual_seed(0)
    names = {"w": (7, 5), "v": (11,), "s": (), "cube": (3, 2, 4), "none": (0, 4)}
    one, two = ({name: torch.randn(shape, generator=generator).to(dtype) for name, shape in names.items()} for _ in range(2))
    paths = folder(tmp_path / "a", one), folder(tmp_path / "b", two)
    whole = {found.name: found for found in weight_distances(*paths)}
    monkeypatch.setattr(module, "PIECE", 6)
    for found in weight_distances(*paths):
        x, y = one[found.name].double(), two[found.name].double()
        assert found.distance == pytest.approx(float((x - y).norm()), rel=1e-12) and found.reference == pytest.approx(float((y**2).sum()), rel=1e-12)
        assert found.distance == pytest.approx(whole[found.name].distance, rel=1e-12) and found.largest == whole[found.name].largest


def test_a_tied_head_counts_once_wherever_it_is_stored(tmp_path):
    stored = WEIGHTS | {"lm_head.weight": WEIGHTS["model.embed_tokens.weight"]}
    tied = {"tie_word_embeddings": True}
    paths = [folder(tmp_path / "a", stored, config=tied), folder(tmp_path / "b", config=tied)]
    for model, reference in (paths, paths[::-1]):
        assert "lm_head.weight" not in [one.name for one in weight_distances(model, reference)]
    untied = folder(tmp_path / "c", stored)
    assert summed("all", weight_distances(untied, untied)).num_parameters == 17 + 2
    with pytest.raises(DataError, match="c has an output head of its own .*b ties it"):
        weight_distances(untied, paths[1])


def test_a_saved_model_is_as_far_from_another_as_its_parameters_are(tmp_path):
    from transformers import AutoModelForCausalLM

    from tests.helpers_models import write_tiny_model

    paths = [write_tiny_model(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    models = [dict(AutoModelForCausalLM.from_pretrained(path).named_parameters()) for path in paths]
    found = weight_distances(*paths)
    assert {one.name for one in found} == set(models[0])
    exact = math.sqrt(sum(float((models[0][name] - models[1][name]).detach().double().square().sum()) for name in models[0]))
    assert summed("all", found).distance == pytest.approx(exact, rel=1e-6)


def test_folders_that_cannot_be_compared_are_refused_with_what_is_wrong(tmp_path):
    good = folder(tmp_path / "good")

    def refuse(message, weights=WEIGHTS, name=None, **settings):
        bad = folder(tmp_path / (name or f"bad{len(list(tmp_path.iterdir()))}"), weights, **settings)
        with pytest.raises(DataError, match=message):
            weight_distances(bad, good)
        return bad

    refuse(r"model.norm.weight is \[4\] in .*bad.* and \[3\] in .*good", moved(model__norm__weight=torch.ones(4)))
    refuse("bad.* has the weight more, .*good has not", WEIGHTS | {"more": torch.ones(1)})
    refuse(r"good has the weight model.embed_tokens.weight \(and 3 more\), .*bad.* has not", {"model.norm.weight": torch.ones(3)})
    refuse("LoRA adapters .*lora_A.*export", WEIGHTS | {"model.layers.0.mlp.lora_A.weight": torch.ones(1)})
    refuse("not finite", moved(model__norm__weight=torch.tensor([1.0, math.nan, 1.0])))
    refuse("of type int32", moved(model__norm__weight=torch.ones(3, dtype=torch.int32)))
    refuse("quantised", config={"quantization_config": {"bits": 4}})
    adapter = refuse("more", WEIGHTS | {"more": torch.ones(1)})
    (Path(adapter) / "adapter_config.json").write_text("{}")
    with pytest.raises(DataError, match="is a LoRA adapter.*merge"):
        weight_distances(good, adapter)
    with pytest.raises(DataError, match="does not exist"):
        weight_distances(good, str(tmp_path / "nowhere"))
    cut = Path(folder(tmp_path / "cut"))
    file = cut / "model-0.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(DataError, match="cut short"):
        weight_distances(str(cut), good)
    twice = Path(folder(tmp_path / "twice"))
    (twice / "z.safetensors").write_bytes((twice / "model-0.safetensors").read_bytes())
    with pytest.raises(DataError, match="twice, in model-0.safetensors and z.safetensors"):
        weight_distances(str(twice), good)
    (twice / "config.json").write_text("[]")
    with pytest.raises(DataError, match="config.json is no JSON object"):
        weight_distances(str(twice), good)
