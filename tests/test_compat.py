"""What a training does without: the compiler that torch imports, unasked, where nothing is compiled."""

import pytest
from conftest import shell

AVERAGE = """
import os, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from vgglab.compat import averaging_without_compiler
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)

def gradients(wrap):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    model = wrap(network, gradient_as_bucket_view=True)
    for _ in range(2):
        model(torch.ones(5, 3)).square().sum().backward()
    return [weight.grad.clone() for weight in network.parameters()], model

ours, model = gradients(averaging_without_compiler)
print("compiler:", "torch._dynamo" in sys.modules, isinstance(model, DistributedDataParallel))
theirs, _ = gradients(DistributedDataParallel)
print("same:", all(map(torch.equal, ours, theirs)))
"""


def test_ranks_average_without_importing_the_compiler(tmp_path):
    pytest.importorskip("torch")
    result = shell("python", "-c", AVERAGE, tmp_path / "meeting")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["compiler: False True", "same: True"]
