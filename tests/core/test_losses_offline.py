"""OREO and implicit process rewards: closed forms, the published fixed point, gradient identities."""

import functools
import itertools
import math

import pytest
import torch

from openrl_reason.core.losses import implicit_process_rewards, oreo_policy_loss, oreo_value_loss
from openrl_reason.core.losses_offline import OREO_LEVELS, first_states, hinge_loss, importance_weights, step_offsets

# --- OREO -------------------------------------------------------------------------------------------------------------------------------


def random_oreo(lengths=(4, 9, 2, 6), seed=0):
    """Prompts, observations in mid-sequence, states before some of the actions."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    action_mask = torch.rand(total, generator=generator) < 0.7
    action_mask[cu_seqlens[:-1]] = False
    states = action_mask & (torch.rand(total, generator=generator) < 0.6)
    for start, end in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True):  # the first action of every sequence has a state
        if action_mask[start:end].any():
            states[start + int(action_mask[start:end].int().argmax())] = True
    logprobs, ref_logprobs, values = (torch.randn(total, generator=generator, dtype=torch.float64) for _ in range(3))
    rewards = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    return dict(logprobs=logprobs, ref_logprobs=ref_logprobs, values=values, rewards_B=rewards, action_mask=action_mask, state_mask=states,
                cu_seqlens=cu_seqlens)  # fmt: skip


def naive_oreo(inputs, beta, level):
    """The definition with explicit loops; differentiable. ``level`` None is the critic's loss."""
    edges, total = inputs["cu_seqlens"].tolist(), 0.0
    for b, (start, end) in enumerate(zip(edges, edges[1:], strict=False)):
        actions = [t for t in range(start, end) if inputs["action_mask"][t]]
        states = [t for t in range(start, end) if inputs["state_mask"][t]]
        ratio = {t: inputs["logprobs"][t] - inputs["ref_logprobs"][t] for t in actions}
        used = states[:1] if level == "response" else states
        for position, t in enumerate(used):
            following = states[position + 1] if position + 1 < len(states) else end
            if level == "one_step":
                own = sum(ratio[i] for i in actions if t <= i < following)
                after = inputs["values"][following].detach() if following < end else inputs["rewards_B"][b]
                total = total + (inputs["values"][t].detach() - after + beta * own) ** 2 / len(used)
                continue
            reach = {"token": t + 1, "step": following, "response": end, "no_stop_gradient": end, None: t}[level]
            tail = sum((ratio[i] if i < reach else ratio[i].detach()) for i in actions if i >= t)
            value = inputs["values"][t] if level is None else inputs["values"][t].detach()
            total = total + (value - inputs["rewards_B"][b] + beta * tail) ** 2 / len(used)
    return total / (len(edges) - 1)


@pytest.mark.parametrize("level", [*OREO_LEVELS, None])
@pytest.mark.parametrize("seed", range(5))
def test_oreo_losses_and_gradients_equal_the_definition_written_as_loops(level, seed):
    results = []
    for implementation in ("ours", "naive"):
        inputs = random_oreo(seed=seed)
        inputs["logprobs"].requires_grad_(), inputs["values"].requires_grad_()
        if implementation == "naive":
            loss = naive_oreo(inputs, 0.3, level)
        elif level is None:
            loss = oreo_value_loss(**inputs, beta=0.3)[0]
        else:
            loss = oreo_policy_loss(**inputs, beta=0.3, level=level)[0]
        results.append((loss.detach(), *torch.autograd.grad(loss, [inputs["logprobs"], inputs["values"]], allow_unused=True)))
    (loss, *gradients), (naive_loss, *naive_gradients) = results
    torch.testing.assert_close(loss, naive_loss)
    active = 1 if level is None else 0
    torch.testing.assert_close(gradients[active], naive_gradients[active])
    assert gradients[1 - active] is None or not gradients[1 - active].any()


