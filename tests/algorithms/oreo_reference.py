"""OREO's training step as a straight line over padded batches: two transformers models, AdamW, nothing of this library. And what lets the
library's own step run in this process."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from openrl_reason.core.batch import unsplit_tokens


@dataclass
class Settings:
    level: str = "token"
    beta: float = 0.3
    kl_kind: str = "exact"
    kl_coef: float = 0.1
    padding: str = "right"
    lr: float = 0.003
    ema_decay: float = 0.0
    importance: bool = False


class StraightLine:
    """Policy, reference and critic from one folder; ``step`` is one optimiser step of both, on padded rows of token ids and masks."""

    def __init__(self, path, settings):
        torch.manual_seed(0)
        self.settings = settings
        self.policy, self.reference = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for _ in range(2))
        self.average = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.critic = AutoModelForTokenClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)
        self.critic.dropout.p = 0.0
        torch.nn.init.zeros_(self.critic.score.weight), torch.nn.init.zeros_(self.critic.score.bias)
        self.policy.train(), self.critic.train()
        # Norms and biases are not decayed, and nothing is here: weight_decay is 0 in these tests.
        self.optimizers = [
            torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0) for model in (self.policy, self.critic)
        ]

    def pad(self, rows, fill):
        width = max(len(row) for row in rows)
        pads = [[fill] * (width - len(row)) for row in rows]
        padded = [[*pad, *row] if self.settings.padding == "left" else [*row, *pad] for row, pad in zip(rows, pads, strict=True)]
        return torch.tensor(padded)

    def step(self, ids, actions, states, rewards):
        s = self.settings
        present = self.pad([[1] * len(row) for row in ids], 0)
        ids, actions, states = self.pad(ids, 0), self.pad(actions, 0)[:, 1:].float(), self.pad(states, 0)[:, 1:].float()
        position_ids = (present.cumsum(1) - 1).clamp(min=0)
        inputs = dict(input_ids=ids, attention_mask=present, position_ids=position_ids)
        R = torch.tensor(rewards)[:, None]

        def full(model):
            return model(**inputs).logits.log_softmax(-1)[:, :-1]

        def chosen(distribution):
            return distribution.gather(2, ids[:, 1:, None]).squeeze(2)

        def tail(x):
            return x.flip(1).cumsum(1).flip(1)

        def mean(x, mask):
            return (torch.where(mask > 0, x, 0.0).sum(1) / mask.sum(1).clamp(min=1)).mean()

        with torch.no_grad():
            target = self.average if s.ema_decay else self.policy
            old, full_ref = chosen(full(target)), full(self.reference)
        ref = chosen(full_ref)
        V = self.critic(**inputs).logits.squeeze(-1)[:, :-1]
        values = V.detach()

        def weight(logprobs):
            ratio = ((logprobs.detach() - ref) * actions).sum(1, keepdim=True)
            return ratio.clamp(max=1).exp() if s.importance else 1.0

        value_loss = mean(weight(old) * (s.beta * tail((old - ref) * actions) + V - R) ** 2, states)
        distribution = full(self.policy)
        ratio = (chosen(distribution) - ref) * actions
        L, used = tail(ratio), states
        if s.level == "token":
            U = (L - ratio).detach() + ratio
        elif s.level == "step":
            U = torch.zeros_like(L)
            for b in range(len(L)):
                places = states[b].nonzero().flatten().tolist()
                for place, after in zip(places, [*places[1:], None], strict=True):
                    rest = L[b, after] if after is not None else torch.zeros(())
                    U[b, place] = L[b, place] - rest + rest.detach()
        elif s.level == "response":
            U, used = L, torch.zeros_like(states)
            used[torch.arange(len(L)), states.argmax(1)] = 1
        else:
            U = L
        policy_loss = mean(weight(chosen(distribution)) * (s.beta * U + values - R) ** 2, used)
        if s.kl_kind == "k3":
            kl = (ref - chosen(distribution)).exp() + chosen(distribution) - ref - 1
        else:
            left, right = (distribution, full_ref) if s.kl_kind == "exact" else (full_ref, distribution)
            kl = (left.exp() * (left - right)).sum(-1)
        kl = mean(kl, actions)
        losses = (policy_loss + s.kl_coef * kl, value_loss)
        for model, optimizer, loss in zip((self.policy, self.critic), self.optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        if s.ema_decay:
            with torch.no_grad():
                for slow, fast in zip(self.average.parameters(), self.policy.parameters(), strict=True):
                    slow.lerp_(fast, 1 - s.ema_decay)
        return {"train/policy_loss": policy_loss.item(), "train/kl": kl.item(), "critic/value_loss": value_loss.item()}


class LocalGroup:
    """The part of a model group's interface that an offline trainer uses, around one rank in this process. ``cut``: sequences a micro-batch."""

    def __init__(self, worker, cut=None):
        self.worker, self.cut = worker, cut

    def __getattr__(self, name):
        return getattr(self.worker, name)

    def logprobs(self, batch, temperature=1.0, with_entropy=False, **options):
        return self.worker.logprobs([batch], temperature, with_entropy, **options)[0]

    def logprobs_async(self, *args, **options):
        found = self.logprobs(*args, **options)
        return SimpleNamespace(result=lambda: found)

    def values(self, batch, units=None, **options):
        return self.worker.values([batch], **options)[0]["values"]

    def rounds(self, batch):
        return [(cut, [len(cut)]) for cut in self.cuts(batch)]

    def cuts(self, batch):
        places = list(range(batch.num_sequences))
        cuts = [places[first : first + self.cut] for first in range(0, len(places), self.cut)] if self.cut else [places]
        return [[place for place in reversed(cut)] for cut in cuts]

    def values_async(self, batch):
        found = {"values": self.values(batch)}
        return SimpleNamespace(result=lambda: found)

    def update(self, *args, **options):
        return self.update_keeping(*args, **options)[0]

    def update_keeping(self, batch, loss_fn, denominators, temperature=1.0, with_entropy=False, keep=(), units=None, last=True):
        cuts = self.cuts(batch) if units is None else [list(range(batch.num_sequences))]
        metrics, kept = self.worker.update_keeping(batch.split(cuts), loss_fn, denominators, temperature, with_entropy, keep, last)
        return metrics, {name: unsplit_tokens([piece[name] for piece in kept], cuts, batch) for name in keep}


class MemoryStore:
    """A token store of given trajectories."""

    kind, identity = "responses", "memory"

    def __init__(self, trajectories):
        self._trajectories = trajectories
        self.lengths = np.array([t.num_tokens for t in trajectories])
        self.rewards = np.array([t.reward for t in trajectories])
        self.labels, self.has_reward = self.rewards > 0, np.ones(len(trajectories), bool)
        self.questions = np.arange(len(trajectories), dtype=np.uint64)

    def __len__(self):
        return len(self._trajectories)

    def trajectories(self, rows):
        return [self._trajectories[row] for row in rows]
