"""The folder that the runs of one file share."""

from pathlib import Path

import pytest

from tests.e2e.command import write_corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus."""
    folder = tmp_path_factory.mktemp("runs")
    write_corpus(folder / "corpus")
    return folder
