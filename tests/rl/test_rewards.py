"""Oracles: rewards worked out by hand; for failures, the message that each promises."""

from __future__ import annotations

import logging
import os
import signal
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

from ds_lightning.rl.rewards import Reward, RewardBatch, Scorer
from ds_lightning.rl.sandbox import ABANDON_AFTER, Limits

FUNCTIONS = Path(__file__).with_name("reward_functions.py")
GOOD = "<think>three and four</think><answer>7</answer>"


def reward(function: str, **settings: Any) -> Reward:
    return Reward(f"{FUNCTIONS}:{function}", **settings)


def score(rewards: list[Reward], completions: list[str], **columns: list[Any]) -> RewardBatch:
    with Scorer(rewards, workers=1, limits=Limits(seconds=2.0)) as scorer:
        return scorer.score(["?"] * len(completions), completions, columns)


def test_rewards_are_weighted_and_added_in_the_order_of_the_completions() -> None:
    rewards = [Reward("accuracy", weight=2.0), Reward("format", weight=0.5), Reward("language")]
    completions = [GOOD, "<answer>7</answer>", "7", "<think>\u0442\u0440\u0438</think><answer>8</answer>"] * 20
    with Scorer(rewards) as scorer:
        batch = scorer.score(["3+4="] * 80, completions, {"answer": ["7"] * 80})
        again = scorer.score(["3+4="] * 80, completions, {"answer": ["7"] * 80})
    assert batch == again
    assert batch.total == [3.5, 2.0, 0.0, 0.5] * 20
    assert batch.per_reward["language"] == [1.0, 0.0, 0.0, 0.0] * 20
    metrics = batch.metrics()
    for name, values in batch.per_reward.items():
        assert metrics[f"rewards/{name}/mean"] == pytest.approx(statistics.fmean(v for v in values if v is not None))
        assert metrics[f"rewards/{name}/std"] == pytest.approx(statistics.stdev(v for v in values if v is not None))
        assert metrics[f"rewards/{name}/timeout"] == metrics[f"rewards/{name}/died"] == 0


def test_a_reward_that_does_not_apply_is_left_out() -> None:
    batch = score([reward("counts", weight=10.0), Reward("accuracy")], ["", "ab", ""], answer=["1", "1", None])
    assert batch.per_reward["counts"] == [None, 2.0, None]
    assert batch.total == [0.0, 20.0, None]
    assert batch.metrics()["rewards/counts/mean"] == 2.0
    assert batch.metrics()["rewards/counts/std"] == 0.0


def test_a_users_function_gets_columns_and_options() -> None:
    rewards = [reward("scaled", name="tripled", options={"factor": 3})]
    assert score(rewards, ["a", "b"], answer=[1, 2]).per_reward == {"tripled": [3.0, 6.0]}


