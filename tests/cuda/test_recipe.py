"""A recipe on one GPU: pretraining, GRPO, rejection sampling and SFT. The oracle: the recipe's list of stages."""

import math
from pathlib import Path

import pytest

from ds_lightning.models.hf import load_hf
from tests.e2e.test_recipe import STAGES, RecipeRun, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_all_stages_run_on_the_gpu_and_are_booked(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    write_recipe(tmp_path, trainer__accelerator="gpu", trainer__precision="bf16-mixed")
    run = RecipeRun(tmp_path, "recipe")
    assert run.attempt()
    ledger = run.ledger()
    assert ledger["chain"] == "ok"
    assert set(ledger["stages"]) == set(STAGES)
    hidden = load_hf(tmp_path / "recipe" / STAGES[-1] / "weights").embed_tokens.weight
    assert math.isfinite(float(hidden.norm()))
    energies = {name: stage["energy"] for name, stage in ledger["stages"].items()}
    print(energies)
    assert all(energy["kwh"] > 0 for energy in energies.values()), "needs pynvml, of the extra gpu"
