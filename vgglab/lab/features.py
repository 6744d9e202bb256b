"""Look inside a network: layers by name, feature maps, and effective receptive fields."""

from __future__ import annotations

import io
import warnings
from typing import Any, Mapping

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from vgglab.data.decode import reason_of, to_rgb
from vgglab.data.transform import as_tensor
from vgglab.errors import UserError


def read_photograph(file: str, data: bytes | None = None, longest: int | None = 384) -> Tensor:
    """Read a photograph as ``(H, W, 3)`` uint8, with EXIF orientation applied.

    Args:
        file: path of the photograph; if ``data`` is given, only its name.
        data: content of the file; its image format is detected from the content, not from the name.
        longest: a larger photograph is reduced until its longer side has this many pixels; None keeps its size.

    Raises:
        UserError: not an image, damaged, or so large that it may be a decompression bomb.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file if data is None else io.BytesIO(data)) as image:
                upright = to_rgb(ImageOps.exif_transpose(image))  # orientation from the EXIF data
        if longest is not None:
            upright.thumbnail((longest, longest))
        return as_tensor(upright)
    except Exception as error:  # decoders raise all kinds of exceptions for a damaged file
        advice = "use a JPEG or PNG file that an image viewer can open"
        raise UserError(f"photograph: {file!r} cannot be read as an image ({reason_of(error)}); {advice}") from None


def named_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of ``network.features`` in order, named by block and number: ``conv1_1``, ..., ``pool5``."""
    kinds = {nn.Conv2d: "conv", nn.BatchNorm2d: "norm", nn.ReLU: "relu"}
    layers: dict[str, nn.Module] = {}
    block, number = 1, 0
    for layer in network.features:  # type: ignore[union-attr]
        if isinstance(layer, nn.MaxPool2d):
            layers[f"pool{block}"] = layer
            block, number = block + 1, 0
        else:
            number += isinstance(layer, nn.Conv2d)
            layers[f"{kinds[type(layer)]}{block}_{number}"] = layer
    return layers


def without_inplace_relu(network: nn.Module) -> nn.Module:
    """Put the network into evaluation mode and disable the in-place mode of its ReLUs.

    VGG's ReLUs work in place to save memory. A hook on the preceding layer would then see the output of the
    ReLU, and gradients with respect to the output of that layer could not be computed.
    """
    for layer in network.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
    return network.eval()


def feature_maps(network: nn.Module, images: Tensor, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the output of each layer for normalised ``images`` (N, 3, H, W), by name: ``(N, channels, h, w)``."""
    maps: dict[str, Tensor] = {}

    def make_hook(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            maps[name] = output
            return output.clone()  # for the next layer, which may be an in-place ReLU

        return hook

    hooks = [layer.register_forward_hook(make_hook(name)) for name, layer in layers.items()]
    try:
        network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return maps


def effective_receptive_fields(
    network: nn.Module, images: Tensor, layers: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """Return how strongly each pixel affects the centre unit of each layer, ``(N, H, W)`` with sum 1 per image.

    The activations of the unit are summed over its channels and differentiated with respect to the normalised
    ``images`` (N, 3, H, W); the absolute gradient is summed over the colour channels. The result is all zeros if the
    unit is inactive. The weights of the network get no gradients.

    Source: Luo, Li, Urtasun and Zemel, "Understanding the Effective Receptive Field in Deep Convolutional Neural
    Networks", 2016, section 3, which averages over many images; this function does not.
    """
    images = images.detach().clone().requires_grad_()
    fields = {}
    for name, maps in feature_maps(network, images, layers).items():
        height, width = maps.shape[2:]
        centre = maps[:, :, height // 2, width // 2].sum()
        (gradient,) = torch.autograd.grad(centre, images, retain_graph=True)
        strength = gradient.abs().sum(dim=1)  # (N, H, W)
        total = strength.sum(dim=(1, 2), keepdim=True)
        fields[name] = strength / total.clamp_min(torch.finfo(total.dtype).tiny)
    return fields


def nearest(queries: Tensor, among: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Find the ``count`` rows of ``among`` (N, D) with the highest cosine similarity to each of ``queries`` (Q, D).

    Returns:
        Their similarities and indices, ``(Q, count)`` each, nearest first.
    """
    cosines = nn.functional.normalize(queries, dim=1) @ nn.functional.normalize(among, dim=1).T  # (Q, N)
    values, indices = cosines.topk(count, dim=1)
    return values, indices