@pytest.mark.parametrize("level", [*OREO_LEVELS, None])
def test_rewards_of_steps_count_from_the_state_on(level):
    """Returns that are the whole reward at every token change nothing; a reward paid before a state is no part of that state's return."""
    inputs = random_oreo(seed=4)
    run = oreo_value_loss if level is None else functools.partial(oreo_policy_loss, level=level)
    everywhere = torch.cat([r.expand(n) for r, n in zip(inputs["rewards_B"], inputs["cu_seqlens"].diff().tolist(), strict=True)])
    torch.testing.assert_close(run(**inputs, beta=0.3, returns=everywhere), run(**inputs, beta=0.3))
    falling = everywhere - torch.arange(len(everywhere)) * 0.1
    shifted = inputs | {"values": inputs["values"] + falling - everywhere}
    torch.testing.assert_close(run(**shifted, beta=0.3, returns=falling)[0], run(**inputs, beta=0.3)[0])


@pytest.mark.parametrize("level", [*OREO_LEVELS, None])
def test_weights_of_sequences_and_the_average_over_states(level):
    inputs, weights = random_oreo(seed=5), torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=torch.float64)
    run = oreo_value_loss if level is None else functools.partial(oreo_policy_loss, level=level)
    alone = []
    for b, (first, last) in enumerate(itertools.pairwise(inputs["cu_seqlens"].tolist())):
        piece = {name: tensor[first:last] for name, tensor in inputs.items() if name not in ("cu_seqlens", "rewards_B")}
        piece |= dict(cu_seqlens=torch.tensor([0, last - first]), rewards_B=inputs["rewards_B"][b : b + 1])
        states = first_states(piece["state_mask"], piece["cu_seqlens"]) if level == "response" else piece["state_mask"]
        alone.append((run(**piece, beta=0.3)[0], int(states.sum())))
    expected = sum(weight * loss for weight, (loss, _) in zip(weights, alone, strict=True)) / 4
    torch.testing.assert_close(run(**inputs, beta=0.3, sequence_weights=weights)[0], expected)
    expected = sum(loss * count for loss, count in alone) / sum(count for _, count in alone)
    torch.testing.assert_close(run(**inputs, beta=0.3, average="state")[0], expected)


def test_importance_weights_and_the_clip_of_log_ratios_by_hand():
    cu_seqlens, mask = torch.tensor([0, 3, 5]), torch.tensor([False, True, True, False, True])
    logprobs, ref_logprobs = torch.tensor([9.0, -1.0, -2.0, 9.0, -1.0]), torch.tensor([0.0, -2.0, -4.0, 0.0, -0.5])
    assert importance_weights(logprobs, ref_logprobs, mask, cu_seqlens).tolist() == pytest.approx([math.e, math.exp(-0.5)])
    values = torch.zeros(5)
    loss, metrics = oreo_value_loss(values, logprobs, ref_logprobs, torch.zeros(2), mask, mask, cu_seqlens, beta=1.0, clip_log_ratio=2.5)
    assert float(loss) == pytest.approx(((2.5**2 + 2.0**2) / 2 + 0.25) / 2)
    assert float(metrics["oreo_value/clipped"]) == pytest.approx(0.25)


def test_the_hinge_pulls_right_responses_up_to_the_reference_and_no_further():
    inputs = random_oreo(seed=6)
    inputs["logprobs"].requires_grad_()
    positive = torch.tensor([True, False, True, True])
    keys = ("logprobs", "ref_logprobs", "action_mask", "state_mask", "cu_seqlens")
    loss, _ = hinge_loss(*(inputs[key] for key in keys), positive)
    tails = []
    for b, (first, last) in enumerate(itertools.pairwise(inputs["cu_seqlens"].tolist())):
        if positive[b] and inputs["state_mask"][first:last].any():
            ratio = torch.where(inputs["action_mask"], inputs["logprobs"] - inputs["ref_logprobs"], 0.0)[first:last]
            tails.append((-ratio[int(inputs["state_mask"][first:last].int().argmax()) :].sum()).clamp(min=0))
    torch.testing.assert_close(loss, sum(tails) / 3)
    assert loss > 0


def residuals(inputs, beta):
    ratio = torch.where(inputs["action_mask"], inputs["logprobs"] - inputs["ref_logprobs"], 0.0).detach()
    rows = []
    for b, (start, end) in enumerate(itertools.pairwise(inputs["cu_seqlens"].tolist())):
        rows.append(inputs["values"][start:end].detach() - inputs["rewards_B"][b] + beta * ratio[start:end].flip(0).cumsum(0).flip(0))
    return torch.cat(rows)


