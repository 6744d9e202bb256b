"""vgglab.model compared with torchvision and the paper."""

import json
import os
import re

import pytest
import torch
import torchvision
from conftest import PROJECT, shell
from processes import NARROW_VGG11, python

import vgglab.model as models
from vgglab import anatomy, load_network
from vgglab.commands import call
from vgglab.errors import UserError
from vgglab.settings import choices
from vgglab.settings.choices import MODELS
from vgglab.settings.config import Request

# Table 2 of the paper: millions of parameters with 1000 classes.
PAPER_MILLIONS = {"vgg11": 133, "vgg13": 133, "vgg16": 138, "vgg19": 144}


def randomised(model):
    """Randomise all parameters and buffers, so that no layer is an identity; running variances stay positive."""
    generator = torch.Generator().manual_seed(1)
    for name, value in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        values = torch.empty_like(value).uniform_(-0.1, 0.1, generator=generator)
        value.copy_(values.abs() + 0.5 if name.endswith("running_var") else values)
    return model.eval()


@pytest.mark.parametrize("name", [name for name in MODELS if hasattr(torchvision.models, name)])
def test_same_weights_give_the_same_logits_as_torchvision(name, monkeypatch):
    for layer in (torch.nn.Conv2d, torch.nn.Linear):  # skip PyTorch's initialisation, since it is overwritten
        monkeypatch.setattr(layer, "reset_parameters", lambda _: None)
    theirs = randomised(getattr(torchvision.models, name)(init_weights=False))
    ours = models.build(name, init_weights=False).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))
    theirs.load_state_dict(ours.state_dict())  # and back: same names, same order
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize(("name", "millions"), PAPER_MILLIONS.items())
def test_parameter_counts_match_the_paper(name, millions):
    count = sum(p.numel() for p in models.build(name, init_weights=False).parameters())
    assert round(count / 1e6) == millions


@pytest.mark.parametrize("name", models.CONFIGURATIONS)
def test_each_configuration_has_the_stride_that_the_head_expects(name):
    """The adaptive pooling would hide a mismatch."""
    assert 2 ** models.CONFIGURATIONS[name].count("M") == models.FEATURE_STRIDE


