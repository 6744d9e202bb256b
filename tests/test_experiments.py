"""Experiments on a network: metrics compared with manual computations, and the effects that they demonstrate."""

import math

import pytest
import torch
from torch import nn

from vgglab.lab import experiments
from vgglab.model import build


def batch(seed=0, size=8):
    torch.manual_seed(seed)
    labels = torch.arange(size) % 4
    images = torch.randn(size, 3, 32, 32) + labels[:, None, None, None]
    return images, labels


def test_signals_of_two_layers_match_a_manual_computation():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    images, labels = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    first = images @ network[1].weight.T + network[1].bias
    logits = first.clamp(min=0) @ network[3].weight.T + network[3].bias
    logits_gradient = (logits.softmax(1) - nn.functional.one_hot(labels, 3)) / 4
    first_gradient = (logits_gradient @ network[3].weight) * (first > 0)
    one, two = experiments.signals(network, images, labels)
    assert (one.layer, two.layer) == ("1", "3")
    assert (one.activation, two.activation) == pytest.approx((first.std().item(), logits.std().item()))
    assert (one.gradient, two.gradient) == pytest.approx((first_gradient.std().item(), logits_gradient.std().item()))
    weight_gradient = first_gradient.T @ images
    assert one.weight_gradient == pytest.approx((weight_gradient.std() / network[1].weight.std()).item())
    assert all(p.grad is None for p in network.parameters())
    assert not network[1]._forward_hooks


def test_activations_vanish_with_the_papers_init_but_not_with_kaiming():
    ratios = {}
    for init in ("normal", "xavier", "kaiming"):
        torch.manual_seed(0)
        stats = experiments.signals(build("vgg16", num_classes=4, head="small", init=init, dropout_rate=0.0), *batch())
        ratios[init] = stats[12].activation / stats[0].activation  # the last convolution relative to the first
    assert ratios["normal"] < 1e-6 < 1e-3 < ratios["xavier"] < ratios["kaiming"]
    assert 0.01 < ratios["kaiming"] < 100


def test_first_steps_learn_and_stop_at_a_non_finite_loss():
    torch.manual_seed(0)
    network = build("vgg11_bn", num_classes=4, head="small", dropout_rate=0.0)
    losses = experiments.first_steps(network, [batch()] * 12, lr=0.01)
    assert losses[-1] < 0.5 * losses[0]
    diverged = experiments.first_steps(network, [batch()] * 12, lr=1e30)
    assert len(diverged) < 12
    assert all(map(math.isfinite, diverged))


def test_learning_rates_increase_by_a_constant_factor():
    torch.manual_seed(0)
    network = build("vgg11_bn", num_classes=4, head="small", dropout_rate=0.0)
    rates, losses = experiments.learning_rate_range(network, [batch()] * 5, 1e-4, 1e-2)
    assert rates == pytest.approx([1e-4 * 10 ** (n / 2) for n in range(5)])
    assert len(losses) == 5


def test_copy_layers_fills_the_same_layers_as_the_papers_pre_training():
    shallow, deep = (build(name, num_classes=4, head="small") for name in ("vgg11", "vgg16"))
    before = {name: value.clone() for name, value in deep.state_dict().items()}
    filled = experiments.copy_layers(shallow, deep)
    assert filled == [
        "features.0",
        "features.5",
        "features.10",
        "features.12",
        "classifier.0",
        "classifier.3",
        "classifier.6",
    ]
    assert torch.equal(deep.features[12].weight, shallow.features[8].weight)  # A's fourth layer is conv3_2
    untouched = [name for name in before if name.rpartition(".")[0] not in filled]
    assert all(torch.equal(deep.state_dict()[name], before[name]) for name in untouched)
    assert len(untouched) == 2 * (13 - 4)
