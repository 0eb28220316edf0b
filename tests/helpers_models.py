"""Tiny random models on disk, and batches of random tokens, for tests."""

from __future__ import annotations

import time
from pathlib import Path

import torch

VOCAB = 67


def write_tiny_model(folder: Path, *, tied: bool = True, kind: str = "qwen2", dtype=torch.float32, seed: int = 0, **overrides) -> str:
    """A 2-layer model with grouped-query attention and a character tokenizer. Returns its path."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

    settings = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    ) | overrides  # fmt: skip
    config = {"qwen2": Qwen2Config, "llama": LlamaConfig}[kind](**settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():  # large enough that attention is not uniform and a leak would show
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    model.save_pretrained(folder)
    characters = ["<pad>", "<|endoftext|>"] + [chr(code) for code in range(33, 33 + VOCAB - 2)]
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(characters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<pad>").save_pretrained(folder)
    return str(folder)


def random_batch(lengths, *, seed: int = 0, prompt_tokens: int = 2):
    """Sequences of random tokens; all but the first ``prompt_tokens`` of each are actions."""
    from openrl_reason.core.batch import TokenBatch

    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])
    mask = positions >= prompt_tokens
    return TokenBatch(
        token_ids=torch.randint(2, VOCAB, (total,), generator=generator),
        cu_seqlens=cu_seqlens,
        action_mask=mask,
        step_ids=torch.where(mask, 0, -1),
        behaviour_logprobs=torch.zeros(total),
    )


def supervised_loss(outputs, batch, denominators):
    """Mean negative log-likelihood of the actions over the global batch; also reports extremes."""
    actions = batch.action_mask
    loss = -(outputs.logprobs * actions).sum() / denominators["actions"]
    chosen = outputs.logprobs.detach()[actions]
    empty = chosen.numel() == 0
    return loss, {
        "loss": loss.detach(),
        "logprob/max": float("-inf") if empty else chosen.max(),
        "logprob/min": float("inf") if empty else chosen.min(),
    }


def failing_on_rank_1(outputs, batch, denominators):
    if torch.distributed.get_rank() == 1:
        raise MemoryError("out of memory in rank 1")
    return supervised_loss(outputs, batch, denominators)


def endless_loss(outputs, batch, denominators):
    time.sleep(60)


def first_moments(worker) -> torch.Tensor:
    """Adam's first moments of this rank as one float64 vector: after one step, (1 - beta1) times the clipped gradient."""
    from openrl_reason.workers.deepspeed_engine import adam_state, master_partitions

    state = adam_state(worker.engine)
    return torch.cat([state[master]["exp_avg"].flatten() for master in master_partitions(worker.engine)]).double()


def full_weights(worker) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in worker.named_full_tensors()}


def relative_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Largest over tensors of ||left - right|| / ||right||. A key bias has no gradient (softmax ignores it) and Adam makes noise of it."""
    assert left.keys() == right.keys()
    names = [name for name in left if "k_proj.bias" not in name]
    return max(float((left[n].double() - right[n].double()).norm() / right[n].double().norm().clamp(min=1e-30)) for n in names)
