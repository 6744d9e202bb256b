"""vgglab.features compared with manual computations, autograd and captum; and photographs chosen by the user."""

import io
import math
import random
from datetime import datetime, timezone

import pytest
import torch
from PIL import Image
from torch import nn

import vgglab
from vgglab.lab import features
from vgglab.model import build


@pytest.fixture
def network():
    torch.manual_seed(0)
    return build("vgg11", num_classes=4, head="small")


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_layers_are_named_as_in_the_papers_figures(network):
    assert (
        list(features.named_layers(network))
        == (
            "conv1_1 relu1_1 pool1 conv2_1 relu2_1 pool2 conv3_1 relu3_1 conv3_2 relu3_2 pool3 "
            "conv4_1 relu4_1 conv4_2 relu4_2 pool4 conv5_1 relu5_1 conv5_2 relu5_2 pool5"
        ).split()
    )
    assert list(features.named_layers(build("vgg13_bn", head="small")))[3:7] == [
        "conv1_2",
        "norm1_2",
        "relu1_2",
        "pool1",
    ]


def test_feature_maps_are_not_overwritten_by_an_in_place_relu(network, images):
    layers = features.named_layers(network)
    with torch.no_grad():
        maps = features.feature_maps(network, images, {"one": layers["conv1_1"], "two": layers["relu1_1"]})
        expected = nn.functional.conv2d(images, layers["conv1_1"].weight, layers["conv1_1"].bias, padding=1)
    assert torch.allclose(maps["one"], expected, atol=1e-6)
    assert (maps["one"] < 0).any()  # although the ReLU after it works in place
    assert torch.equal(maps["two"], maps["one"].clamp_min(0))
    assert not any(layer._forward_hooks for layer in layers.values())


def test_removing_in_place_relu_does_not_change_the_output(network, images):
    with torch.no_grad():
        before = network.eval()(images)
        assert torch.equal(features.without_inplace_relu(network.train())(images), before)


def test_the_receptive_field_of_average_poolings_matches_their_windows():
    chain = nn.Sequential(nn.AvgPool2d(3, 1), nn.AvgPool2d(3, 1), nn.AvgPool2d(2, 2))
    (field,) = features.effective_receptive_fields(chain, torch.rand(1, 3, 20, 20), {"last": chain[2]})["last"]
    rows = [1 / 18, 3 / 18, 5 / 18, 5 / 18, 3 / 18, 1 / 18]  # 3 * 3 = 5 pixels (1 2 3 2 1), added twice, shifted by 1
    assert torch.allclose(field[8:14, 8:14], torch.outer(torch.tensor(rows), torch.tensor(rows)), atol=1e-6)
    assert field.sum().item() == pytest.approx(1)
    assert int((field > 0).sum()) == 36


def test_the_receptive_field_is_the_gradient_of_the_central_unit(network, images):
    features.without_inplace_relu(network)
    layers = features.named_layers(network)
    fields = features.effective_receptive_fields(
        network, images, {name: layers[name] for name in ("relu2_1", "relu3_2")}
    )
    pixels = images.clone().requires_grad_()
    maps = network.features[:5](pixels)  # conv relu pool conv relu
    maps[:, :, maps.shape[2] // 2, maps.shape[3] // 2].sum().backward()
    expected = pixels.grad.abs().sum(dim=1)
    assert torch.allclose(fields["relu2_1"], expected / expected.sum(dim=(1, 2), keepdim=True), atol=1e-6)
    for name, side in ("relu2_1", 8), ("relu3_2", 26):  # 3, pooled 4, 8; pooled 10, 18, 26
        rows = fields[name].sum(dim=(0, 2)).nonzero().flatten()
        assert int(rows[-1] - rows[0]) + 1 == side
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in layers["conv5_2"].parameters())


def test_nearest_finds_the_largest_cosine_similarities():
    rng = random.Random(0)
    rows = [[rng.gauss(0, 1) for _ in range(5)] for _ in range(12)]

    def cosine(one, other):
        return sum(a * b for a, b in zip(one, other)) / math.hypot(*one) / math.hypot(*other)

    values, indices = features.nearest(torch.tensor(rows[:3]) * 7, torch.tensor(rows), 4)
    for query, found_values, found_indices in zip(rows, values.tolist(), indices.tolist()):
        expected = sorted(range(12), key=lambda index: -cosine(query, rows[index]))[:4]
        assert found_indices == expected
        assert found_values == pytest.approx([cosine(query, rows[index]) for index in expected], abs=1e-5)