def test_the_small_head_omits_the_large_linear_layer():
    assert models.head_for("vgg16", 32) == "small"
    assert models.head_for("vgg16", 224) == "imagenet"
    small = models.vgg16(num_classes=10, head="small")
    assert small(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    in_classifier = sum(p.numel() for p in small.classifier.parameters())
    assert in_classifier < 0.01 * 25088 * 4096


@pytest.fixture
def _with_network_plain(monkeypatch):
    """Add the network ``plain``, which has its own head and no number in its name."""
    monkeypatch.setitem(models.CONFIGURATIONS, "plain", NARROW_VGG11)
    monkeypatch.setitem(models.HEADS, "plain", (2, 24))
    monkeypatch.setitem(choices.HEADS, "plain", "")
    options = Request.__dataclass_fields__["model"].metadata["options"]
    monkeypatch.setitem(options, "choices", (*MODELS, "plain", "plain_bn"))


@pytest.mark.usefixtures("_with_network_plain")
@pytest.mark.parametrize("name", ["plain", "plain_bn"])
def test_a_networks_own_head_is_recorded_resumed_planned_and_analysed(name, train, images, capsys):
    """The head was chosen by image size in four places, so config.json recorded ``small`` for such a network."""
    run = train(f"--model={name}").run
    resumed = train(f"--resume={run.path}", base=("--device=cpu", "--workers=0", "--epochs=2")).run
    for each in (run, resumed):
        assert (each.config["model"], each.config["head"]) == (name, "plain")
        assert load_network(each, "last").classifier[0].weight.shape == (24, 512 * 2 * 2)
    flags = [f"--model={name}", f"--data-path={images}", "--image-size=32", "--batch-size=4", "--images-per-second=9"]
    assert call("plan", [*flags, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out.splitlines()[-1])["checkpoint_bytes"]
    assert planned == pytest.approx(run.checkpoint("last").stat().st_size, rel=0.05)
    built = getattr(models, name)(num_classes=3)
    built.load_state_dict(load_network(run, "last").state_dict())  # raises an error if a shape differs
    num_parameters = sum(weight.numel() for weight in built.parameters())
    assert anatomy.of(name, 32, num_classes=3).num_parameters == num_parameters


@pytest.mark.usefixtures("_with_network_plain")
def test_a_requested_head_replaces_the_networks_own(train):
    run = train("--model=plain", "--head=small").run
    assert run.config["head"] == "small"
    assert load_network(run, "last").classifier[0].weight.shape == (512, 512)


def test_each_model_name_has_a_function_with_that_architecture():
    assert models.model_names() == list(MODELS)
    for name in MODELS:
        network = getattr(models, name)(num_classes=3, head="small", dropout_rate=0.25, init_weights=False)
        num_norms = sum(isinstance(m, torch.nn.BatchNorm2d) for m in network.modules())
        num_convolutions = sum(isinstance(m, torch.nn.Conv2d) for m in network.modules())
        number = re.match(r"vgg(\d+)", name)  # counts the layers with weights
        assert num_norms == (num_convolutions if name.endswith("_bn") else 0)
        assert number is None or num_convolutions + 3 == int(number[1])
        assert {m.p for m in network.modules() if isinstance(m, torch.nn.Dropout)} == {0.25}


def test_initial_weights_have_torchvisions_standard_deviation(monkeypatch):
    """With 3 x 3 instead of 7 x 7 positions, the first linear layer still has more than 4096 inputs."""

    def mark_as_missing(layer):  # faster than PyTorch's own initialisation, which is overwritten
        for parameter in layer.parameters(recurse=False):
            torch.nn.init.constant_(parameter, float("nan"))

    for layer in (torch.nn.Conv2d, torch.nn.Linear):
        monkeypatch.setattr(layer, "reset_parameters", mark_as_missing)
    monkeypatch.setitem(models.HEADS, "imagenet", (3, 4096))
    theirs = torchvision.models.vgg11(num_classes=10).state_dict()
    ours = models.vgg11(num_classes=10).state_dict()
    for name, value in theirs.items():
        if name.endswith("weight") and value.numel() > 50_000:
            assert ours[name].std().item() == pytest.approx(value.std().item(), rel=0.05), name
        if name.endswith("bias"):
            assert not ours[name].any()


def test_a_seed_gives_the_same_initial_weights_on_any_processor():
    """PyTorch's normal float32 numbers depend on the vector instructions, which are detected when torch is imported."""
    code = (
        "import hashlib, torch; from vgglab import model; torch.manual_seed(1)\n"
        "weights = model.vgg11(num_classes=10, head='small').state_dict().values()\n"
        "print(hashlib.sha256(b''.join(weight.numpy().tobytes() for weight in weights)).hexdigest())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    older = {**environment, "ATEN_CPU_CAPABILITY": "default"}  # has an effect only in a new interpreter
    printed = [
        run.stdout.split() for run in (python("-c", code, env=environment), shell("python", "-c", code, env=older))
    ]
    assert len(printed[0]) == 1
    assert printed[0] == printed[1]


def test_an_unknown_name_is_refused_with_a_list_of_names():
    with pytest.raises(UserError, match=r"vgg12.*vgg11, vgg11_bn"):
        models.build("vgg12")
    with pytest.raises(UserError):
        models.build("vgg16_bn_bn")


def test_pretrained_without_internet_explains_the_manual_download(monkeypatch):
    def fail_to_download(*_args, **_options):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail_to_download)
    with pytest.raises(
        UserError,
        match=r"--pretrained: cannot download the weights of vgg13.*put the file vgg13-\w+\.pth into .*checkpoints",
    ):
        models.load_pretrained(models.vgg13(init_weights=False), "vgg13")
