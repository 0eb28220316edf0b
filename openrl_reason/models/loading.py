"""Loading Hugging Face folders, with errors that say what is missing."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from openrl_reason.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Settings with which a model rescales or bends its logits or attention scores after the plain matrix product.
_DROPOUT_SETTINGS = ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout")
_LOGIT_SETTINGS = ("final_logit_softcapping", "attn_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


def check_model_folder(path: str) -> None:
    """Raises DataError naming what a model folder lacks. A name that is no folder passes only where the hub may be asked."""
    if not path:
        raise ConfigError("the model path is empty; give a folder in Hugging Face format, e.g. --policy.path models/tiny")
    folder = Path(path)
    if not folder.exists():
        looks_local = folder.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1
        if looks_local or os.environ.get("HF_HUB_OFFLINE") == "1":
            raise DataError(f"no model at {path}: the folder does not exist. `openrl-reason make-model` writes a small one")
        return
    if not folder.is_dir():
        raise DataError(f"{path} is a file; a model is a folder with config.json, *.safetensors and a tokenizer")
    if not (folder / "config.json").is_file():
        raise DataError(f"{path} is not a model folder: it has no config.json")
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(p.name for p in folder.glob("*.bin"))
        hint = f" ({pickled[0]} is pickled, and pickles are not loaded: convert it to safetensors)" if pickled else ""
        raise DataError(f"{path} is not a complete model folder: it has config.json but no *.safetensors weights{hint}")


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. A missing pad token becomes the end-of-sequence token (logged); no chat template is fine."""
    from transformers import AutoTokenizer

    check_model_folder(path)
    # Without any file, transformers would invent an empty tokenizer for the architecture.
    if Path(path).is_dir() and not any((Path(path) / name).is_file() for name in _TOKENIZER_FILES):
        raise DataError(f"{path} has no tokenizer (none of {', '.join(_TOKENIZER_FILES)})")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} has no tokenizer that loads: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise DataError(f"the tokenizer of {path} has no end-of-sequence token: set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        logger.warning("the tokenizer of %s has no pad token; its end-of-sequence token %r stands in", path, tokenizer.eos_token)
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(path: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's ``config.json``. Raises ConfigError for models whose logits this library would compute wrongly."""
    from transformers import AutoConfig

    check_model_folder(path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}/config.json cannot be used: {_first_line(error)}") from error
    for name in _DROPOUT_SETTINGS:  # log-probs and values of an update must be those of the model, whoever asks for them
        if getattr(config, name, None):
            setattr(config, name, 0.0)
    values = config.to_dict()
    for name in _LOGIT_SETTINGS:
        if values.get(name) not in (None, 0, 0.0, 1, 1.0):
            raise ConfigError(
                f"{path} is a {config.model_type} model with {name}={values[name]}; the chunked log-probabilities cannot reproduce that. "
                "Use a model with plain logits (Qwen2, Qwen3, Llama, Mistral, SmolLM2, ...)"
            )
    return config


def position_limit(config: PretrainedConfig) -> int | None:
    """The longest sequence of a model; None: no limit.

    Rotary embeddings of the types longrope and dynamic change for all sequences of a packed row once one of them is longer than the model's
    original context, so that is the limit here: what a model says of a sequence must not depend on what is packed beside it.
    """
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) in ("longrope", "dynamic"):
        original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        return min(one for one in (limit, original) if one) if limit or original else None
    return limit


def load_causal_lm(path: str, dtype: str, *, attn_implementation: str = "sdpa", trust_remote_code: bool = False) -> PreTrainedModel:
    """A causal language model from safetensors, on the CPU. ``dtype``: ``float32`` or ``bfloat16``."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = load_config(path, trust_remote_code=trust_remote_code)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=DTYPES[dtype],
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise DataError(f"the model {path} does not load: {_first_line(error)}") from error
    if report["missing_keys"]:  # transformers would fill them with random numbers and a warning
        raise DataError(f"the weights of {path} lack {sorted(report['missing_keys'])[0]} (missing in all: {len(report['missing_keys'])})")
    model.config.use_cache = False
    return model


def load_output_head(path: str, dtype: str, *, trust_remote_code: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight [V, H] and bias of a local folder's output head, without the rest of the model: what turns its hidden states into logits.

    Raises:
        DataError: the folder has no such tensor.
    """
    from safetensors import safe_open

    config = load_config(path, trust_remote_code=trust_remote_code)
    names = ["lm_head.weight", *(["model.embed_tokens.weight"] if config.tie_word_embeddings else [])]
    found: dict[str, torch.Tensor] = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, framework="pt") as stream:
            for name in set(stream.keys()) & {*names, "lm_head.bias"}:
                found[name] = stream.get_tensor(name).to(DTYPES[dtype])
    weight = next((found[name] for name in names if name in found), None)
    if weight is None:
        raise DataError(f"{path} has no output head to take a KL with (looked for {' and '.join(names)} in its *.safetensors)")
    return weight, found.get("lm_head.bias")


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, path: str) -> None:
    """Raises DataError where the tokenizer can emit an id for which the model has no embedding."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise DataError(
            f"the tokenizer of {path} has token id {largest}, but the model has only {config.vocab_size} embeddings "
            f"(ids 0 to {config.vocab_size - 1}): tokenizer and model do not belong together"
        )


def check_same_ids(tokenizer: PreTrainedTokenizerBase, policy: PreTrainedTokenizerBase, where: str) -> None:
    """Raises DataError where ``tokenizer``, that of the model at ``where``, reads a token of the policy's as another one. It may have more."""
    own = tokenizer.get_vocab()
    others = [(number, token) for token, number in policy.get_vocab().items() if own.get(token) != number]
    if others:
        number, token = min(others)
        raise DataError(f"{where} has another tokenizer than the policy (they differ at id {number}, {token!r}): it would read other texts")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
