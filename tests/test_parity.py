"""Training matches a plain torchvision loop: same weights, same batches, same recipe, same losses."""

from dataclasses import replace

import pytest
import torch
import torchvision
from torch import nn

from vgglab.data.loader import train_batches
from vgglab.data.sets import open_sets
from vgglab.data.transform import CHANNEL_MEAN, CHANNEL_STD
from vgglab.devices import open_device
from vgglab.model import build
from vgglab.settings.parser import parse_flags

pytestmark = pytest.mark.paper_widths
NUM_STEPS, EPOCHS = 50, 13  # 4 steps an epoch
FLAGS = ("--init=kaiming", "--lr=0.1", "--warmup=3", f"--epochs={EPOCHS}", "--wd=0.0005", "--seed=3", "--print-freq=1")


def original_learning_rate(epoch):
    base = 0.1 * 4 / 256
    return base * (epoch + 1) / 3 if epoch < 3 else base


def losses_of_a_plain_loop(config):
    """Train without vgglab, except for the order of the images, their crops and the initial weights."""
    sets = open_sets(config)
    torch.manual_seed(3)
    ours = build("vgg11", num_classes=3, head="small", dropout_rate=0.0)
    model = torchvision.models.vgg11(num_classes=3, init_weights=False)
    # Its classifier is 4096 wide (120 million weights); for images of 32 pixels, 512 is enough.
    model.avgpool = nn.AdaptiveAvgPool2d((1, 1))
    model.classifier[0], model.classifier[3], model.classifier[6] = (
        nn.Linear(512, 512),
        nn.Linear(512, 512),
        nn.Linear(512, 3),
    )
    model.load_state_dict(ours.state_dict())
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.0005)
    loss_of, losses = nn.CrossEntropyLoss(), []
    normalise = torchvision.transforms.Normalize(CHANNEL_MEAN, CHANNEL_STD)
    batches = train_batches(sets, config, open_device("cpu"))
    for epoch in range(EPOCHS):
        for group in optimizer.param_groups:
            group["lr"] = original_learning_rate(epoch)
        for batch in batches.epoch(epoch):
            images = normalise(batch.images.permute(0, 3, 1, 2).contiguous().float() / 255)
            loss = loss_of(model(images), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses[:NUM_STEPS]


def test_fifty_steps_match_a_plain_torchvision_loop(train, images):
    run = train(*FLAGS).run
    ours = [event["loss"] for event in run.events("train")][:NUM_STEPS]
    config = parse_flags(
        [*FLAGS, "--model=vgg11", "--image-size=32", "--batch-size=4", "--workers=0", f"--data-path={images}"]
    )
    config = replace(config, num_classes=3)
    theirs = losses_of_a_plain_loop(config)
    assert len(ours) == NUM_STEPS
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours[0] != ours[-1]
