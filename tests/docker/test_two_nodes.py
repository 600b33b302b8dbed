"""A node lost in mid-run, rehearsed in two network namespaces. The oracle: the same run undisturbed, bitwise."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.e2e.command import ROOT, config, write_corpus

NUM_STEPS = 60


def _namespaces() -> bool:
    """Tell whether network namespaces can be made here."""
    if os.geteuid() or not shutil.which("ip"):
        return False
    name = f"ds-trial-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    return made and subprocess.run(["ip", "netns", "delete", name], capture_output=True).returncode == 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a corpus and a run of an appreciable number of steps."""
    if not _namespaces():
        pytest.skip("no network namespaces here: they need Linux, root and the program ip")
    settings = config(model__init_args__total_tokens=NUM_STEPS * 8 * 64)
    del settings["trainer"]["callbacks"]
    write_corpus(tmp_path / "corpus")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings), encoding="ascii")
    return tmp_path


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("how", [[], ["--lose", "0"], ["--silent"]], ids=["killed", "meeting-place", "silent"])
def test_a_run_that_loses_a_node_ends_with_the_same_weights(folder: Path, how: list[str]) -> None:
    command = [sys.executable, str(ROOT / "scripts/two_nodes"), "--out", "runs", "--at", "20", *how, "--limit", "800"]
    options = ["--config", "run.yaml", "--config", str(ROOT / "configs/trainer/zero2.yaml")]
    done = subprocess.run([*command, "--", *options], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    undisturbed, disturbed, weights = done.stdout.splitlines()
    assert json.loads(undisturbed.split(maxsplit=1)[1])["starts_of_nodes"] == [1, 1]
    figures = json.loads(disturbed.split(maxsplit=1)[1])
    assert figures["starts_of_nodes"] == ([2, 2] if "0" in how else [1, 2])
    assert 20 <= figures["lost_after_checkpoint"] < NUM_STEPS == figures["last_step"]
    assert weights.startswith("final weights: the same bits")
    named = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert "ds-" not in named, "nothing is left of the nodes"
