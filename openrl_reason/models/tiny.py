"""A small Qwen2-architecture language model with a character-level tokenizer, made on the spot: nothing is downloaded.

It is what the quickstart and the tests train. Left out: pretraining. Its weights are random until SFT.

The tokenizer is Qwen2's own class (byte-level BPE) with no merges. transformers picks that class by the model type, whatever
tokenizer.json says, so anything else would load as something it is not.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from openrl_reason.errors import ConfigError
from openrl_reason.models.folders import new_model_folder

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer

PAD_TOKEN = "<|pad|>"
EOS_TOKEN = "<|endoftext|>"
ROLE_TOKENS = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
VOCAB_SIZE = 2 + len(ROLE_TOKENS) + 256
# The head sizes that vLLM's CPU attention has kernels for.
HEAD_DIMS = (32, 64, 96, 128)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|endoftext|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer(max_position: int = 1024) -> Qwen2Tokenizer:
    """One token per UTF-8 byte, so one per ASCII character, and every text survives the round trip (after Unicode NFC, as Qwen2 does).

    Ids: 0 pad, 1 eos, 2 to 4 the roles of the chat template, then 256 bytes. No BOS; nothing is added to a text."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    specials = [PAD_TOKEN, EOS_TOKEN, *ROLE_TOKENS.values()]
    tokenizer = Qwen2Tokenizer(
        vocab={entry: index for index, entry in enumerate([*specials, *sorted(ByteLevel.alphabet())])},
        merges=[],
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        unk_token=EOS_TOKEN,
        extra_special_tokens=list(ROLE_TOKENS.values()),
        model_max_length=max_position,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    assert len(tokenizer) == VOCAB_SIZE
    return tokenizer


def make_model(
    output_dir: str | os.PathLike[str],
    *,
    hidden_size: int = 256,
    num_layers: int = 4,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    intermediate_size: int = 512,
    max_position: int = 1024,
    seed: int = 0,
    tie_word_embeddings: bool = True,
    initializer_range: float = 0.02,
    overwrite: bool = False,
) -> Path:
    """Write a randomly initialised model (float32) and its tokenizer to ``output_dir`` and return the path.

    The folder loads with AutoModelForCausalLM, AutoTokenizer and vLLM. The same arguments give the same bytes in every file.
    Raises ConfigError for a shape that cannot work, and for a folder in use unless ``overwrite``.
    """
    _check_shape(hidden_size, num_layers, num_heads, num_kv_heads, intermediate_size, max_position)
    with new_model_folder(output_dir, overwrite=overwrite) as folder:
        import torch
        from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

        tokenizer = make_tokenizer(max_position)
        config = Qwen2Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            max_position_embeddings=max_position,
            tie_word_embeddings=tie_word_embeddings,
            initializer_range=initializer_range,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Qwen2ForCausalLM(config).to(torch.float32)
        model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
    return Path(output_dir)


def _check_shape(hidden_size: int, num_layers: int, num_heads: int, num_kv_heads: int, intermediate_size: int, max_position: int) -> None:
    sizes = {
        "hidden_size": hidden_size, "num_layers": num_layers, "num_heads": num_heads, "num_kv_heads": num_kv_heads,
        "intermediate_size": intermediate_size, "max_position": max_position,
    }  # fmt: skip
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
    if hidden_size % num_heads:
        raise ConfigError(f"hidden_size={hidden_size} is not divisible by num_heads={num_heads}; try num_heads={max(1, hidden_size // 64)}")
    if hidden_size // num_heads not in HEAD_DIMS:
        raise ConfigError(
            f"hidden_size={hidden_size} / num_heads={num_heads} gives heads of {hidden_size // num_heads}; "
            f"the rollout engine's CPU attention has {', '.join(map(str, HEAD_DIMS))}: try num_heads={max(1, hidden_size // 64)}"
        )
    if num_heads % num_kv_heads:
        divisors = [count for count in range(1, num_heads + 1) if num_heads % count == 0]
        raise ConfigError(f"num_heads={num_heads} is not divisible by num_kv_heads={num_kv_heads}; use one of {divisors}")
