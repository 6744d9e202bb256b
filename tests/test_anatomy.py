"""vgglab.anatomy compared with the paper, torch's FLOP counter, a forward pass and measured receptive fields."""

import json

import pytest
import torch
from processes import python
from torch import nn

import vgglab
import vgglab.model as models
from vgglab.commands import call
from vgglab.devices import open_device
from vgglab.errors import UserError
from vgglab.lab import anatomy
from vgglab.lab.shapes import output_of
from vgglab.settings.choices import MODELS
from vgglab.view.anatomy_table import Ceilings, Layer

# Table 2 of the paper: millions of parameters with 1000 classes.
PAPER_MILLIONS = {"vgg11": 133, "vgg13": 133, "vgg16": 138, "vgg19": 144}


def custom_network():
    """A network as a user might write it: grey images, a stride, dilation, groups, layers of all kinds."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 5, stride=2, padding=2, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=2),
        nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(32, 10),
    )


@pytest.mark.parametrize(("name", "millions"), PAPER_MILLIONS.items())
def test_parameter_counts_match_the_paper(name, millions):
    assert round(anatomy.of(name).num_parameters / 1e6) == millions


def flop_by_torch(network, images):
    """FLOP of a forward pass, and of a forward and backward pass, counted by torch's dispatcher."""
    flop_counter = pytest.importorskip("torch.utils.flop_counter")
    totals = []
    for is_training in (False, True):
        with flop_counter.FlopCounterMode(display=False) as mode:
            output = network.eval()(images)
            if is_training:
                output.sum().backward()
        totals.append(mode.get_total_flops())
    return totals


@pytest.mark.parametrize("image_size", [224, 64])
@pytest.mark.parametrize("name", MODELS)
def test_multiply_adds_are_half_of_torchs_flop_count(name, image_size):
    pytest.importorskip("torch.utils.flop_counter")
    with torch.device("meta"):
        network = models.build(name, image_size=image_size, init_weights=False)
        forward, training = flop_by_torch(network, torch.empty(2, 3, image_size, image_size))
    counted = anatomy.of(name, image_size, batch_size=2)
    assert (2 * 2 * counted.multiply_adds, 2 * counted.training_flop) == (forward, training)
    assert counted.num_parameters == sum(weight.numel() for weight in network.parameters())
    if (name, image_size) == ("vgg16", 224):
        assert counted.multiply_adds == 15_470_264_320
        assert counted.training_flop / 1e9 == pytest.approx(92.65, abs=0.005)


