"""VGG 11, 13, 16 and 19, with and without batch norm, built from table 1 of the paper.

Source: K. Simonyan and A. Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
Recognition", 2014 (arXiv:1409.1556), table 1, configurations A, B, D and E.

Layers have the same names as in torchvision (``features.N``, ``classifier.0/3/6``), so weights are interchangeable
and give the same logits. As in torchvision, there is a function for each network:

    >>> vgglab.model.vgg16(num_classes=10)  # also vgg11, vgg13, vgg19, and with batch norm vgg16_bn, ...
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any, Callable

import torch
from torch import Tensor, nn

from vgglab.devices.compat import load_tensors
from vgglab.errors import UserError

# Table 1 of the paper, from top to bottom: a number is a 3x3 convolution with that many output channels,
# "M" a 2x2 max pooling that halves height and width. With 1000 classes (table 2), A and B have 133 million parameters,
# D 138 and E 144.
# fmt: off
CONFIGURATIONS: dict[str, list[int | str]] = {
    "vgg11": [64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"],  # A
    "vgg13": [64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"],  # B
    "vgg16": [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"],  # D
    "vgg19": [64, 64, "M", 128, 128, "M", 256, 256, 256, 256, "M",
              512, 512, 512, 512, "M", 512, 512, 512, 512, "M"],  # E
}
# fmt: on

# The classifier after the features: (side of the pooled feature map, width of the hidden layers).
# "imagenet" is the paper's: 512 x 7 x 7 = 25088 inputs, 4096 wide, 103 million weights in the
# first of its three layers. A 32x32 image is reduced to a 1x1 map, so "small" has three layers with only 512 inputs.
# A head with the name of a network is that network's own: it is used unless another one is requested (``head_for``).
HEADS = {"imagenet": (7, 4096), "small": (1, 512)}
FEATURE_STRIDE = 32  # five poolings, each of which halves the image


class VGG(nn.Module):
    """The network: ``features`` (convolutions), ``avgpool``, ``classifier`` (three linear layers).

    Args:
        layers: an entry of ``CONFIGURATIONS``.
        batch_norm: add batch norm after every convolution (not in the paper, which predates it).
        num_classes: number of outputs.
        dropout_rate: rate of both dropout layers in the classifier (paper, section 3.1: 0.5).
        head: a key of ``HEADS``.
        init_weights: initialise the weights (``_init_weights``); False keeps PyTorch's default.
        init: initialisation method: ``kaiming``, ``xavier`` or ``normal``.
    """

    def __init__(
        self,
        layers: list[int | str],
        batch_norm: bool = False,
        num_classes: int = 1000,
        dropout_rate: float = 0.5,
        head: str = "imagenet",
        init_weights: bool = True,
        init: str = "kaiming",
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise UserError(f"unknown head {head!r}; choose from {', '.join(HEADS)}")
        if init not in INITS:
            raise UserError(f"unknown init {init!r}; choose from {', '.join(INITS)}")
        side, width = HEADS[head]
        self.features = _make_features(layers, batch_norm)
        self.avgpool = nn.AdaptiveAvgPool2d((side, side))
        self.classifier = nn.Sequential(
            nn.Linear(512 * side * side, width),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout_rate),
            nn.Linear(width, width),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout_rate),
            nn.Linear(width, num_classes),
        )
        if init_weights:
            _init_weights(self, init)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(N, num_classes)`` for normalised images ``(N, 3, height, width)``, at least 32x32 pixels."""
        maps = self.features(images)  # (N, 512, height/32, width/32)
        maps = self.avgpool(maps)  # (N, 512, side, side)
        return self.classifier(torch.flatten(maps, 1))  # (N, num_classes)


def _make_features(layers: list[int | str], batch_norm: bool) -> nn.Sequential:
    modules: list[nn.Module] = []
    in_channels = 3
    for layer in layers:
        if layer == "M":
            modules.append(nn.MaxPool2d(kernel_size=2, stride=2))
            continue
        out_channels = int(layer)
        modules.append(nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1))
        if batch_norm:
            modules.append(nn.BatchNorm2d(out_channels))
        modules.append(nn.ReLU(inplace=True))
        in_channels = out_channels
    return nn.Sequential(*modules)