def test_grad_cam_and_occlusion_match_their_definitions(network, images):
    attr = pytest.importorskip("captum.attr")
    features.without_inplace_relu(network)
    layer, targets = features.named_layers(network)["relu4_2"], torch.tensor([1, 3])
    maps = network.features[:15](images).detach().requires_grad_()
    assert network.features[14] is layer
    logits = network.classifier(network.avgpool(network.features[15:](maps)).flatten(1))
    (gradients,) = torch.autograd.grad(logits[0, 1] + logits[1, 3], maps)
    expected = (gradients.mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1, keepdim=True)
    theirs = attr.LayerGradCam(network, layer).attribute(images, target=targets)
    assert torch.allclose(theirs, expected, rtol=1e-4, atol=1e-7)

    window = {"sliding_window_shapes": (3, 32, 32), "strides": (3, 32, 32), "baselines": 0}
    with torch.no_grad():
        drops = attr.Occlusion(network).attribute(images, target=targets, **window)
        covered = images.clone()
        covered[:, :, :32, 32:] = 0
        drop = (network(images) - network(covered)).gather(1, targets[:, None])
    assert torch.allclose(drops[:, 0, 5, 40], drop[:, 0], atol=1e-5)


def encode(image, image_format, **options):
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def test_a_photograph_from_a_path_or_bytes_is_upright_and_resized(tmp_path):
    image = Image.new("RGB", (800, 400), "red")
    image.paste("blue", (0, 0, 400, 400))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    data = encode(image, "JPEG", exif=exif)
    (tmp_path / "mine.jpg").write_bytes(data)
    pixels = features.read_photograph(str(tmp_path / "mine.jpg"), longest=100)
    assert tuple(pixels.shape) == (100, 50, 3)
    assert (pixels[10, 25, 2] > 200) & (pixels[90, 25, 0] > 200)  # blue, on the left in the file, is on top
    assert torch.equal(features.read_photograph("any name", data, longest=100), pixels)
    assert tuple(features.read_photograph("any name", data, longest=None).shape) == (800, 400, 3)
    assert tuple(features.read_photograph("small", encode(Image.new("L", (30, 20)), "PNG")).shape) == (20, 30, 3)


@pytest.mark.parametrize("data", [b"", b"import os\nos.remove('x')\n", b"<svg onload='alert(1)'/>", None])
def test_a_file_that_is_not_an_image_is_a_one_line_error(tmp_path, data):
    with pytest.raises(
        vgglab.UserError, match=r"photograph: '.*odd.py' cannot be read as an image \(.*\); use"
    ) as error:
        features.read_photograph(str(tmp_path / "odd.py"), data)
    assert "\n" not in str(error.value)


def test_a_truncated_photograph_is_refused():
    data = encode(Image.effect_noise((200, 200), 50), "JPEG")
    with pytest.raises(vgglab.UserError, match="cannot be read as an image"):
        features.read_photograph("cut.jpg", data[: len(data) // 2])


def test_the_chooser_shows_a_figure_or_a_one_line_error():
    pytest.importorskip("ipywidgets")
    from vgglab.view.figures import map_rows
    from vgglab.view.photograph_chooser import photograph_button

    def look(name, data):
        pixels = features.read_photograph(name, data)
        return f"{name}, {pixels.shape[1]} pixels wide", map_rows({"colours": pixels.permute(2, 0, 1)}, pixels)

    button, line, picture = photograph_button(look).children

    def choose(name, data):
        file = {"name": name, "type": "", "size": len(data), "content": memoryview(data)}
        button.value = ({**file, "last_modified": datetime.now(timezone.utc)},)

    choose("<b>.png", encode(Image.effect_noise((30, 20), 50), "PNG"))
    assert line.value == "<span>&lt;b&gt;.png, 30 pixels wide</span>"
    assert bytes(picture.value).startswith(b"\x89PNG")
    assert picture.layout.display is None
    choose("evil.py", b"raise SystemExit")
    assert line.value.startswith("<span>photograph: &#x27;evil.py&#x27; cannot be read as an image")
    assert picture.layout.display == "none"


def test_a_constant_heat_map_has_no_colour_bar():
    pytest.importorskip("matplotlib")
    from vgglab.view.figures import heat_over

    images = [torch.full((32, 32, 3), 90, dtype=torch.uint8)] * 2
    figure = heat_over(images, {"Grad-CAM": [torch.zeros(4, 4), torch.arange(16.0).reshape(4, 4)]}, ["none", "some"])
    labels = [panel.get_xlabel() for panel in figure.axes]
    assert labels.count("0 everywhere") == 1
    assert len(figure.axes) == 5  # two images, two heats, one bar
    assert len(figure.png()) > 2000
