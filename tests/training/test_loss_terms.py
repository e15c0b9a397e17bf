"""The parts of the losses against vectors that others published."""

import pytest
import torch

from rollouts.training.loss_terms import (
    clipped_surrogate,
    importance_weights,
    k1,
    k2,
    k3,
    token_shares,
    value_loss,
)


def test_clipping_vectors():
    """Goal: ratios [2, 2, .5], A [2, -2, 2], eps .2 and dual clip 1.5 give the loss [-2.4, 3, -1].

    Red with the dual clip applied to every sign of A, and without it (4 in place of 3).
    """
    ratio, advantages = torch.tensor([2.0, 2.0, 0.5]), torch.tensor([2.0, -2.0, 2.0])
    torch.testing.assert_close(
        -clipped_surrogate(ratio, advantages, 0.2, 1.5), torch.tensor([-2.4, 3.0, -1.0])
    )
    torch.testing.assert_close(
        -clipped_surrogate(ratio, advantages, 0.2), torch.tensor([-2.4, 4.0, -1.0])
    )


def test_clip_higher_moves_the_upper_bound_alone():
    """Goal: DAPO's pair is (low, high). Red with the two swapped."""
    ratio, ones = torch.tensor([2.0, 0.1]), torch.ones(2)
    torch.testing.assert_close(
        clipped_surrogate(ratio, ones, (0.2, 0.28)), torch.tensor([1.28, 0.1])
    )
    torch.testing.assert_close(
        clipped_surrogate(ratio, -ones, (0.2, 0.28)), torch.tensor([-2.0, -0.8])
    )


def test_kl_vectors():
    """Goal: log p [-1, -2] against [-1.5, -1.5]: the published k3, and k1, k2. Red with the arguments swapped."""
    own, reference = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.5])
    torch.testing.assert_close(k1(own, reference), torch.tensor([0.5, -0.5]))
    torch.testing.assert_close(k2(own, reference), torch.tensor([0.125, 0.125]))
    torch.testing.assert_close(
        k3(own, reference), torch.tensor([0.1065, 0.1487]), rtol=0, atol=5e-5
    )


def test_kl_estimates_and_gradients_in_expectation():
    """Goal: under p, E[k1] = E[k3] = KL; as losses k2 has KL's gradient, k1 none, k3 that of KL(reference || p).

    As documented; taken exactly, over all 5 tokens. Red with k2 not halved.
    """
    generator = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 5, dtype=torch.float64, generator=generator)
    logits.requires_grad_()
    log_probs, reference = torch.log_softmax(logits, 0), torch.log_softmax(other, 0)
    kl = (log_probs.exp() * (log_probs - reference)).sum()
    (kl_gradient,) = torch.autograd.grad(kl, logits, retain_graph=True)
    # the sampler's probabilities: no gradient goes through which token was drawn
    drawn = log_probs.exp().detach()
    gradients = {}
    for name, estimate in (("k1", k1), ("k2", k2), ("k3", k3)):
        expected = (drawn * estimate(log_probs, reference)).sum()
        if name != "k2":
            assert expected.item() == pytest.approx(kl.item(), abs=1e-14)
        (gradients[name],) = torch.autograd.grad(expected, logits, retain_graph=True)
    torch.testing.assert_close(gradients["k2"], kl_gradient, rtol=0, atol=1e-14)
    torch.testing.assert_close(gradients["k1"], torch.zeros_like(logits), rtol=0, atol=1e-14)
    reverse = (reference.exp() * (reference - log_probs)).sum()
    torch.testing.assert_close(
        gradients["k3"], torch.autograd.grad(reverse, logits)[0], rtol=0, atol=1e-14
    )


@pytest.mark.parametrize(
    ("aggregation", "options", "expected"),
    [
        ("token_mean", {}, 3.25),
        ("sequence_mean_token_sum", {}, 6.5),
        ("sequence_mean_token_mean", {}, 3.25),
        ("constant_length", {"length_norm": 10.0}, 0.65),
        ("token_mean", {"tokens_global": 8.0}, 1.625),
        ("sequence_mean_token_sum", {"sequences_global": 4.0}, 3.25),
    ],
)
def test_aggregation_vectors(aggregation, options, expected):
    """Goal: [[1,2,30],[4,50,6]] with mask [[1,1,0],[1,0,1]] gives the published numbers.

    A first column stands before them: position 0 is predicted by nothing. Red with its mask counted.
    """
    values = torch.tensor([[9.0, 1, 2, 30], [9.0, 4, 50, 6]])
    mask = torch.tensor([[1.0, 1, 1, 0], [1.0, 1, 0, 1]])
    assert (token_shares(mask, aggregation, **options) * values).sum().item() == pytest.approx(
        expected
    )


