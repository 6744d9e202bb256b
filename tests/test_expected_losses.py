"""The training's losses are the recorded ones on any processor, and a wrong step would be noticed."""

from importlib.metadata import version

import expected_losses
import pytest
from expected_losses import (
    BEFORE,
    FAULTS,
    NETWORKS,
    in_float64,
    measure,
    read_reference,
    tolerance_ratio,
    with_fault,
)
from processes import python

CAN_SIMULATE = tuple(int(part) for part in version("torch").split(".")[:2]) >= (2, 10)


@pytest.mark.parametrize("network", NETWORKS)
def test_float64_losses_are_the_recorded_ones(network):
    record, found = read_reference()[network], in_float64(network, run=python)
    assert len(found["losses"]) == 9
    assert tolerance_ratio(found, record, "float64") <= 1
    assert found["acc1"] == record["acc1"]


@pytest.mark.parametrize("device", ["cpu", "gcu-sim"])
def test_float32_losses_differ_from_them_by_rounding(device):
    if device == "gcu-sim" and not CAN_SIMULATE:
        pytest.skip("the simulated card needs torch 2.10")
    record, found = read_reference()["vgg11"], measure("vgg11", device, run=python)
    assert 0 < tolerance_ratio(found, record, "float32") <= 1
    assert found["simulated"] is (device == "gcu-sim")


IN_TRAINING = [fault for fault in FAULTS if fault != "evaluated in training mode"]


@pytest.mark.parametrize("fault", IN_TRAINING)
def test_a_fault_in_training_shows_within_three_steps(fault):
    flags = ("--training-step-per-epoch=3", "--eval-step-per-epoch=1")
    found, record = with_fault("vgg11", fault, *flags, run=python), read_reference()["vgg11"]
    pairs = zip(found["losses"][:3], record["losses"], record["tolerances"]["float64"])
    assert max(abs(loss - wanted) / wanted / allowed for loss, wanted, allowed in pairs) > 10


def test_a_fault_in_the_evaluation_shows_in_its_loss():
    found, record = with_fault("vgg11_bn", "evaluated in training mode", run=python), read_reference()["vgg11_bn"]
    assert tolerance_ratio({**found, "losses": [*found["losses"][:-1], record["losses"][-1]]}, record, "float64") <= 1
    assert tolerance_ratio(found, record, "float64") > 10


def test_each_fault_is_a_flag_or_changes_the_code():
    assert all(fault.startswith("--") or fault in BEFORE for fault in FAULTS)


@pytest.mark.parametrize(("factor", "code"), [(1, 0), (1.1, 1)])
def test_the_script_ends_with_1_where_losses_differ(monkeypatch, capsys, factor, code):
    def losses_of(network, *_):
        return {"losses": [factor * loss for loss in read_reference()[network]["losses"]]}

    monkeypatch.setattr(expected_losses, "in_float64", losses_of)
    monkeypatch.setattr(expected_losses, "measure", losses_of)
    monkeypatch.setattr("sys.argv", ["expected_losses.py"])
    assert expected_losses.main() == code
    assert ("DIFFERS" in capsys.readouterr().out) is bool(code)
