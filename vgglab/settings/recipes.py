"""Named sets of settings, such as ``--recipe seed``. Other flags override their values.

The cost of a recipe is given in images: epochs x training images. An image costs 92.65 GFLOP for VGG16 at 224 pixels
(``python -m vgglab.anatomy``). ``python -m vgglab.plan --recipe NAME`` converts it to hours.
"""

from __future__ import annotations

from typing import NamedTuple


class Recipe(NamedTuple):
    """A named set of settings."""

    data: str  # the data set it is meant for, "imagenet" or "digits"; the default for ``vgglab plan``
    flags: str  # as on a command line


RECIPES = {
    # The original example's 90-epoch command, per card. Its --num-classes=1000 is omitted: it follows from the data.
    # Cost: 115 million images on ImageNet. Result published by Enflame for a T20 in FP32: 71.3 % top-1. We have not run
    # it on ImageNet; on Fashion-MNIST with --fast, 90 epochs of 7,680 images, 5 seeds on an H200 (recorded/): VGG16
    # 89.29 % (standard deviation 0.17), VGG16-BN 91.21 % (0.11).
    "seed": Recipe(
        "imagenet",
        "--model vgg16 --batch-size 192 --epochs 90 --workers 8 --dropout-rate 0.5 "
        "--lr 0.01 --lr-schedule step --warmup 5 --weight-decay 1e-4 --print-freq 20 --skip-steps 5",
    ),
    # Simonyan and Zisserman 2014, section 3.1: batches of 256, momentum, the learning rate divided by ten whenever the
    # held-out accuracy stops improving (three times in their 74 epochs), scale jitter from 256 to 512. Their colour
    # shift is left out. They initialised deep networks with weights of configuration A, but later found Glorot's
    # initialisation sufficient, which this recipe uses.
    # Cost: 95 million images on ImageNet. Published result: 25.6 % top-1 error for configuration D (table 3, at the
    # single test scale 384, whereas vgglab evaluates a centre crop of 224). We have not run it.
    "paper": Recipe(
        "imagenet",
        "--model vgg16 --batch-size 256 --epochs 74 --dropout-rate 0.5 --init xavier "
        "--lr 0.01 --lr-schedule plateau --warmup 0 --weight-decay 5e-4 --crops scale-jitter",
    ),
    # Current practice for the same network, based on torchvision's second set of recipes (2021), with a larger weight
    # decay, which small data sets need. It needs batch norm: --model vgg16_bn.
    # Cost: 256 million images on ImageNet, 10 million on CIFAR-10. Result: on Fashion-MNIST with --fast, 90 epochs of
    # 7,680 images, 5 seeds on an H200 (recorded/): 92.11 % (standard deviation 0.21); `seed` reached 91.21 % on the
    # same number of images. It is meant for long runs: with only 8 epochs of 6,400 images (one seed each, 2,560
    # held-out images), it reached 23.6 %, and `seed` 79.6 %.
    "modern": Recipe(
        "imagenet",
        "--model vgg16_bn --batch-size 128 --epochs 200 --dropout-rate 0 --lr 0.1 --nesterov "
        "--lr-schedule cosine --warmup 5 --weight-decay 5e-4 --no-bias-weight-decay "
        "--crops trivial --label-smoothing 0.1 --mixup 0.2 --cutmix 1 --ema 0.999",
    ),
    # Takes minutes on a laptop.
    # Cost: 8,622 images of 32 pixels on the digits, 2 minutes on 2 cores (make run). Result: see the README.
    "quick": Recipe(
        "digits",
        "--model vgg16_bn --batch-size 32 --epochs 6 --lr 0.1 --lr-schedule cosine --warmup 1",
    ),
}
