"""The real command: reinforcement learning on two ranks under ZeRO 3, to its end, and with a reward that raises on one.

The oracle is what the test asks for: the number of steps and validations, the shape of the model, the fault.
"""

import re
from pathlib import Path
from typing import Any

import pytest

from ds_lightning.models.hf import load_hf
from tests.e2e.command import ROOT, Run
from tests.training.toy_rollouts import VOCAB_SIZE, write_tokenizer

pytestmark = pytest.mark.soak

REWARDS = ROOT / "tests" / "rl" / "reward_functions.py"


def settings(folder: Path, reward: dict[str, Any]) -> dict[str, Any]:
    """Return a run of two rollouts of three problems; the ranks share one of them."""
    problems = folder / "letters.jsonl"
    problems.write_text("".join(f'{{"prompt": "{letter}", "answer": "e"}}\n' for letter in "abc"), encoding="ascii")
    shape = {
        **{"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48},
        **{"num_attention_heads": 2, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8},
        **{"v_head_dim": 8, "first_k_dense_replace": 1, "n_routed_experts": 8, "num_experts_per_tok": 2},
        **{"n_shared_experts": 1, "moe_intermediate_size": 16, "max_position_embeddings": 64},
    }
    task = {
        "class_path": "ds_lightning.rl.tasks.JsonLinesTask",
        "init_args": {"path": str(problems), "check": "exact", "held_out_share": 0.0},
    }
    data = {"task": task, "rewards": [reward], "tokenizer": write_tokenizer(folder), "rollouts": 2, "prompts": 3}
    validation = {"task": task, "problems": 3, "problems_on_the_way": 3, "max_new_tokens": 4}
    return {
        "model": {
            "class_path": "ds_lightning.training.GRPOModule",
            "init_args": {"config": shape, "lr": 3e-3, "beta": 0.1},
        },
        "data": {
            "class_path": "ds_lightning.rl.rollouts.RolloutDataModule",
            "init_args": {**data, "num_generations": 4, "max_completion_length": 6, "workers": 1},
        },
        "trainer": {
            **{"accelerator": "cpu", "devices": 2, "log_every_n_steps": 1, "val_check_interval": 1},
            "strategy": {"class_path": "ds_lightning.training.ZeRO", "init_args": {"stage": 3}},
            "callbacks": [{"class_path": "ds_lightning.callbacks.PassAtOne", "init_args": validation}],
        },
        "checkpoints": {"every_n_steps": 1},
        "samples": {"every_n_steps": 1, "prompts": ["a"], "max_new_tokens": 4},
    }


def test_a_run_ends_with_weights_and_figures_of_all_ranks(tmp_path: Path) -> None:
    reward = {"function": f"{REWARDS}:counts"}
    run = Run(tmp_path, settings(tmp_path, reward), "grpo").attempt()
    assert load_hf(run.out / "weights").config.vocab_size == VOCAB_SIZE
    logged = run.logged()
    assert sorted(logged["reward"]) == sorted(logged["train/loss"])
    assert len(logged["reward"]) == 2
    assert len(logged["val/pass_at_1"]) == 3, "on the way, and at the end"
    assert logged["frac_reward_zero_std"].keys() == logged["reward"].keys()
    assert run.ledger()["chain"] == "ok"


def test_a_reward_that_raises_on_one_rank_is_said_once(tmp_path: Path) -> None:
    reward = {"function": f"{REWARDS}:dislikes", "options": {"prompt": "c"}}
    run = Run(tmp_path, settings(tmp_path, reward), "raises").attempt(status=2)
    (line,) = [line for line in run.attempts[-1].err.splitlines() if line.startswith("ds-lightning: ")]
    assert re.match(
        r"ds-lightning: rank \d: reward 'dislikes' on completion \d: raised ValueError: I do not like c$", line
    )
    assert "Traceback" not in run.attempts[-1].err
