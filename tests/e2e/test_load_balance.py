"""The routing bias against the same run without it, on Python's own source.

The oracle is the run with ``bias_update_speed`` 0. With the auxiliary loss off in both, MaxVio over the last 40 of 200
steps was 1.1 to 1.7 with the bias and 2.3 to 2.9 without it over five seeds, 0.42 to 0.66 of it with the same seed.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

import pytest
import yaml

from tests.e2e.command import ROOT, Run

STEPS, ROWS, SEQ_LEN = 200, 8, 128


def _run(folder: Path, name: str, bias_update_speed: float | None = None, seed: int = 0) -> Run:
    settings = yaml.safe_load((ROOT / "configs/pretrain/tiny.yaml").read_text(encoding="utf-8"))
    model, data = settings["model"]["init_args"], settings["data"]["init_args"]
    model |= {"config": str(ROOT / "configs/model/tiny.yaml"), "total_tokens": STEPS * ROWS * SEQ_LEN}
    model["balance_loss_alpha"] = 0.0
    if bias_update_speed is not None:
        model["bias_update_speed"] = bias_update_speed
    data |= {"sources": [f"{Path(os.__file__).parent}/*.py"], "folder": "prepared"}
    data |= {"batch_size": ROWS, "seq_len": SEQ_LEN, "val_fraction": 0.05}
    settings["trainer"] |= {"val_check_interval": STEPS, "limit_val_batches": 1}
    settings |= {"seed_everything": seed, "checkpoints": {"every_n_steps": STEPS}}
    settings["samples"]["every_n_steps"] = STEPS
    return Run(folder, settings, name)


@pytest.mark.slow
def test_the_bias_spreads_the_load_and_leaves_no_expert_dead(tmp_path: Path) -> None:
    with_bias, without = _run(tmp_path, "with"), _run(tmp_path, "without", bias_update_speed=0.0)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(Run.attempt, (with_bias, without)))
    violation = {run.name: list(run.logged()["moe/max_violation"].values()) for run in (with_bias, without)}
    assert [len(values) for values in violation.values()] == [STEPS, STEPS]
    last = {name: mean(values[-40:]) for name, values in violation.items()}
    assert last["with"] < 0.8 * last["without"]
    assert last["with"] < 0.8 * mean(violation["with"][:40]), "it falls"
    assert with_bias.logged()["moe/dead_experts"][STEPS - 1] == 0
