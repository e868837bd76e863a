"""The symmetric losses against brute force; their gradients against closed forms."""

import itertools

import pytest
import torch

from sa2c_continuous import symmetric_policy_loss as symmetric_a2c_loss
from sppo_continuous import symmetric_policy_loss

CLIP = 0.2


def joint_log_probs(logits):
    """All joint actions and their log-probabilities, sums over dimensions; logits (dims, bins)."""
    per_dim = torch.log_softmax(logits, -1)
    choices = list(itertools.product(range(logits.shape[1]), repeat=logits.shape[0]))
    return choices, torch.stack(
        [sum(per_dim[d, a] for d, a in enumerate(choice)) for choice in choices]
    )


@pytest.mark.parametrize("divide_by_p_old", [True, False])
@pytest.mark.parametrize("z", [-1.0, -4.0])
@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.0, 1.1, 1.6])
@pytest.mark.parametrize("advantage", [1.7, -0.6])
def test_loss_is_the_sum_over_all_other_joint_actions(advantage, ratio, z, divide_by_p_old):
    torch.manual_seed(0)
    logits = torch.randn(3, 4, dtype=torch.float64)
    choices, log_p = joint_log_probs(logits)
    p = log_p.exp()
    assert len(choices) == 64
    assert p.sum().item() == pytest.approx(1)
    for taken in (0, 21, 63):
        p_old = p[taken] / ratio
        # 1 - p, not by subtraction
        others = sum(p[other] for other in range(len(choices)) if other != taken)
        clipped = min(max(ratio, 1 - CLIP), 1 + CLIP)
        ppo = -min(advantage * ratio, advantage * clipped)
        gradient_flows = 1 - CLIP <= ratio <= 1 + CLIP or advantage * ratio <= advantage * clipped
        reverse = -advantage * z * others if gradient_flows else 0.0
        if divide_by_p_old:
            reverse = reverse / p_old
        for alpha, beta in ((1.0, 0.0), (0.5, 20.0), (0.0, 1.0)):
            arguments = (
                log_p[taken, None],
                p_old.log()[None],
                torch.tensor([advantage], dtype=torch.float64),
            )
            loss = symmetric_policy_loss(*arguments, CLIP, alpha, beta, z, divide_by_p_old)
            torch.testing.assert_close(
                loss.item(), float(alpha * ppo + beta * reverse), rtol=1e-9, atol=0
            )


def test_worked_numbers():
    """p = 0.3, p_old = 0.25, A = 2: r = 1.2, L = -2.4; with Z = -1, Lr = 2 * 0.7 / 0.25 = 5.6."""
    log_prob, old = (
        torch.tensor([0.3], dtype=torch.float64).log(),
        torch.tensor([0.25], dtype=torch.float64).log(),
    )
    advantage = torch.tensor([2.0], dtype=torch.float64)
    assert symmetric_policy_loss(log_prob, old, advantage, 0.3, 1, 0, -1).item() == pytest.approx(
        -2.4
    )
    assert symmetric_policy_loss(log_prob, old, advantage, 0.3, 0, 1, -1).item() == pytest.approx(
        5.6
    )
    assert symmetric_policy_loss(
        log_prob, old, advantage, 0.3, 0.5, 20, -1
    ).item() == pytest.approx(110.8)


def test_worked_numbers_without_dividing_by_p_old():
    """p = 0.3, p_old = 0.25, A = 2, Z = -1: Lr = 2 * 0.7 = 1.4."""
    log_prob = torch.tensor([0.3], dtype=torch.float64).log()
    old = torch.tensor([0.25], dtype=torch.float64).log()
    advantage = torch.tensor([2.0], dtype=torch.float64)
    for weights, expected in (((1, 0), -2.4), ((0, 1), 1.4), ((0.5, 20), 26.8)):
        loss = symmetric_policy_loss(log_prob, old, advantage, 0.3, *weights, -1, False)
        assert loss.item() == pytest.approx(expected)


def policy_gradient(logits, old_logits, action, advantage, alpha, beta, z):
    logits = logits.clone().requires_grad_()
    log_prob, old_log_prob = (
        x.log_softmax(-1).gather(-1, action.unsqueeze(-1)).squeeze(-1).sum(-1)
        for x in (logits, old_logits)
    )
    symmetric_policy_loss(log_prob, old_log_prob, advantage, CLIP, alpha, beta, z).backward()
    return logits.grad