def token_level_inputs(seed=1):
    inputs = random_oreo(seed=seed)
    inputs["state_mask"] = inputs["action_mask"].clone()
    inputs["logprobs"].requires_grad_()
    return inputs


def test_the_token_level_gradient_is_twice_beta_delta_over_states_and_sequences():
    inputs = token_level_inputs()
    oreo_policy_loss(**inputs, beta=0.3, level="token")[0].backward()
    counts = torch.cat([m.sum().expand(len(m)) for m in inputs["state_mask"].split(inputs["cu_seqlens"].diff().tolist())]).clamp(min=1)
    expected = torch.where(inputs["state_mask"], 2 * 0.3 * residuals(inputs, 0.3) / (counts * 4), 0.0)
    torch.testing.assert_close(inputs["logprobs"].grad, expected)


def test_without_the_stop_gradient_it_is_the_cumulative_sum_of_that():
    inputs = token_level_inputs()
    token_gradient = torch.autograd.grad(oreo_policy_loss(**inputs, beta=0.3, level="token")[0], inputs["logprobs"])[0]
    gradient = torch.autograd.grad(oreo_policy_loss(**inputs, beta=0.3, level="no_stop_gradient")[0], inputs["logprobs"])[0]
    parts = [part.cumsum(0) for part in token_gradient.split(inputs["cu_seqlens"].diff().tolist())]
    torch.testing.assert_close(gradient, torch.where(inputs["action_mask"], torch.cat(parts), 0.0))


def test_steps_of_one_token_are_the_token_level():
    inputs = token_level_inputs()
    inputs["state_mask"] = inputs["action_mask"]
    losses = [oreo_policy_loss(**inputs, beta=0.3, level=level)[0] for level in ("token", "step")]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, inputs["logprobs"])[0] for loss in losses))


@pytest.mark.parametrize("level", [*OREO_LEVELS, None])
def test_oreo_pieces_add_up_and_hidden_nans_reach_nothing(level):
    def run(inputs, denominator):
        if level is None:
            return oreo_value_loss(**inputs, beta=0.3, denominator=denominator)
        return oreo_policy_loss(**inputs, beta=0.3, level=level, denominator=denominator)

    inputs = random_oreo(seed=2)
    whole, whole_metrics = run(inputs, None)
    edges, pieces = inputs["cu_seqlens"].tolist(), []
    for first, last in [(0, 1), (1, 4)]:
        piece = {name: tensor[edges[first] : edges[last]] for name, tensor in inputs.items() if name not in ("cu_seqlens", "rewards_B")}
        piece |= dict(cu_seqlens=inputs["cu_seqlens"][first : last + 1] - edges[first], rewards_B=inputs["rewards_B"][first:last])
        pieces.append(run(piece, 4))
    torch.testing.assert_close(sum(loss for loss, _ in pieces), whole)
    for key in whole_metrics:
        torch.testing.assert_close(sum(metrics[key] for _, metrics in pieces), whole_metrics[key])
    dirty = dict(inputs)
    for name, mask in (("logprobs", "action_mask"), ("ref_logprobs", "action_mask"), ("values", "state_mask")):
        dirty[name] = torch.where(inputs[mask], inputs[name], torch.nan)
    dirty["logprobs"], dirty["values"] = dirty["logprobs"].requires_grad_(), dirty["values"].requires_grad_()
    loss, _ = run(dirty, None)
    torch.testing.assert_close(loss.detach(), whole)
    loss.backward()
    assert all(dirty[name].grad is None or dirty[name].grad.isfinite().all() for name in ("logprobs", "values"))


@pytest.mark.parametrize("level", [*OREO_LEVELS, None])
def test_a_sequence_without_states_contributes_nothing_and_no_nan(level):
    inputs = random_oreo(seed=3)
    inputs["state_mask"] = torch.zeros_like(inputs["state_mask"])
    inputs["values"].requires_grad_(), inputs["logprobs"].requires_grad_()
    loss, _ = oreo_value_loss(**inputs, beta=0.3) if level is None else oreo_policy_loss(**inputs, beta=0.3, level=level)
    assert loss == 0
    loss.backward()


def test_an_unknown_oreo_level_is_refused():
    with pytest.raises(ValueError, match="token, step, response, no_stop_gradient"):
        oreo_policy_loss(**random_oreo(), beta=0.3, level="word")


