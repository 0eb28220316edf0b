"""Where states stand in a sequence: before which tokens a value is asked for, at the level of tokens, steps or whole responses."""

from __future__ import annotations

import torch
from torch import Tensor

from openrl_reason.core.batch import TokenBatch
from openrl_reason.core.segments import segment_ids
from openrl_reason.core.trajectory import Trajectory

STATE_LEVELS = ("token", "step", "response")


def state_mask(source: TokenBatch | Trajectory, level: str) -> Tensor:
    """bool [N]: true where a state stands before the token, N tokens of a batch or of one trajectory.

    "token": before every action token; "step": before the first token of each step (an agent's turn, for instance) that owns tokens;
    "response": before the first action token of each sequence. A sequence without actions has no state.

    Entry t is the state *before* token t, as everywhere here. OREO's published masks (arXiv 2412.16145) mark the token that ends the state
    instead: theirs at t - 1 is this one at t. Raises ``ValueError`` for an unknown level.
    """
    if level not in STATE_LEVELS:
        raise ValueError(f"unknown level {level!r}; known: {', '.join(STATE_LEVELS)}")
    if isinstance(source, Trajectory):
        action_mask, step_ids = torch.from_numpy(source.action_mask), torch.from_numpy(source.step_ids)
        cu_seqlens = torch.tensor([0, source.num_tokens])
    else:
        action_mask, step_ids, cu_seqlens = source.action_mask, source.step_ids, source.cu_seqlens
    if level == "token":
        return action_mask.clone()
    places = action_mask.nonzero().squeeze(1)
    owners = segment_ids(cu_seqlens)[places]
    # Compared with the action token before, not with the token before: what stands between two actions of a step is no new state.
    begins = torch.ones_like(places, dtype=torch.bool)
    begins[1:] = owners[1:] != owners[:-1]
    if level == "step":
        steps = step_ids[places]
        begins[1:] |= steps[1:] != steps[:-1]
    mask = torch.zeros_like(action_mask)
    mask[places[begins]] = True
    return mask