@pytest.mark.parametrize("dims", [1, 3, 17])
@pytest.mark.parametrize(
    ("alpha", "beta", "z"), [(0.5, 20.0, -1.0), (0.5, 1.0, -4.0), (0.0, 3.0, -2.0)]
)
def test_gradient_is_a_multiple_of_ppos(dims, alpha, beta, z):
    torch.manual_seed(dims)
    old_logits = torch.randn(256, dims, 11, dtype=torch.float64)
    logits = old_logits + 0.2 * torch.randn_like(old_logits)
    action, advantage = torch.randint(11, (256, dims)), torch.randn(256, dtype=torch.float64)
    symmetric = policy_gradient(logits, old_logits, action, advantage, alpha, beta, z)
    ppo = policy_gradient(logits, old_logits, action, advantage, 1.0, 0.0, z)
    k = alpha + beta * abs(z)
    assert ppo.abs().max() > 1e-4
    # relative to the scale of the loss: 1e-12 of k, in float64
    torch.testing.assert_close(symmetric / k, ppo, rtol=0, atol=1e-12)


def test_gradient_is_finite_where_the_loss_is_not():
    """Below log p_old = -88, 1 / p_old is infinite in float32; the gradient must not care."""
    log_prob = torch.tensor([-120.1, -99.8], requires_grad=True)
    arguments = torch.tensor([-120.0, -100.0]), torch.tensor([1.0, -2.0]), CLIP
    (symmetric,) = torch.autograd.grad(
        symmetric_policy_loss(log_prob, *arguments, 0.5, 20.0, -1.0), log_prob
    )
    (ppo,) = torch.autograd.grad(
        symmetric_policy_loss(log_prob, *arguments, 1.0, 0.0, -1.0), log_prob
    )
    torch.testing.assert_close(symmetric, 20.5 * ppo)
    assert ppo.abs().min() > 0


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    ("alpha", "beta", "z"), [(0.5, 20.0, -1.0), (0.5, 1.0, -4.0), (0.0, 3.0, -2.0)]
)
def test_gradient_without_dividing_by_p_old_is_the_closed_form(dims, alpha, beta, z):
    """-(alpha + beta |z| p_old) r A grad log p where m is 1, else 0."""
    torch.manual_seed(dims)
    old_log_prob = torch.randn(256, dims, 11, dtype=torch.float64).log_softmax(-1)[:, :, 0].sum(-1)
    log_prob = (old_log_prob + 0.3 * torch.randn(256, dtype=torch.float64)).requires_grad_()
    advantage = torch.randn(256, dtype=torch.float64)
    loss = symmetric_policy_loss(log_prob, old_log_prob, advantage, CLIP, alpha, beta, z, False)
    (gradient,) = torch.autograd.grad(loss, log_prob)  # the factor of grad log p
    ratio = (log_prob - old_log_prob).exp().detach()
    too_high = (ratio > 1 + CLIP) & (advantage > 0)
    too_low = (ratio < 1 - CLIP) & (advantage < 0)
    m = ~(too_high | too_low)
    assert 0 < m.sum() < 256
    weight = m * (alpha + beta * abs(z) * old_log_prob.exp())
    expected = -weight * ratio * advantage / 256
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=0)


def test_without_dividing_by_p_old_nothing_is_infinite():
    """In 17 dimensions of 11 bins, even where log p_old is below -88, and in float32."""
    torch.manual_seed(0)
    old_log_probs = (10 * torch.randn(256, 17, 11)).log_softmax(-1)
    old_log_prob = old_log_probs[:, :, 0].sum(-1)
    assert old_log_prob.min() < -200
    log_prob = (old_log_prob + 0.1 * torch.randn(256)).requires_grad_()
    advantage = torch.randn(256)
    loss = symmetric_policy_loss(log_prob, old_log_prob, advantage, CLIP, 0.5, 20.0, -1.0, False)
    (gradient,) = torch.autograd.grad(loss, log_prob)
    assert abs(loss.item()) < 100
    assert gradient.isfinite().all()
    divided = symmetric_policy_loss(log_prob, old_log_prob, advantage, CLIP, 0.5, 20.0, -1.0)
    assert (
        not divided.isfinite()
    )  # while the paper's reverse loss overflows, though not its gradient


# ---- A2C


