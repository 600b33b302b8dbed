"""What all tests on a GPU share: they are skipped where there is none, and run as training does, not in determinism."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_lightning.config import DeepSeekConfig
from ds_lightning.models import DeepSeek
from ds_lightning.models.hf import save_hf
from tests.cuda.runs import START
from tests.e2e.command import MODEL, write_corpus

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder; the file above skips what is marked where there is no device."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def _no_error_for_what_is_not_deterministic(_reproducible: None) -> None:
    """Keep unwritten memory NaN, and let the products run without the workspace that bitwise repetition asks for."""
    torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture(autouse=True, scope="session")
def _device() -> None:
    """Leave in the environment what CUDA and Lightning leave there, before those of a file are compared."""
    if torch.cuda.is_available():
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        torch.zeros(8, 8, device="cuda") @ torch.zeros(8, 8, device="cuda")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, and the weights that all runs start from: another device draws others."""
    folder = tmp_path_factory.mktemp("runs")
    write_corpus(folder / "corpus")
    shape: dict[str, Any] = MODEL
    torch.manual_seed(0)
    save_hf(DeepSeek(DeepSeekConfig(**shape)), folder / START)
    return folder