def tree_batch(policy_logits, values_of_prefix):
    """All four paths of the binary tree of depth two; the reference is uniform, only the path (1, 1) is rewarded. Each sequence is a prompt
    token and two actions; ``policy_logits`` and ``values_of_prefix`` hold a row per prefix: (), (0), (1)."""
    logprobs, values = [], []
    policy = policy_logits.log_softmax(-1)
    zero = torch.zeros((), dtype=torch.float64)
    for first, second in itertools.product((0, 1), repeat=2):
        logprobs += [zero, policy[0, first], policy[1 + first, second]]
        values += [zero, values_of_prefix[0], values_of_prefix[1 + first]]
    mask = torch.tensor([False, True, True] * 4)
    return dict(
        logprobs=torch.stack(logprobs), ref_logprobs=torch.full((12,), math.log(0.5), dtype=torch.float64), values=torch.stack(values),
        rewards_B=torch.tensor([0.0, 0, 0, 1], dtype=torch.float64), action_mask=mask, state_mask=mask, cu_seqlens=torch.arange(0, 13, 3),
    )  # fmt: skip


GOLDEN_VALUES = [0.614614, 0.0, 0.802572]
GOLDEN_POLICY = [0.935550, 0.5, 0.965555]  # probability of action 1 after (), (0), (1)


@pytest.mark.parametrize("level", [*OREO_LEVELS, None])
def test_at_the_published_fixed_point_of_the_tree_every_oreo_loss_is_zero(level):
    chances = torch.tensor(GOLDEN_POLICY, dtype=torch.float64)
    batch = tree_batch(torch.stack([1 - chances, chances], -1).log(), torch.tensor(GOLDEN_VALUES, dtype=torch.float64))
    loss, _ = oreo_value_loss(**batch, beta=0.3) if level is None else oreo_policy_loss(**batch, beta=0.3, level=level)
    assert float(loss) < 1e-10


@pytest.mark.parametrize("level", OREO_LEVELS)
def test_training_from_zero_converges_to_the_published_fixed_point(level):
    logits = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    values = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits, values], lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=500)
    for _ in range(500):
        batch = tree_batch(logits, values)
        policy, _ = oreo_policy_loss(**batch, beta=0.3, level=level)
        critic, _ = oreo_value_loss(**batch, beta=0.3)
        optimizer.zero_grad()
        (policy + critic).backward()
        optimizer.step(), schedule.step()
    assert values.tolist() == pytest.approx(GOLDEN_VALUES, abs=2e-4)
    assert logits.softmax(-1)[:, 1].tolist() == pytest.approx(GOLDEN_POLICY, abs=2e-4)


# --- implicit process rewards -----------------------------------------------------------------------------------------------------------


def test_implicit_rewards_are_the_sums_over_steps_and_telescope():
    logprobs = torch.tensor([9.0, 1, 2, 4, 9, 8, 9, 5], dtype=torch.float64)
    ref_logprobs = torch.tensor([torch.nan, 0.5, 0, 0, torch.nan, 0, torch.nan, 1], dtype=torch.float64)
    step_ids = torch.tensor([-1, 0, 0, 2, -1, 3, -1, 0])
    cu_seqlens = torch.tensor([0, 6, 8])
    rewards = implicit_process_rewards(logprobs, ref_logprobs, step_ids, cu_seqlens, beta=0.5)
    assert rewards.tolist() == [1.25, 0.0, 2.0, 4.0, 2.0]  # step 1 has no token
    offsets = step_offsets(step_ids, cu_seqlens)
    assert offsets.tolist() == [0, 4, 5]
    chosen = step_ids >= 0
    assert float(rewards.sum()) == pytest.approx(0.5 * float((logprobs - ref_logprobs)[chosen].sum()))


def test_implicit_rewards_vanish_at_the_reference_and_carry_gradient():
    logprobs = torch.randn(6, requires_grad=True)
    step_ids = torch.tensor([-1, 0, 1, -1, -1, 0])
    rewards = implicit_process_rewards(logprobs, logprobs.detach(), step_ids, torch.tensor([0, 3, 3, 6]), beta=0.1)
    assert not rewards.detach().any() and rewards.shape == (3,)
    rewards.sum().backward()
    torch.testing.assert_close(logprobs.grad, 0.1 * (step_ids >= 0).float())
