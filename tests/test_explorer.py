"""The architecture drawing and the explorer: what its controls change, and what is shown without widgets."""

import threading

import numpy as np
import pytest
import torch
from torch import nn

import vgglab.model as models
from vgglab.errors import UserError
from vgglab.lab import anatomy

pytest.importorskip("matplotlib")
from vgglab.view import explorer
from vgglab.view.explorer import Explorer, explore
from vgglab.view.figures import architecture

PHOTOGRAPH = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def draw_boxes(network, marked=""):
    (panel,) = architecture(network, marked).axes
    return {patch.get_gid(): patch for patch in panel.patches}, panel


@pytest.mark.parametrize("image_size", [32, 224])
@pytest.mark.parametrize("name", ["vgg11", "vgg16_bn", "vgg19"])
def test_box_size_matches_the_layers_output(name, image_size):
    network = anatomy.of(name, image_size)
    boxes, panel = draw_boxes(network)
    drawn = [layer for layer in network if layer.kind in ("conv", "pool", "linear", "batch norm")]
    assert set(boxes) == {layer.name for layer in drawn}
    maps = [layer for layer in drawn if layer.kind in ("conv", "pool")]
    assert [boxes[layer.name].get_height() for layer in maps] == [layer.output_shape[2] for layer in maps]
    convolutions = [layer for layer in maps if layer.kind == "conv"]
    unit = boxes[convolutions[0].name].get_width() / 64
    widths = [boxes[layer.name].get_width() for layer in convolutions]
    assert widths == pytest.approx([unit * layer.output_shape[1] for layer in convolutions])
    lefts = [boxes[layer.name].get_x() for layer in drawn if layer.kind != "batch norm"]
    assert lefts == sorted(lefts)
    labels = [text.get_text() for text in panel.texts]
    assert f"{image_size}x{image_size}" in labels
    assert labels.count("512") >= 2
    assert labels[-1] == "1000"


def test_drawings_of_different_networks_differ():
    drawings = [
        architecture(anatomy.of(*network)).png() for network in (("vgg11",), ("vgg19",), ("vgg19_bn",), ("vgg19", 64))
    ]
    assert len(set(drawings)) == 4
    assert min(map(len, drawings)) > 5000


def test_labels_do_not_overlap():
    for name, size in (("vgg11", 32), ("vgg19_bn", 64), ("vgg16", 224), ("vgg13", 448), ("vgg19_bn", 384)):
        picture = architecture(anatomy.of(name, size))
        picture.canvas.draw()
        extents = [text.get_window_extent() for text in picture.axes[0].texts]
        overlap = [(a, b) for n, a in enumerate(extents) for b in extents[:n] if a.overlaps(b)]
        assert overlap == [], (name, size)
        linear = [patch for patch in picture.axes[0].patches if patch.get_gid().startswith("classifier")]
        assert not [box for box in linear for text in extents if text.overlaps(box.get_window_extent())], (name, size)


def test_layer_without_a_box_marks_its_convolution():
    network = anatomy.of("vgg11_bn", 32)
    assert [layer.kind for layer in network[4:7]] == ["conv", "batch norm", "relu"]
    boxes, panel = draw_boxes(network, network[6].name)
    assert boxes["mark"].get_bbox().bounds == boxes[network[4].name].get_bbox().bounds
    assert network[6].name in [text.get_text() for text in panel.texts]


def test_custom_networks_are_drawn():
    boxes, _ = draw_boxes(anatomy.of(nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5)), 8))
    assert set(boxes) == {"1"}
    boxes, _ = draw_boxes(anatomy.of(nn.Sequential(*[nn.Conv2d(4, 4, 1) for _ in range(100)]), 8))
    assert len(boxes) == 100
    assert min(box.get_width() for box in boxes.values()) > 0
    with pytest.raises(UserError, match="nothing to draw"):
        architecture(anatomy.of(nn.Sequential(nn.ReLU()), 8))
    with pytest.raises(UserError, match=r"no layer 'features\.99' in vgg11"):
        architecture(anatomy.of("vgg11"), "features.99")


