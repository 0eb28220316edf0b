"""Tokenizers made on the spot, folders that hold one, and rows of every format."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from openrl_reason.core.trajectory import Trajectory
from openrl_reason.data.offline import OfflineDataConfig
from openrl_reason.data.offline_encode import Encoded
from openrl_reason.data.offline_formats import detect_layout
from openrl_reason.data.offline_rows import RowEncoder
from openrl_reason.data.readers import Row

TEXT = "Let us think. 1+2=3.\n\nSo: the answer is 3. \nThought: go on.\nAction: take mug 1 from sink 2.$ x^2 = 4. Natalia sold clips.\n#### 72\n" * 40
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<用户>", "<AI>"]


def byte_tokenizer(*, merges: bool = False, bos: bool = True):
    """One token a byte, or byte-level BPE with some hundred merges; ``<s>`` in front of a text."""
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate([*SPECIAL, *alphabet])}, []))
    if merges:
        tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=merges)
    tokenizer.decoder = decoders.ByteLevel()
    if merges:
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator([TEXT], trainer)
    return _finished(tokenizer, PreTrainedTokenizerFast, bos)


def metaspace_tokenizer():
    """As SentencePiece has it: a blank in front of every text, blanks as ``▁``."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", *SPECIAL], show_progress=False))
    return _finished(tokenizer, PreTrainedTokenizerFast, True)


def _finished(tokenizer, kind, bos):
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    return kind(
        tokenizer_object=tokenizer, bos_token="<s>" if bos else None, eos_token="</s>", pad_token="</s>",
        extra_special_tokens=[token for token in SPECIAL if token not in ("<s>", "</s>")],
    )  # fmt: skip


def encode(row: dict, tokenizer, **settings) -> tuple[list[Encoded], RowEncoder]:
    """The sequences of one row, and what was counted."""
    config = OfflineDataConfig(path=("x.jsonl",), **settings)
    encoder = RowEncoder(config, tokenizer, detect_layout(list(row), config, "x.jsonl"))
    records = list(encoder.records([Row("x.jsonl:1", row)]))
    return [side for record in records for side in record], encoder


def as_trajectory(encoded: Encoded) -> Trajectory:
    import numpy as np

    return Trajectory(
        trajectory_id="t", task_id="q", group_id="q", token_ids=encoded.token_ids, action_mask=encoded.step_ids >= 0, step_ids=encoded.step_ids,
        behaviour_logprobs=np.full(len(encoded.token_ids), np.nan), rewards=encoded.rewards, stop_reason=encoded.stop_reason, info=encoded.info,
    )  # fmt: skip


def one(row: dict, tokenizer, **settings) -> Trajectory:
    """The only sequence of a row."""
    (encoded,), _ = encode(row, tokenizer, **settings)
    return as_trajectory(encoded)


def as_sampled(tokenizer, text: str, prompt: str = "Q1?") -> dict:
    """The record of a response that an engine sampled, in one piece."""
    given, response = tokenizer(prompt)["input_ids"], tokenizer(text, add_special_tokens=False)["input_ids"]
    return Trajectory.from_completion(given, response, None, task_id="q", group_id="q", sample_index=0, reward=1.0).to_record()


def write_lines(path: Path, rows) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def write_tokenizer_folder(folder: Path, *, template: bool = True) -> str:
    """What counts as a model folder as far as its tokenizer is concerned."""
    from openrl_reason.models.tiny import make_tokenizer

    tokenizer = make_tokenizer()
    if not template:
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}')
    (folder / "model.safetensors").write_bytes(b"")
    return str(folder)
