"""A policy in this very process: transformers generates, torch trains, no Ray, no vLLM, no DeepSpeed. For toys, tests and debuggers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from openrl_reason.core.batch import TokenBatch
from openrl_reason.core.trajectory import StopReason, Trajectory
from openrl_reason.models.attention import choose_attention
from openrl_reason.models.loading import load_causal_lm, load_tokenizer
from openrl_reason.models.policy import LanguageModel, ModelOutput
from openrl_reason.models.turn_end import end_token_ids


class LocalPolicy:
    """``act`` on prompts, ``update`` on trajectories, with the same losses as the distributed groups."""

    def __init__(self, path: str, *, lr: float = 1e-4, seed: int = 0, max_grad_norm: float = 1.0) -> None:
        self.tokenizer = load_tokenizer(path)
        self._ends = end_token_ids(self.tokenizer)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        attention = choose_attention("auto", self.device)
        self.model = LanguageModel(load_causal_lm(path, "float32", attn_implementation=attention), attn_impl=attention).to(self.device)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
        self._generator = torch.Generator(device=self.device).manual_seed(seed)
        self._max_grad_norm, self._version = max_grad_norm, 0

    @torch.no_grad()
    def act(
        self, text: str, *, max_new_tokens: int = 128, temperature: float = 1.0, task_id: str = "", sample_index: int = 0
    ) -> tuple[str, Trajectory]:
        """Samples one response to a prompt; returns its text and the token-exact trajectory (reward still 0).

        The whole prefix is run again for each token: right for toys, far too slow for anything else.
        """
        self.model.eval()
        prompt = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        sampled: list[int] = []
        logprobs: list[float] = []
        while len(sampled) < max_new_tokens and (not sampled or sampled[-1] not in self._ends):
            distribution = self._next_logprobs([*prompt, *sampled], temperature)
            token = int(torch.multinomial(distribution.exp(), 1, generator=self._generator))
            sampled.append(token)
            logprobs.append(float(distribution[token]))
        stop = StopReason.EOS if sampled[-1] in self._ends else StopReason.LENGTH
        trajectory = Trajectory.from_completion(
            prompt, sampled, logprobs, task_id=task_id, group_id=task_id, sample_index=sample_index, policy_version=self._version, stop_reason=stop
        )
        return self.tokenizer.decode(sampled, skip_special_tokens=True), trajectory

    def _next_logprobs(self, token_ids: Sequence[int], temperature: float) -> torch.Tensor:
        ids = torch.tensor(token_ids, device=self.device)
        ends = torch.tensor([0, len(token_ids)], dtype=torch.int32, device=self.device)
        head = self.model.model.get_output_embeddings()
        logits = torch.nn.functional.linear(self.model.hidden_states(ids, ends)[-1], head.weight, head.bias)
        return torch.log_softmax(logits.float() / temperature, dim=-1)

    def update(
        self,
        batch: TokenBatch,
        loss_fn: Callable[[ModelOutput, TokenBatch, Mapping[str, float]], tuple[torch.Tensor, dict[str, Any]]],
        denominators: Mapping[str, float],
        *,
        temperature: float = 1.0,
    ) -> dict[str, float]:
        """One AdamW step; ``loss_fn`` is what a ``ModelGroup`` takes."""
        self.model.train()
        batch = batch.to(self.device)
        logprobs, entropy = self.model(batch.token_ids, batch.cu_seqlens, temperature, True)
        loss, metrics = loss_fn(ModelOutput(logprobs=logprobs, entropy=entropy), batch, denominators)
        self._optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._max_grad_norm)
        self._optimizer.step()
        self._version += 1
        return {name: float(value) for name, value in metrics.items()} | {"grad_norm": float(norm)}