@torch.no_grad()
def _init_weights(model: VGG, init: str) -> None:
    """Initialise the weights of convolutions and linear layers with the method ``init``, biases with 0.

    Weights are drawn in float64 and rounded once. In float32, PyTorch's normally distributed numbers depend on the
    processor's vector instructions, so the same seed would give slightly different weights on another machine, and
    training amplifies the difference.

    - ``kaiming``: as in torchvision, Kaiming for convolutions, a standard deviation of 0.01 for linear layers. This
      suits layers with 4096 inputs; with 512 inputs each layer would scale its signal by 1/6 (0.01 x sqrt(512 / 2)),
      so linear layers with fewer than 4096 inputs use Kaiming's sqrt(2 / inputs) instead.
    - ``xavier``: Glorot and Bengio 2010, uniform, for all layers; the authors of the VGG paper found that it makes
      pre-training unnecessary (section 3.1).
    - ``normal``: a standard deviation of 0.01 for all layers. (For its shallowest network, the paper gives a variance
      of 0.01, which is a standard deviation of 0.1: section 3.1.)
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.copy_(INITS[init](torch.empty_like(module.weight, dtype=torch.float64)))
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]


def _kaiming(weight: Tensor) -> Tensor:
    if weight.dim() == 4:  # a convolution
        return nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
    in_features = weight.shape[1]
    is_narrow = in_features < HEADS["imagenet"][1]
    return nn.init.normal_(weight, 0.0, math.sqrt(2.0 / in_features) if is_narrow else 0.01)


# Each function fills a weight tensor ``(out, in)`` or ``(out, in, 3, 3)`` in place and returns it.
INITS: dict[str, Callable[[Tensor], Tensor]] = {
    "kaiming": _kaiming,
    "xavier": nn.init.xavier_uniform_,
    "normal": lambda weight: nn.init.normal_(weight, 0.0, 0.01),
}


def head_for(name: str, image_size: int, requested: str = "auto") -> str:
    """The head of network ``name`` for square images of side ``image_size``: a key of ``HEADS``.

    With ``auto``, a network that ``HEADS`` lists by name gets that head; any other network gets
    ``imagenet`` from 7 x 32 = 224 pixels up, and ``small`` below.
    """
    own_head = name.partition("_bn")[0]
    by_size = "imagenet" if image_size >= HEADS["imagenet"][0] * FEATURE_STRIDE else "small"
    default = own_head if own_head in HEADS else by_size
    return default if requested == "auto" else requested


def build(name: str, *, head: str = "auto", image_size: int = 224, **options: Any) -> VGG:
    """Build a network by its name (``vgg16``, ``vgg16_bn``, ...); other options as for :class:`VGG`.

    Args:
        head: a key of ``HEADS``, or ``auto`` for the one that suits the network and ``image_size`` (``head_for``).
        image_size: side of the images in pixels; used only to choose the head.

    Raises:
        UserError: unknown name.
    """
    base_name = name[: -len("_bn")] if name.endswith("_bn") else name
    if base_name not in CONFIGURATIONS:
        raise UserError(f"unknown network {name!r}; choose from {', '.join(model_names())}")
    return VGG(CONFIGURATIONS[base_name], name.endswith("_bn"), head=head_for(name, image_size, head), **options)


def model_names() -> list[str]:
    """The names of all networks, with and without batch norm."""
    return [base_name + suffix for base_name in CONFIGURATIONS for suffix in ("", "_bn")]


def __getattr__(name: str) -> Callable[..., VGG]:
    """Return the function that builds the network ``name`` (``vgg11`` to ``vgg19_bn``); options as for ``build``."""
    if name not in model_names():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return partial(build, name)


def load_pretrained(model: nn.Module, name: str) -> list[str]:
    """Load torchvision's published ImageNet weights into ``model``, downloading them on first use.

    Layers of a different shape (another number of classes, the small head) keep their initial weights.

    Returns:
        The names of the linear layers that were not loaded, e.g. ``["classifier.6"]``.

    Raises:
        UserError: the weights are not in torch's cache and cannot be downloaded.
    """
    url, file = published_file(name)
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            checksum = file.stem.rsplit("-", 1)[1]  # the end of the file name, e.g. vgg16-397923af.pth
            torch.hub.download_url_to_file(url, str(file), hash_prefix=checksum)
        published = load_tensors(file)
    except (OSError, ValueError, RuntimeError) as error:  # urllib's errors are OSErrors
        raise UserError(
            f"--pretrained: cannot download the weights of {name} ({str(error).splitlines()[0]}); "
            f"put the file {file.name} into {file.parent} and try again"
        ) from None
    current = model.state_dict()
    matching = {key: value for key, value in published.items() if current[key].shape == value.shape}
    model.load_state_dict(matching, strict=False)
    return sorted({key.rsplit(".", 1)[0] for key in published if key not in matching})


def published_file(name: str) -> tuple[str, Path]:
    """The URL of torchvision's published weights, and the path of their file in torch's cache (it may not exist yet).

    Raises:
        UserError: torchvision does not have this network.
    """
    import torchvision.models

    if not hasattr(torchvision.models, name):
        raise UserError(f"--pretrained: torchvision has published no weights for {name}; leave out --pretrained")
    # The URL comes from torchvision's own table, which moved in version 0.13.
    if hasattr(torchvision.models, "get_model_weights"):
        url = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"].url
    else:
        url = torchvision.models.vgg.model_urls[name]
    return url, Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
