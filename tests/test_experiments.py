"""Looking into a network: the figures against hand-made ones, and the effects that they are there to show."""

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


def test_signals_are_those_of_two_layers_worked_out_by_hand():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    images, labels = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    first = images @ network[1].weight.T + network[1].bias
    logits = first.clamp(min=0) @ network[3].weight.T + network[3].bias
    by_logits = (logits.softmax(1) - nn.functional.one_hot(labels, 3)) / 4
    by_first = (by_logits @ network[3].weight) * (first > 0)
    one, two = experiments.signals(network, images, labels)
    assert (one.layer, two.layer) == ("1", "3")
    assert (one.activation, two.activation) == pytest.approx((first.std().item(), logits.std().item()))
    assert (one.gradient, two.gradient) == pytest.approx((by_first.std().item(), by_logits.std().item()))
    by_weight = by_first.T @ images
    assert one.weight_gradient == pytest.approx((by_weight.std() / network[1].weight.std()).item())
    assert all(p.grad is None for p in network.parameters())
    assert not network[1]._forward_hooks


def test_the_papers_own_deviation_starves_a_deep_network_and_kaimings_does_not():
    spread = {}
    for init in ("normal", "xavier", "kaiming"):
        torch.manual_seed(0)
        found = experiments.signals(build("vgg16", num_classes=4, head="small", init=init, dropout_rate=0.0), *batch())
        spread[init] = found[12].activation / found[0].activation  # the last convolution's over the first's
    assert spread["normal"] < 1e-6 < 1e-3 < spread["xavier"] < spread["kaiming"]
    assert 0.01 < spread["kaiming"] < 100


def test_first_steps_learn_and_end_where_the_loss_is_no_number():
    torch.manual_seed(0)
    network = build("vgg11_bn", num_classes=4, head="small", dropout_rate=0.0)
    losses = experiments.first_steps(network, [batch()] * 12, lr=0.01)
    assert losses[-1] < 0.5 * losses[0]
    ruined = experiments.first_steps(network, [batch()] * 12, lr=1e30)
    assert len(ruined) < 12
    assert all(map(math.isfinite, ruined))


def test_rates_rise_by_one_factor():
    torch.manual_seed(0)
    network = build("vgg11_bn", num_classes=4, head="small", dropout_rate=0.0)
    rates, losses = experiments.learning_rate_range(network, [batch()] * 5, 1e-4, 1e-2)
    assert rates == pytest.approx([1e-4 * 10 ** (n / 2) for n in range(5)])
    assert len(losses) == 5


def test_the_papers_pre_training_fills_the_same_places():
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
    assert torch.equal(deep.features[12].weight, shallow.features[8].weight)  # the fourth of A is its block 3's second
    untouched = [name for name in before if name.rpartition(".")[0] not in filled]
    assert all(torch.equal(deep.state_dict()[name], before[name]) for name in untouched)
    assert len(untouched) == 2 * (13 - 4)