@pytest.mark.parametrize("z", [-1.0, -4.0])
@pytest.mark.parametrize("advantage", [1.7, -0.6])
def test_a2c_loss_is_the_sum_over_all_other_joint_actions(advantage, z):
    torch.manual_seed(0)
    _, log_p = joint_log_probs(torch.randn(3, 4, dtype=torch.float64))
    p = log_p.exp()
    for taken in (0, 21, 63):
        others = sum(p[other] for other in range(64) if other != taken)
        a2c, reverse = -advantage * log_p[taken], -advantage * z * others
        for alpha, beta in ((1.0, 0.0), (0.5, 20.0), (0.0, 1.0)):
            arguments = log_p[taken, None], torch.tensor([advantage], dtype=torch.float64)
            loss = symmetric_a2c_loss(*arguments, alpha, beta, z)
            torch.testing.assert_close(
                loss.item(), float(alpha * a2c + beta * reverse), rtol=1e-9, atol=0
            )


def test_a2c_worked_numbers():
    """p = 0.3, A = 2: L = -2 log 0.3 = 2.408; with Z = -1, Lr = 2 * 0.7 = 1.4."""
    log_prob, advantage = torch.tensor([0.3]).log(), torch.tensor([2.0])
    assert symmetric_a2c_loss(log_prob, advantage, 1, 0, -1).item() == pytest.approx(
        2.4079, abs=1e-4
    )
    assert symmetric_a2c_loss(log_prob, advantage, 0, 1, -1).item() == pytest.approx(1.4)
    assert symmetric_a2c_loss(log_prob, advantage, 0.5, 20, -1).item() == pytest.approx(
        29.204, abs=1e-3
    )


@pytest.mark.parametrize("dims", [1, 2, 3, 6])
@pytest.mark.parametrize(
    ("alpha", "beta", "z"), [(1, 0, -1), (0.5, 20, -1), (0.5, 1, -4), (0, 3, -2)]
)
def test_a2c_gradient_is_the_closed_form(dims, alpha, beta, z):
    """-A (alpha + beta |Z| p) grad log p; in logits grad log p is one-hot(action) - softmax."""
    torch.manual_seed(dims)
    logits = (2 * torch.randn(256, dims, 11, dtype=torch.float64)).requires_grad_()
    action, advantage = torch.randint(11, (256, dims)), torch.randn(256, dtype=torch.float64)
    log_prob = logits.log_softmax(-1).gather(-1, action.unsqueeze(-1)).squeeze(-1).sum(-1)
    (gradient,) = torch.autograd.grad(
        symmetric_a2c_loss(log_prob, advantage, alpha, beta, z), logits
    )
    grad_log_p = torch.nn.functional.one_hot(action, 11) - logits.softmax(-1)
    weight = -advantage * (alpha + beta * abs(z) * log_prob.exp()) / 256
    expected = weight[:, None, None] * grad_log_p
    assert expected.abs().max() > 1e-7  # with alpha 0 it is that small in six dimensions
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-9, atol=1e-16)


def test_the_reverse_share_vanishes_with_the_dimension():
    """11 equally likely bins, alpha 0.5, beta 20: the reverse gradient is 40 / 11^d of A2C's."""
    for dims, ratio in ((1, 3.6), (2, 0.33), (3, 0.03), (6, 2e-5)):
        log_prob = torch.full((1,), -dims * torch.tensor(11.0, dtype=torch.float64).log().item())
        log_prob.requires_grad_()
        parts = [
            symmetric_a2c_loss(log_prob, torch.ones(1), *weights, -1)
            for weights in ((0.5, 0), (0, 20))
        ]
        a2c, reverse = (torch.autograd.grad(part, log_prob)[0].item() for part in parts)
        assert reverse / a2c == pytest.approx(ratio, rel=0.15)


def test_symmetric_a2c_is_not_a_rescaling():
    """Likely actions gain weight on unlikely ones."""
    log_prob = torch.tensor([0.9, 0.1]).log().requires_grad_()
    arguments = log_prob, torch.ones(2)
    plain, symmetric = (
        torch.autograd.grad(symmetric_a2c_loss(*arguments, *weights, -1), log_prob)[0]
        for weights in ((1, 0), (0.5, 5))
    )
    assert plain[0] == plain[1]
    assert symmetric[0] / symmetric[1] == pytest.approx(5.0)  # (0.5 + 5 * 0.9) / (0.5 + 5 * 0.1)
