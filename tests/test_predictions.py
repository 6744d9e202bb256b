"""vgglab.predict: the predictions of a trained network, from any working directory."""

import os

import pytest
from conftest import NUM_VAL

import vgglab


def test_predictions_agree_with_the_evaluation(train, images, tmp_path, monkeypatch):
    monkeypatch.chdir(images.parent)
    run = train(data=os.path.relpath(images)).run
    monkeypatch.chdir(tmp_path.parent)  # the run's data path is relative to its working directory
    predictions = vgglab.predict(run, "last")
    assert len(predictions) == 3 * NUM_VAL
    num_right = sum(prediction.is_right for prediction in predictions)
    assert 100 * num_right / len(predictions) == pytest.approx(run.events("eval")[-1]["acc1"])
    assert all(0 < prediction.probability <= 1 for prediction in predictions)
    assert {prediction.actual for prediction in predictions} == {"n01", "n02", "n03"}


def test_a_run_without_a_checkpoint_is_refused(train):
    run = train("--test-only", f"--resume={train().run.path}").run
    with pytest.raises(vgglab.UserError, match="has no best checkpoint"):
        vgglab.predict(run)