@pytest.mark.parametrize("name", ["features.5", "features.17", "features.24"])
def test_frame_contains_every_pixel_with_a_gradient(name):
    torch.manual_seed(0)
    network = models.build("vgg16", num_classes=10, head="small").features
    layer = next(row for row in anatomy.of("vgg16", 160) if row.name == name)
    images = torch.rand(1, 3, 160, 160, requires_grad=True)
    maps = network[: int(name.split(".")[1]) + 1](images)
    row, column = maps.shape[2] // 2, maps.shape[3] // 2 + 1
    (gradient,) = torch.autograd.grad(maps[0, :, row, column].sum(), images)
    seen = gradient[0].abs().sum(0) > 0
    frame = layer.window(row, column)
    rows, columns = (torch.where(seen.any(side))[0] for side in (1, 0))
    for positions, start in ((rows, frame.top), (columns, frame.left)):
        assert max(0, start) <= int(positions[0])
        assert int(positions[-1]) < start + frame.side
        # Max pooling skips some pixels, so the outermost ones may have no gradient.
        assert int(positions[-1] - positions[0]) > 0.9 * (min(160, start + frame.side) - max(0, start)) - 2


def test_every_control_changes_figure_and_description():
    pytest.importorskip("ipywidgets")
    view = Explorer(anatomy.of, PHOTOGRAPH, "vgg16", 64)
    view.widget()
    seen = [(bytes(view.image.value), view.about.value)]
    assert seen[0][0][:4] == b"\x89PNG"
    assert "features.28, conv" in seen[0][1]
    for control, value, words in (
        (view.layers, "features.5", ("73,856", "64x32x32 to 128x32x32", "10 x 10 pixels", "2 pixels", "0.524 MB")),
        (view.image_size, 96, ("64x48x48 to 128x48x48", "vgg16", "96 pixels")),
        (view.network, "vgg19", ("vgg19",)),
        (view.batch_norm, True, ("vgg19_bn", "features.7, conv", "10 x 10 pixels")),
        (view.layers, "classifier.6", ("1000", "each output sees the whole image")),
    ):
        control.value = value
        seen.append((bytes(view.image.value), view.about.value))
        assert [word for word in words if word not in view.about.value] == []
    assert len({picture for picture, _ in seen}) == len({about for _, about in seen}) == len(seen)


def test_selected_convolution_keeps_its_index_or_becomes_the_last():
    pytest.importorskip("ipywidgets")
    view = Explorer(anatomy.of, PHOTOGRAPH, "vgg19", 32)
    view.widget()
    view.layers.value = "features.5"
    view.network.value = "vgg11"
    assert view.layers.value == "features.6"
    view.network.value = "vgg19"
    view.layers.value = "features.34"
    view.network.value = "vgg11"
    assert view.layers.value == "features.18"
    assert len(view.layers.options) == len(anatomy.of("vgg11", 32))
    view.batch_norm.value = True
    view.layers.value = view.layers.options[1][1]  # a batch norm
    view.batch_norm.value = False  # the selected layer no longer exists
    assert view.layer.kind == "conv"


def test_controls_have_full_labels_and_each_network_is_computed_once():
    pytest.importorskip("ipywidgets")
    calls = []

    def record_call(*network):
        calls.append(network)
        return anatomy.of(*network)

    view = Explorer(record_call, PHOTOGRAPH, "vgg11", 32)
    view.widget()
    assert view.network.options == tuple(models.CONFIGURATIONS)
    for control in (view.network, view.image_size, view.layers):
        assert control.description
        assert control.style.description_width == "initial"
    for name in ("vgg13", "vgg11", "vgg13"):
        view.network.value = name
    assert calls == [("vgg11", 32), ("vgg13", 32)]


def test_error_is_shown_in_the_description():
    pytest.importorskip("ipywidgets")

    def reject_large_images(model, image_size):
        if image_size > 32:
            raise UserError("image_size: <32> at most")
        return anatomy.of(model, image_size)

    view = Explorer(reject_large_images, PHOTOGRAPH, "vgg11", 32)
    view.widget()
    view.image_size.value = 64
    assert "image_size: &lt;32&gt; at most" in view.about.value
    view.image_size.value = 32
    assert "vgg11" in view.about.value