def test_a_function_is_found_in_a_module_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "rewards_of_a_test"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "parts.py").write_text("value = 4.0\n")
    source = (
        "from rewards_of_a_test.parts import value\ndef four(prompts, completions, **columns):\n    return [value]\n"
    )
    (package / "functions.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert score([Reward("rewards_of_a_test.functions:four")], ["a"]).total == [4.0]
    assert "rewards_of_a_test.functions" not in sys.modules


def test_messages_and_odd_characters_arrive() -> None:
    with Scorer([reward("counts")], workers=1) as scorer:
        batch = scorer.score([[{"role": "user", "content": "?"}]] * 2, ["\x00\ud800\n\u2028", "x" * 300_000])
    assert batch.total == [4.0, 300_000.0]


def test_an_empty_batch_has_no_rewards() -> None:
    assert score([Reward("format")], []).total == []


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("raises", "reward 'raises' on completion 1: raised KeyError: 'no such thing.*as this'"),
        ("too_many", "reward 'too_many' on completion 0: returned 2 values for 1 completion, expected one each"),
        ("not_a_number", "reward 'not_a_number' on completion 0: returned nan, expected a finite number"),
        ("text", "reward 'text' on completion 0: returned 'high', expected a number or None"),
        ("no_list", "reward 'no_list' on completion 0: returned a float, expected a list with one number or None"),
    ],
)
def test_a_function_that_is_wrong_ends_the_run(function: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        score([Reward("format"), reward(function)], ["good", "bad", "good"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("function", ["never_returns", "leaves"])
def test_a_function_that_answers_no_call_ends_the_run(function: str) -> None:
    limits = Limits(seconds=0.3)
    message = f"reward '{function}' on completion .: answered none of {ABANDON_AFTER} calls within its limits"
    with (
        Scorer([Reward("format"), reward(function)], limits=limits) as scorer,
        pytest.raises(RuntimeError, match=message),
    ):
        scorer.score([""] * 20, [""] * 20)


def test_a_function_that_answers_no_call_of_a_batch_ends_the_run_even_if_it_once_did() -> None:
    with Scorer([reward("runs")], limits=Limits(seconds=2.0)) as scorer:
        assert scorer.score([""], ["1"]).total == [1.0]
        assert scorer.score([""] * 3, ["bytearray(1 << 40)"] * 3).total == [0.0] * 3
        with pytest.raises(RuntimeError, match="answered none of 9 calls within its limits"):
            scorer.score([""] * 9, ["bytearray(1 << 40)"] * 9)


def test_a_completion_that_takes_too_long_costs_its_reward_alone() -> None:
    completions = ["1", "while True: pass", "1", "import os; os._exit(1)", "1", "bytearray(1 << 40)"]
    runs = [reward("runs", name="zero"), reward("runs", name="none", cut_short=None), Reward("format")]
    with Scorer(runs, workers=2, limits=Limits(seconds=1.0)) as scorer:
        batch = scorer.score([""] * 6, completions)
        assert scorer._pool is not None
        assert scorer._pool.restarts == 4
    assert batch.per_reward["zero"] == [1.0, 0.0] * 3
    assert batch.per_reward["none"] == [1.0, None] * 3
    assert batch.per_reward["format"] == [0.0] * 6
    assert batch.cut_short["zero"] == {"timeout": 1, "died": 1, "refused": 1}
    assert batch.metrics()["rewards/zero/timeout"] == 1


def test_processor_time_is_limited_too() -> None:
    limits = Limits(seconds=30.0, cpu_seconds=0.5)
    with Scorer([reward("runs")], workers=1, limits=limits) as scorer:
        batch = scorer.score([""] * 2, ["1", "while True: pass"])
    assert batch.total == [1.0, 0.0]
    assert batch.cut_short["runs"]["timeout"] == 1


def test_a_process_that_was_killed_is_replaced() -> None:
    with Scorer([Reward("format")], workers=1) as scorer:
        assert scorer._pool is not None
        worker = scorer._pool._workers[0]
        os.kill(worker.process.pid, signal.SIGKILL)
        worker.process.wait()
        batch = scorer.score([""] * 3, [GOOD] * 3)
        assert sum(value == 1.0 for value in batch.total) >= 2
        assert scorer._pool.restarts == 1


def test_nothing_is_left_behind() -> None:
    with Scorer([Reward("format")]) as scorer:
        assert scorer._pool is not None
        workers = list(scorer._pool._workers)
        assert all(Path(worker.folder).is_dir() for worker in workers)
    assert not any(Path(worker.folder).exists() for worker in workers)
    assert all(worker.process.returncode is not None for worker in workers)
    assert scorer.protections == []


def test_missing_protections_are_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ds_lightning.rl.rewards")
    with Scorer([Reward("format")], workers=1, layers=["limits", "audit hook"]) as scorer:
        assert scorer.protections == ["limits", "audit hook"]
    assert caplog.messages == [
        "scoring processes are protected by limits, audit hook",
        "scoring processes run without landlock, network namespace, seccomp",
    ]


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([], r"the rewards are named \[\], expected at least one and no name twice: set name"),
        ([Reward("format"), Reward("format")], r"the rewards are named \['format', 'format'\], expected at least one"),
        ([Reward("acuracy")], "reward 'acuracy': expected one of accuracy, .* module:function or file.py:function"),
        ([Reward("nothing_there:f")], "reward 'nothing_there:f': there is no module 'nothing_there'"),
        ([Reward("nowhere/f.py:f")], "reward 'nowhere/f.py:f': there is no file '.*/nowhere/f.py'"),
        ([Reward("language", options={"code": "en"})], "reward 'language' has no option 'code', expected some of"),
    ],
)  # fmt: skip
def test_a_reward_that_cannot_be_is_refused(rewards: list[Reward], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scorer(rewards)


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="workers is 0, expected at least 1"):
        Scorer([Reward("format")], workers=0)
    with pytest.raises(ValueError, match=r"limits\.seconds is 0, expected a number above 0"):
        Limits(seconds=0)
    with (
        Scorer([Reward("format")], workers=1) as scorer,
        pytest.raises(ValueError, match="answer holds 1 values, expected one for each of 2 completions"),
    ):
        scorer.score(["", ""], ["", ""], {"answer": ["1"]})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import nothing_there", "reward .*bad.py:f: ModuleNotFoundError: No module named 'nothing_there'"),
        ("g = 1", "reward .*bad.py:f: ValueError: there is no function 'f', expected one of that name"),
        ("import time; time.sleep(60)", r"the reward functions were not imported within limits.start_seconds = 9\.0"),
        ("import os; os._exit(3)", "a scoring process ended with status 3 before it was ready"),
    ],
)
def test_a_function_that_cannot_be_imported_is_told_before_the_run(tmp_path: Path, source: str, message: str) -> None:
    path = tmp_path / "bad.py"
    path.write_text(source)
    scorer = Scorer([Reward(f"{path}:f")], workers=1, limits=Limits(start_seconds=9.0))
    with pytest.raises(ValueError, match=message):
        scorer.__enter__()
