"""The names that flags accept, with a description for ``--help`` unless the name is self-explanatory.

The code behind them needs torch and is in ``data/`` (sets, crops, decoders), ``model.py`` and ``optim.py``; a test
checks that the names agree. Schedules and recipes are in their own modules, which do not need torch.
"""

from __future__ import annotations

MODELS = tuple(name + suffix for name in ("vgg11", "vgg13", "vgg16", "vgg19") for suffix in ("", "_bn"))
DATA_SETS = {
    "digits": "bundled",
    "fashion-mnist": "",
    "cifar10": "",
    "cifar100": "",
    "imagenette": "",
    "fake": "generated, to measure speed without loading images",
}
CROPS = {
    "standard": "random crop and flip",
    "scale-jitter": "as in the paper: the shorter side is resized to a random length, from 256 to 512 for crops of 224 "
    "and in proportion for other sizes",
    "trivial": "standard, then one operation of TrivialAugment",
}
INITS = {
    "kaiming": "as in torchvision",
    "xavier": "Glorot and Bengio 2010",
    "normal": "standard deviation 0.01, with which deep networks without batch norm do not learn",
}
OPTIMIZERS = ("sgd", "rmsprop")
DECODERS = {
    "fast": "simplejpeg, which skips the rows below the crop",
    "pil": "the same pixels as torchvision's reference, bit for bit",
}
HEADS = {"auto": "by image size", "imagenet": "the paper's", "small": "for small images"}
