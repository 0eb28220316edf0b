"""A language model with a number for every token: value networks, reward models and process-reward models are this one module.

On disk it is a Hugging Face ``...ForTokenClassification`` folder, which ``AutoModelForTokenClassification`` loads as it is, head included.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from openrl_reason.config import require
from openrl_reason.core.segments import shift_into_segments
from openrl_reason.errors import ConfigError, DataError
from openrl_reason.models.loading import DTYPES, check_same_ids, load_config, load_tokenizer, position_limit
from openrl_reason.models.policy import packed_hidden_states

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

HEAD_INITS = ("zero", "small")


class ScalarHead(nn.Linear):
    """A linear head that computes in float32 whatever the model's dtype: in bfloat16 a value of 0.41 would come in steps of 0.002."""

    @classmethod
    def replacing(cls, head: nn.Linear) -> ScalarHead:
        """A scalar head around the parameters (the very objects) of ``head``."""
        scalar = cls(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
        scalar.weight, scalar.bias = head.weight, head.bias
        return scalar

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [N, H] -> float32 [N, num_labels]."""
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(hidden.float(), self.weight.float(), bias)


class ScalarModel(nn.Module):
    """Wraps a transformers token-classification model for packed sequences. Its head is replaced in place by a ``ScalarHead``."""

    def __init__(self, model: PreTrainedModel, *, attn_impl: str):
        super().__init__()
        self.model, self.attn_impl = model, attn_impl
        self.max_positions = position_limit(model.config)
        model.score = ScalarHead.replacing(model.score)

    def forward(self, token_ids: Tensor, cu_seqlens: Tensor, shifted: bool = True) -> Tensor:
        """token_ids [N], cu_seqlens [B+1] -> float32 [N] (with several labels [N, num_labels]).

        ``shifted``: entry t is the value of the state before token t, 0.0 at the first token of a sequence; the convention of critics. Else entry
        t is the score of everything up to and with token t: what a reward model says at the last token, a process-reward model at the
        end of a step, and a search of a finished prefix. Raises DataError for a sequence longer than the model's positions.
        """
        decoder = getattr(self.model, self.model.base_model_prefix)
        hidden = packed_hidden_states(decoder, token_ids, cu_seqlens, attn_impl=self.attn_impl, max_positions=self.max_positions)
        scores = self.model.score(hidden)
        scores = scores.squeeze(-1) if scores.shape[-1] == 1 else scores
        return shift_into_segments(scores, cu_seqlens) if shifted else scores


def check_scalar_folder(path: str, tokenizer: Any, length: int, *, flag: str, trust_remote_code: bool = False) -> None:
    """Whether the folder can be a critic or reward model of what ``tokenizer`` (the policy's) writes; reads no weights.

    Its tokenizer may have more tokens than the policy's (a padding token that a reward model added), and the shared ones must be the same.

    Raises:
        DataError: there is no such model, the vocabulary or the tokenizer is another one, the head has another size or number of labels,
            positions are too few.
    """
    where = f"--{flag} {path}"
    try:
        config, own = load_config(path, trust_remote_code=trust_remote_code), load_tokenizer(path, trust_remote_code=trust_remote_code)
    except (ConfigError, DataError) as error:
        raise type(error)(f"--{flag}: {error}") from error
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise DataError(f"{where} has {config.vocab_size} embeddings, but the policy's tokenizer has token id {largest}: the vocabularies differ")
    check_same_ids(own, tokenizer, where)
    positions = position_limit(config)
    if positions and positions < length:
        raise DataError(f"{where} has {positions} positions, and sequences have up to {length} tokens")
    if has_scalar_head(config) and config.num_labels != 1:
        raise DataError(f"{where} has a head of {config.num_labels} labels; one number for each token is needed here")
    for name, shape in _shapes(path).items():
        if name == "score.weight" and list(shape) != [1, config.hidden_size]:
            raise DataError(f"{where}: its head score.weight is {list(shape)}, but config.json says hidden size {config.hidden_size}")
        if name.endswith("embed_tokens.weight") and list(shape) != [config.vocab_size, config.hidden_size]:
            size = f"vocabulary {config.vocab_size} and hidden size {config.hidden_size}"
            raise DataError(f"{where}: its embeddings {name} are {list(shape)}, but config.json says {size}")


def _shapes(path: str) -> dict[str, Sequence[int]]:
    """Shapes of the tensors of a local folder, from the headers of its files."""
    from safetensors import safe_open

    shapes: dict[str, Sequence[int]] = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, framework="pt") as stream:
            shapes |= {name: stream.get_slice(name).get_shape() for name in stream.keys()}  # noqa: SIM118
    return shapes


def load_scalar_model(
    path: str,
    dtype: str,
    *,
    num_labels: int = 1,
    head_init: str = "zero",
    seed: int = 0,
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A model with a scalar head, from any folder: its own head if it has one, else a new one on a language model.

    Args:
        dtype: "float32" or "bfloat16".
        num_labels: 1 for values and rewards; more for a process-reward model that classifies.
        head_init: of a new head: "zero" (every value is 0 at first) or "small" (normal, standard deviation 1 / sqrt(hidden size + 1)).

    Raises:
        DataError: weights are missing or do not fit config.json, or the head there has another number of labels.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForTokenClassification
    from transformers.utils.logging import disable_progress_bar

    require(head_init in HEAD_INITS, "head_init", head_init, f"use one of {', '.join(HEAD_INITS)}")
    disable_progress_bar()
    config = load_config(path, trust_remote_code=trust_remote_code)
    has_head = has_scalar_head(config)
    if has_head and config.num_labels != num_labels:
        raise DataError(f"{path} has a head of {config.num_labels} labels; {num_labels} are needed here")
    config.num_labels, config.classifier_dropout = num_labels, 0.0
    try:
        model, report = AutoModelForTokenClassification.from_pretrained(
            path, config=config, dtype=DTYPES[dtype], attn_implementation=attn_implementation, trust_remote_code=trust_remote_code,
            use_safetensors=True, output_loading_info=True,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise DataError(f"the model {path} does not load: {str(error).strip().splitlines()[0]}") from error
    missing = set(report["missing_keys"])
    new = missing & ({"score.bias"} if has_head else {"score.weight", "score.bias"})
    if missing - new:
        raise DataError(f"the weights of {path} lack {sorted(missing - new)[0]} (missing in all: {len(missing - new)})")
    _initialise(model.score, new, head_init, seed)
    model.config.use_cache = False
    model.config.architectures = [type(model).__name__]
    return model


def has_scalar_head(config: PretrainedConfig) -> bool:
    """Whether the model of this config brings a head with numbers for tokens (or sequences)."""
    kinds = ("ForTokenClassification", "ForSequenceClassification")
    return any(name.endswith(kinds) for name in config.architectures or ())


def _initialise(head: nn.Linear, new: set[str], head_init: str, seed: int) -> None:
    """Fills what no file gave; a sequence-classification head has no bias, and gets a bias of 0."""
    with torch.no_grad():
        if "score.weight" in new:
            deviation = 0.0 if head_init == "zero" else (head.in_features + 1) ** -0.5
            noise = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed))
            head.weight.copy_(noise * deviation)
        if "score.bias" in new and head.bias is not None:
            head.bias.zero_()
