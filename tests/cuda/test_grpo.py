"""Reinforcement learning by the real command on one GPU. The oracles: what is asked for, and the same run again."""

from pathlib import Path

import pytest
import yaml

from ds_lightning.models.hf import load_hf
from tests.callbacks.toy_run import differences
from tests.e2e.command import ROOT, Run
from tests.e2e.test_zero_rollouts import REWARDS, settings
from tests.training.toy_rollouts import VOCAB_SIZE


@pytest.mark.parametrize("trainer", ["gpu1", "zero3"])
def test_a_run_learns_from_its_own_answers_and_books_them(tmp_path: Path, trainer: str) -> None:
    values = settings(tmp_path, {"function": f"{REWARDS}:counts"})
    file = ROOT / "configs" / "trainer" / f"{trainer}.yaml"
    del values["trainer"]["strategy"]
    values["trainer"] |= yaml.safe_load(file.read_text(encoding="utf-8"))["trainer"]
    values["data"]["init_args"] |= {"rollouts": 4, "steps_per_rollout": 2}
    run, again = (Run(tmp_path, values, name).attempt() for name in ("grpo", "again"))
    logged = run.logged()
    assert sorted(logged["train/loss"]) == sorted(logged["reward"]) == list(range(8))
    assert max(logged["sampling/gap_logprob_max"].values()) < 0.1, "bf16, logits of size one"
    assert load_hf(run.out / "weights").config.vocab_size == VOCAB_SIZE
    ledger = run.ledger()
    assert ledger["chain"] == "ok"
    assert {"rollout", "reward", "train"} <= ledger["phases"].keys()
    assert logged == again.logged()
    assert differences(run.exported(), again.exported()) == []
