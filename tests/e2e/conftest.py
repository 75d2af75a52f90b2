"""The demo model, built once where ``make serve`` puts it."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2():
    """Folder of SmolLM2-135M-Instruct: KVTUNER_DEMO_MODEL if that is set, else the checkout's, built if missing."""
    from kvtuner_tools.demo import MODEL_FOLDER, build_smollm2

    if folder := os.environ.get("KVTUNER_DEMO_MODEL"):
        return Path(folder)
    folder = Path(__file__).resolve().parents[2] / MODEL_FOLDER
    build_smollm2(folder)
    return folder
