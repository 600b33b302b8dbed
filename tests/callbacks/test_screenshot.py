"""Oracles: TensorBoard's own HTTP endpoints for the data, and coloured pixels of Chromium's picture for the charts."""

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from torch import Tensor, nn

from ds_lightning.callbacks.tensorboard_layout import CHARTS, TensorBoardLayout

STEPS = 12
WINDOW = (1400, 900)
# Where that window shows the four charts of the first section: left, top, right, bottom.
CHART_BOXES = [(360, 130, 730, 400), (730, 130, 1080, 400), (360, 440, 730, 700), (730, 440, 1080, 700)]
CURVE = (255, 112, 67)  # colour of TensorBoard's first run

LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy stands between us and this machine

pytestmark = pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")


class Spending(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        for name in (name for charts in CHARTS.values() for names in charts.values() for name in names):
            self.log(name, 0.01 * (batch_idx + 1) ** 1.5)
        loss: Tensor = self.line(batch).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def get(url: str) -> bytes:
    with LOCAL.open(url, timeout=10) as response:
        content: bytes = response.read()
    return content


def points(address: str, run: str, name: str) -> list[list[float]]:
    query = urllib.parse.urlencode({"run": run, "tag": f"^{name}$"})
    answer: dict[str, Any] = json.loads(get(f"{address}/data/plugin/custom_scalars/scalars?{query}"))
    assert answer["regex_valid"]
    found: list[list[float]] = answer["tag_to_events"].get(name, [])
    return found


def wait_for_data(address: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert server.poll() is None, f"TensorBoard ended with status {server.returncode}"
        try:
            if len(points(address, "run", "speed/step_seconds")) == STEPS:
                return
        except urllib.error.URLError:
            pass
        time.sleep(0.2)
    raise AssertionError("TensorBoard did not load the data in 60 s")


@pytest.fixture
def tensorboard(tmp_path: Path) -> Iterator[str]:
    """Train a line for a few steps, serve its log folder and yield the server's address."""
    trainer = Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=TensorBoardLogger(tmp_path / "logs", name="run", version="", default_hp_metric=False),
        callbacks=[TensorBoardLayout()],
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Spending(), torch.ones(STEPS, 1, 1))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path / "logs"), "--load_fast=false"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_data(f"http://127.0.0.1:{port}", server)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=20)


def screenshot(url: str, folder: Path) -> np.ndarray:
    picture = folder / "tensorboard_cost.png"
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--hide-scrollbars", f"--window-size={WINDOW[0]},{WINDOW[1]}", "--virtual-time-budget=20000"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--screenshot={picture}", url]
    subprocess.run(command, check=True, timeout=120, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return np.asarray(Image.open(picture).convert("RGB")).astype(int)


def test_the_custom_scalars_page_shows_cost_first_with_curves_in_it(tensorboard: str, tmp_path: Path) -> None:
    layout = json.loads(get(f"{tensorboard}/data/plugin/custom_scalars/layout"))
    assert [category["title"] for category in layout["category"]] == ["Cost", "Loss", "MoE", "Speed"]
    usd = [point[2] for point in points(tensorboard, "run", "cost/usd")]
    assert usd == pytest.approx([0.01 * (step + 1) ** 1.5 for step in range(STEPS)])

    pixels = screenshot(f"{tensorboard}/#custom_scalars", tmp_path)
    for left, top, right, bottom in CHART_BOXES:
        on_curve = np.abs(pixels[top:bottom, left:right] - CURVE).max(axis=2) < 24
        columns = np.flatnonzero(on_curve.any(axis=0))
        assert columns.size > 150, f"no curve in the chart at {left}, {top}: see {tmp_path}"
        heights = [np.flatnonzero(on_curve[:, column]).mean() for column in (columns[0], columns[-1])]
        assert heights[0] - heights[1] > 50, f"the curve at {left}, {top} does not rise: see {tmp_path}"