def test_shares_by_length_and_of_empty_sequences():
    """Goal: lengths 1 and 4 tell the aggregations apart; a row without trained tokens counts nowhere, and no 0/0.

    Red with B in place of the sequences that have tokens.
    """
    mask = torch.tensor([[0.0, 1, 0, 0, 0], [0.0, 1, 1, 1, 1], [0.0, 0, 0, 0, 0]])
    sums = {
        name: token_shares(mask, name, length_norm=8.0).sum(1).tolist()
        for name in (
            "token_mean",
            "sequence_mean_token_sum",
            "sequence_mean_token_mean",
            "constant_length",
        )
    }
    assert sums["token_mean"] == pytest.approx([0.2, 0.8, 0])
    assert sums["sequence_mean_token_sum"] == pytest.approx([0.5, 2, 0])
    assert sums["sequence_mean_token_mean"] == pytest.approx([0.5, 0.5, 0])
    assert sums["constant_length"] == pytest.approx([0.0625, 0.25, 0])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none", [1.0, 1.0, 1.0, 1.0, 1.0]),
        ("token_truncate", [2.0, 0.5, 2.0, 1.5, 1.0]),
        ("token_mask", [0.0, 0.5, 2.0, 1.5, 1.0]),
        ("sequence_truncate", [1.5, 1.5, 2.0, 2.0, 2.0]),
        ("sequence_mask", [1.5, 1.5, 0.0, 0.0, 0.0]),
    ],
)
def test_importance_vectors(kind, expected):
    """Goal: ratios [3, .5 | 2, 1.5, 1] at a cap of 2: each token's or the sequence's product, held or dropped.

    Red with < for <= (a ratio at the cap is kept), and with the mean for the product.
    """
    ratios = torch.tensor([3.0, 0.5, 2.0, 1.5, 1.0], dtype=torch.float64, requires_grad=True)
    keep = torch.tensor([[True, False, True, False], [False, True, True, True]])
    weights = importance_weights(torch.log(ratios), keep, kind, 2.0)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))
    assert not weights.requires_grad


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda: token_shares(torch.ones(1, 2), "mean"),
            "aggregation='mean': needs one of 'token_mean', ",
        ),
        (
            lambda: token_shares(torch.ones(1, 2), "constant_length"),
            "length_norm=None: aggregation='constant_length'",
        ),
        (
            lambda: token_shares(torch.ones(1, 2), "sequence_mean_token_sum", sequences_global=0),
            "sequences_global=0",
        ),
        (
            lambda: clipped_surrogate(torch.ones(1), torch.ones(1), 0.2, 1.0),
            "dual_clip=1.0: needs > 1",
        ),
        (lambda: clipped_surrogate(torch.ones(1), torch.ones(1), (0.2, -0.1)), "needs >= 0"),
        (
            lambda: importance_weights(torch.ones(1), torch.ones(1, 1) > 0, "token", 2.0),
            "importance='token': needs",
        ),
        (
            lambda: importance_weights(torch.ones(1), torch.ones(1, 1) > 0, "token_mask", 0.0),
            "importance_cap=0.0",
        ),
    ],
)
def test_bad_settings_are_named(function, message):
    """Goal: no misspelt choice falls through to another. Red with each check off."""
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        function()


def test_value_loss_by_hand():
    """Goal: the worse of the value and the held value, halved. Red with torch.minimum, and without the half.

    Returns 1; values .9 and 2 from 0, held at .5: (.5)^2 = .25 beats .01; 1 beats .25. Towards the return from the
    other side nothing is held: value 1.2, before 1.5, held 1.0 -> .04 stays.
    """
    values, old = torch.tensor([0.9, 2.0, 1.2]), torch.tensor([0.0, 0.0, 1.5])
    returns = torch.ones(3)
    assert value_loss(values, returns).tolist() == pytest.approx([0.005, 0.5, 0.02])
    assert value_loss(values, returns, old, 0.5).tolist() == pytest.approx([0.125, 0.5, 0.02])
    for clip, before in ((0.0, old), (0.5, None)):
        with pytest.raises(ValueError, match=f"value_clip={clip}: needs > 0"):
            value_loss(values, returns, before, clip)


def test_a_held_value_has_no_gradient():
    """Goal: past the clip, towards the return, nothing pulls any more. Red without the clamp."""
    values = torch.tensor([0.9, 0.2], requires_grad=True)
    value_loss(values, torch.ones(2), torch.zeros(2), 0.5).sum().backward()
    assert values.grad.tolist() == pytest.approx([0.0, -0.8])
