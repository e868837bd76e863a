"""The symmetric losses against brute force over all actions, their gradients against autograd.

The other scripts have the same text, which `test_repository.py` guards."""

import itertools

import pytest
import torch
from torch.testing import assert_close

import sa2c_continuous
import sppo_continuous

CLIP = 0.2
Z = -4.0


def random_batch():
    """Logits (256, 3, 4) of three dimensions, an older policy's, joint actions and advantages."""
    torch.manual_seed(3)
    old_logits = torch.randn(256, 3, 4, dtype=torch.float64)
    logits = old_logits + 0.2 * torch.randn_like(old_logits)
    action = torch.randint(4, (256, 3))
    advantage = torch.randn(256, dtype=torch.float64)
    return logits.requires_grad_(), old_logits, action, advantage


def log_prob_of(action, logits):
    return logits.log_softmax(-1).gather(-1, action.unsqueeze(-1)).squeeze(-1).sum(-1)


def probability_of_all_others(action, logits):
    """1 - p (256,), as the sum over all joint actions but the one taken."""
    total = torch.zeros(256, dtype=logits.dtype)
    for joint in itertools.product(range(4), repeat=3):
        other = torch.tensor(joint).expand(256, 3)
        p = log_prob_of(other, logits).exp()
        total = total + torch.where((other == action).all(-1), 0.0, p)
    return total


def test_sppo_losses_are_those_of_the_paper():
    """L by its formula, Lr by the gradient of its formula, and its value without 1 / p_old."""
    logits, old_logits, action, advantage = random_batch()
    log_prob = log_prob_of(action, logits)
    old_log_prob = log_prob_of(action, old_logits)
    loss, reverse_loss = sppo_continuous.symmetric_policy_losses(
        log_prob, old_log_prob, advantage, CLIP, Z
    )

    ratio = (log_prob - old_log_prob).exp()
    too_high = (ratio > 1 + CLIP) & (advantage > 0)
    too_low = (ratio < 1 - CLIP) & (advantage < 0)
    m = ~(too_high | too_low)
    assert too_high.any()
    assert too_low.any()
    surrogates = torch.minimum(advantage * ratio, advantage * ratio.clamp(1 - CLIP, 1 + CLIP))
    assert_close(loss, -surrogates.mean())
    assert_close(reverse_loss, (m * Z * advantage * ratio).mean())

    others = probability_of_all_others(action, logits)
    reverse_of_paper = -(m * advantage * Z * others / old_log_prob.exp()).mean()
    (expected,) = torch.autograd.grad(reverse_of_paper, logits, retain_graph=True)
    (gradient,) = torch.autograd.grad(reverse_loss, logits)
    assert_close(gradient, expected, rtol=1e-9, atol=1e-15)
    assert gradient.abs().max() > 1e-4


@pytest.mark.parametrize("bound", [0.8, 1.2])
def test_a_ratio_near_the_bound_has_its_whole_gradient_or_none(bound):
    """With a minimum it would have half where the two products, which are rounded, are equal."""
    torch.manual_seed(0)
    neighbours = torch.tensor(bound).log() + 1e-7 * torch.arange(-4, 5)
    log_prob = neighbours.repeat(1000).requires_grad_()
    advantage = torch.randn(9000)
    losses = sppo_continuous.symmetric_policy_losses(
        log_prob, torch.zeros(9000), advantage, CLIP, -1.0
    )
    whole = -advantage * log_prob.detach().exp()
    for loss in losses:
        (gradient,) = torch.autograd.grad(9000 * loss, log_prob, retain_graph=True)
        share = (gradient / whole).round(decimals=5)
        assert set(share.abs().tolist()) == {0, 1}


def test_sa2c_losses_are_sums_over_all_joint_actions():
    logits, _, action, advantage = random_batch()
    log_prob = log_prob_of(action, logits)
    loss, reverse_loss = sa2c_continuous.symmetric_policy_losses(log_prob, advantage, Z)
    others = probability_of_all_others(action, logits)
    assert_close(loss, -(advantage * log_prob).sum() / 256)
    assert_close(reverse_loss, -(advantage * Z * others).sum() / 256)