def test_changes_from_two_threads_end_in_a_consistent_state():
    pytest.importorskip("ipywidgets")
    view = Explorer(anatomy.of, PHOTOGRAPH, "vgg11", 32)
    view.widget()
    threads = [
        threading.Thread(target=setattr, args=(view.network, "value", "vgg13")),
        threading.Thread(target=setattr, args=(view.image_size, "value", 64)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (view.anatomy.model, view.anatomy.image_size) == ("vgg13", 64)
    assert "vgg13" in view.about.value
    assert "64 pixels" in view.about.value


@pytest.mark.parametrize("kind", ["static", "live"])
def test_live_front_end_shows_widgets_and_static_one_a_figure(kind, monkeypatch):
    import IPython.display

    widgets = pytest.importorskip("ipywidgets")
    displayed = []
    monkeypatch.setattr(explorer, "front_end", lambda: kind)
    monkeypatch.setattr(IPython.display, "display", lambda *shown: displayed.extend(shown))
    explore(anatomy.of, PHOTOGRAPH, "vgg11", 32)
    if kind == "live":
        (box,) = displayed
        assert isinstance(box, widgets.Box)
        return
    picture, table = displayed
    data, metadata = picture._repr_mimebundle_()
    assert data["image/png"][:4] == b"\x89PNG"
    assert metadata["image/png"]["alt"].startswith("orange: receptive field of a features.18 output")
    assert "features.18" in repr(picture)
    assert "features.18, conv" in table._repr_html_()


@pytest.mark.parametrize("layer", ["features.0", "features.28"])
def test_titles_fit_into_the_figure(layer):
    """A longer one was cut off at the right."""
    figure = Explorer(anatomy.of, PHOTOGRAPH, "vgg16_bn", 224, layer).picture()
    figure.canvas.draw()
    for panel in figure.axes:
        extent = panel.title.get_window_extent()
        assert 0 <= extent.x0 <= extent.x1 <= figure.bbox.x1, panel.get_title()


def test_terminal_prints_text(capsys):
    explore(anatomy.of, PHOTOGRAPH, "vgg16", 32, "features.28")
    assert "196 x 196 pixels, larger than the image; the rest is padding" in capsys.readouterr().out


def test_photograph_can_be_a_file(tmp_path):
    from PIL import Image

    Image.fromarray(PHOTOGRAPH).save(tmp_path / "photograph.png")
    by_path, by_pixels = (Explorer(anatomy.of, p, "vgg11", 32) for p in (str(tmp_path / "photograph.png"), PHOTOGRAPH))
    assert by_path.picture().png() == by_pixels.picture().png()
    (tmp_path / "text.png").write_text("no image")
    for invalid in (tmp_path / "text.png", tmp_path / "missing.png", None, np.zeros((4, 4, 5), np.uint8)):
        with pytest.raises(UserError, match=r"^photograph: must be a path or") as error:
            explore(anatomy.of, invalid)
        assert len(str(error.value).splitlines()) == 1
    with pytest.raises(UserError, match=r"vgg11 has no 'features\.99'"):
        explore(anatomy.of, PHOTOGRAPH, "vgg11", 32, "features.99")


def test_photographs_of_any_mode_are_shown_in_rgb(tmp_path):
    import numpy
    from PIL import Image

    from vgglab.view.explorer import Explorer

    upright = Image.new("RGB", (40, 60), "red")
    exif = upright.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees
    upright.save(tmp_path / "turned.jpg", exif=exif)
    grey = numpy.full((50, 50), 90, "uint8")
    rgba = numpy.full((50, 50, 4), 200, "uint8")
    for photograph in (tmp_path / "turned.jpg", grey, rgba):
        picture = Explorer(anatomy.of, photograph, "vgg11", 64).picture()
        assert picture.axes[0].images[0].get_array().shape[2] == 3
    with pytest.raises(UserError, match="explore: expects the name of a network and a whole number"):
        Explorer(anatomy.of, grey, "vgg11", "64")