def test_frozen_layers_cost_no_gradient():
    network = models.vgg11(num_classes=10, head="small", init_weights=False)
    for weight in network.features[:6].parameters():
        weight.requires_grad_(False)
    counted = anatomy.of(network, 32)
    conv = [layer for layer in counted if layer.kind == "conv"]
    costs = [layer.training_multiply_adds // layer.multiply_adds for layer in conv]
    assert costs == [1, 1, 2, 3, 3, 3, 3, 3]
    assert counted.training_flop == flop_by_torch(network, torch.zeros(1, 3, 32, 32))[1]


def test_a_custom_network_is_analysed_but_not_modified():
    network, hook_calls = custom_network(), []
    network[0].register_forward_hook(lambda *_: hook_calls.append(1))
    counted = anatomy.of(network, 30, batch_size=3)
    assert counted[-1].output_shape == (3, 10)
    assert [layer.name for layer in counted] == [str(number) for number in range(9)]
    kinds = ["conv", "batch norm", "relu", "conv", "pool", "pool", "flatten", "dropout", "linear"]
    assert [layer.kind for layer in counted] == kinds
    # 30 -> 15 (stride 2) -> 15 -> 7 -> 2: the adaptive pooling has windows of 4, from 0 and from 3.
    assert [layer.receptive_field for layer in counted] == [5, 5, 5, 13, 15, 27, 27, 27, 30]
    assert [layer.jump for layer in counted] == [2, 2, 2, 2, 4, 16, 16, 16, 30]
    assert [layer.field_start for layer in counted[:5]] == [-2, -2, -2, -6, -6]
    assert [layer.field_start for layer in anatomy.of(nn.Sequential(nn.Conv2d(1, 1, 3, padding="same")), 8)] == [-1]
    assert hook_calls == []
    assert len(network[0]._forward_hooks) == 1
    assert network.training
    assert network[0].weight.device.type == "cpu"
    assert 2 * counted.multiply_adds * 3 == flop_by_torch(network, torch.zeros(3, 1, 30, 30))[0]


def test_each_tensor_is_counted_once_in_the_bytes_moved():
    rows = {layer.name: layer for layer in anatomy.of(custom_network(), 30, batch_size=3)}
    maps = 3 * 4 * 15 * 15
    assert rows["0"].bytes_moved == 4 * (3 * 30 * 30 + 4 * 25 + maps)
    assert rows["1"].bytes_moved == 4 * (maps + 4 * 4 + maps)  # scale, shift, mean and variance
    assert rows["2"].bytes_moved == 4 * (maps + maps)
    assert rows["6"].bytes_moved == 0
    assert rows["0"].intensity == 3 * 2 * rows["0"].multiply_adds / rows["0"].bytes_moved


def test_parameters_of_a_reused_layer_are_counted_once():
    layer = nn.Conv2d(3, 3, 3, padding=1)
    counted = anatomy.of(nn.Sequential(layer, nn.ReLU(), layer), 8)
    assert [row.num_parameters for row in counted] == [84, 0, 0]
    assert counted[2].bytes_moved == counted[0].bytes_moved


@pytest.mark.parametrize("name", ["vgg11_bn", "vgg16"])
def test_shapes_match_a_real_forward_pass(name):
    network = models.build(name, num_classes=7, head="small", init_weights=False).eval()
    shapes = []
    for _, module in network.named_modules():
        if not list(module.children()):
            module.register_forward_hook(
                lambda _module, inputs, output: shapes.append((tuple(inputs[0].shape), tuple(output.shape)))
            )
    with torch.no_grad():
        network(torch.zeros(2, 3, 64, 64))
    counted = anatomy.of(name, 64, batch_size=2, num_classes=7)
    assert [(layer.input_shape, layer.output_shape) for layer in counted] == shapes


def input_columns(layers, images, column):
    """First and last pixel column that one output depends on, that is, where its gradient is not zero."""
    maps = layers(images)
    (gradient,) = torch.autograd.grad(maps[0, 0, maps.shape[2] // 2, column], images)
    columns = gradient[0, 0].sum(0).nonzero()
    return int(columns[0]), int(columns[-1])


def test_receptive_fields_match_the_nonzero_gradient():
    """VGG16's features with one channel. Positive weights and average pooling: no gradient cancels out or is zero."""
    layers = []
    for layer in models.CONFIGURATIONS["vgg16"]:
        layers += [nn.AvgPool2d(2)] if layer == "M" else [nn.Conv2d(1, 1, 3, padding=1, bias=False), nn.ReLU()]
    network = nn.Sequential(*layers)
    for weight in network.parameters():
        nn.init.ones_(weight)
    images = torch.ones(1, 1, 288, 288, requires_grad=True)
    counted = anatomy.of(network, 288)
    for number, layer in enumerate(counted, start=1):
        centre = layer.output_shape[-1] // 2
        first, last = input_columns(network[:number], images, centre)
        assert last - first + 1 == layer.receptive_field, layer.name
        assert first == layer.field_start + centre * layer.jump, layer.name
        assert first - input_columns(network[:number], images, centre - 1)[0] == layer.jump, layer.name
    of_vgg16 = anatomy.of("vgg16")
    assert [layer.receptive_field for layer in of_vgg16[: len(layers)]] == [layer.receptive_field for layer in counted]
    assert (of_vgg16[28].kind, of_vgg16[28].receptive_field) == ("conv", 196)
    assert (of_vgg16[30].kind, of_vgg16[30].receptive_field) == ("pool", 212)
    assert of_vgg16[-1].receptive_field == 224


class FunctionalPooling(nn.Module):
    """Halves its feature maps between two layers, in a function that is not a layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, images):
        return self.second(nn.functional.max_pool2d(self.first(images), 2))


SHAPE_LAYERS = [nn.MaxPool2d(3, 2, 1, ceil_mode=ceil_mode) for ceil_mode in (True, False)] + [
    nn.MaxPool2d(2, dilation=2), nn.AvgPool2d(3, 2, ceil_mode=True), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d((4, None)),
    nn.AdaptiveMaxPool2d(3), nn.Conv2d(6, 4, (3, 5), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
    nn.Conv2d(6, 4, 3, padding="same"), nn.Conv2d(6, 4, 3, padding="valid"), nn.Flatten(2), nn.Linear(9, 5),
]  # fmt: skip


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 8, 1), nn.BatchNorm2d(4), nn.BatchNorm1d(4)], ids=str)
def test_a_wrong_number_of_channels_is_refused(layer):
    with pytest.raises(ValueError, match="expected 4 channels, got 3"):
        output_of(layer, torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("layer", SHAPE_LAYERS, ids=str)
def test_output_shapes_match_torch(layer):
    num_checked = 0
    for height in range(1, 24):
        images = torch.zeros(2, 6, height, 9)
        try:
            expected = layer(images).shape
        except RuntimeError:
            with pytest.raises(ValueError, match="too small"):
                output_of(layer, images)
            continue
        assert output_of(layer, images).shape == expected
        num_checked += 1
    assert num_checked > 10


@pytest.mark.parametrize(
    ("model", "image_size", "message"),
    [
        ("vgg12", 224, r"unknown network 'vgg12'"),
        ("vgg16", 16, r"vgg16, 16 x 16 pixels: "),
        ("vgg16", 0, r"image_size.*1 or more"),
        (nn.Sequential(nn.Conv2d(3, 3, 1), nn.GELU()), 8, r"1 is a GELU; anatomy supports conv, linear"),
        (nn.Sequential(nn.Flatten(), nn.Linear(5, 5)), 8, r"Sequential, 8 x 8 pixels: "),
        (FunctionalPooling(), 8, r"second: its input does not match the output of the previous layer"),
    ],
)
def test_unsupported_input_is_refused_in_one_line(model, image_size, message):
    with pytest.raises(UserError, match=message) as error:
        anatomy.of(model, image_size)
    assert len(str(error.value).splitlines()) == 1


@pytest.fixture(scope="module")
def measured():
    device = open_device("cpu")
    device.open()
    return anatomy.measure(anatomy.of(custom_network(), 30, batch_size=4), device, repeats=1)


def test_each_layer_and_the_ceilings_are_measured(measured):
    assert all(layer.forward_seconds > 0 for layer in measured)
    assert all(layer.backward_seconds > 0 for layer in measured)
    assert [layer.flop_per_second is not None for layer in measured] == [layer.flop > 0 for layer in measured]
    ceilings = measured.ceilings
    assert ceilings.flop_per_second > 0
    assert ceilings.bytes_per_second > 0
    assert ceilings.attainable(ceilings.ridge / 2) == pytest.approx(ceilings.flop_per_second / 2)
    assert ceilings.attainable(2 * ceilings.ridge) == ceilings.flop_per_second


def test_a_layer_without_gradients_has_no_backward_time():
    device = open_device("cpu")
    rows = anatomy.of(nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 2, 1)), 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anatomy, "ceilings", lambda *_: Ceilings(1e9, 1e9))
        relu, conv = anatomy.measure(rows, device, repeats=1)
        assert (relu.backward_seconds, conv.backward_seconds > 0) == (0.0, True)
        with pytest.raises(UserError, match=r"^1: Expected more than 1 value.*; use a larger batch"):
            anatomy.measure(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3)), device)


def test_measuring_a_simulated_card_is_refused():
    device = open_device("cpu")
    device.is_simulated = True
    with pytest.raises(UserError, match="no speed"):
        anatomy.measure(custom_network(), device)


def test_the_table_is_displayed_with_totals():
    counted = anatomy.of("vgg16")
    lines = repr(counted).splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[0].startswith("vgg16, 224 x 224 pixels")
    last = lines[-1].split()
    assert last[:4] == ["total", "138,357,544", "15,470.3", "92.65"]
    assert len(lines) == 2 + 2 + len(counted) + 1
    shown = counted._repr_html_()
    assert shown.count("<tr>") == 1 + len(counted) + 1
    assert "138,357,544" in shown


def test_measured_rows_show_speed_and_share_of_the_roofline(measured):
    text = repr(measured)
    assert "GFLOP/s" in text
    assert "measured ceilings" in text
    row = text.splitlines()[4]
    assert row.split()[0] == "0"
    assert row.endswith("%")
    assert "GFLOP/s" not in repr(anatomy.of(custom_network(), 30))
    assert "%</td>" in measured._repr_html_()


def test_the_roofline_is_drawn(measured):
    pytest.importorskip("matplotlib")
    from vgglab.view.figures import roofline

    figure = roofline(measured, measured.ceilings)
    assert len(figure.png()) > 1000
    (panel,) = figure.axes
    assert "FLOP per byte" in panel.get_xlabel()
    assert "GFLOP/s" in panel.get_ylabel()
    assert {text.get_text() for text in panel.texts} == {"0", "3", "8"}
    with pytest.raises(UserError, match="nothing to draw"):
        roofline(anatomy.of(custom_network(), 30), measured.ceilings)


def test_roofline_labels_of_similar_layers_do_not_overlap():
    pytest.importorskip("matplotlib")
    from vgglab.view.figures import roofline

    rows = [layer._replace(forward_seconds=0.01) for layer in anatomy.of("vgg19")]
    panel = roofline(rows, Ceilings(100e9, 20e9)).axes[0]
    positions = sorted(text.get_position()[0] for text in panel.texts)
    assert len(positions) == 19
    assert min(b - a for a, b in zip(positions, positions[1:])) > 0.03
    assert 0 < positions[0] < positions[-1] < 1


def test_the_command_prints_the_table_and_json():
    result = python("-m", "vgglab.anatomy", "--model=vgg11_bn", "--image_size=64", "--batch-size=2", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    *table, last = result.stdout.splitlines()
    assert table[0].startswith("vgg11_bn, 64 x 64 pixels")
    output = json.loads(last)
    counted = anatomy.of("vgg11_bn", 64, batch_size=2)
    assert output["multiply_adds"] == counted.multiply_adds
    assert output["ceilings"] is None
    assert output["layers"][0]["intensity"] == counted[0].intensity
    fields = {name: output["layers"][0][name] for name in Layer._fields}
    assert Layer(**fields)._replace(output_shape=(2, 64, 64, 64), input_shape=(2, 3, 64, 64)) == counted[0]


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--model=vgg12", "--model"),
        ("--image-size=7", "--image-size"),
        ("--batch-size=0", "--batch-size"),
        ("--batch=2", "--batch"),
        ("--device=toaster", "--device"),
    ],
)
def test_bad_input_gives_one_line_and_exit_code_2(flag, named, capsys):
    assert call("anatomy", [flag]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("vgglab.anatomy: error: ")
    assert named in line


def test_anatomy_is_importable_from_the_package():
    assert vgglab.anatomy.of is anatomy.of
    result = python("-c", "import vgglab.anatomy; from vgglab.anatomy import of; print(of is vgglab.anatomy.of)")
    assert result.stdout == "True\n"
    assert "anatomy" in vgglab.__all__
