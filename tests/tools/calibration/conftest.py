"""A calibration that has run, which several files look at."""

from dataclasses import replace

import optuna
import pytest

from tests.helpers.calibration import sensitivity_table
from tests.helpers.calibration_run import AFTER_SENSITIVITY, STATICS, calibration


@pytest.fixture(scope="session", autouse=True)
def quiet_optuna():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Folder, table and engines of a calibration that has run."""
    out = tmp_path_factory.mktemp("calibration")
    table = sensitivity_table(10)
    layers = [replace(layer, transforms=STATICS) if layer.index in (2, 3) else layer for layer in table.layers]
    table = replace(table, layers=tuple(layers))
    evaluators = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        made = calibration(out, table, evaluators, monkeypatch)
        for stage in AFTER_SENSITIVITY:
            made.run(stage)
    return out, table, evaluators
