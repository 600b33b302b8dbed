"""Oracle: rewards worked out by hand, from the definitions in R1's and DAPO's papers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ds_lightning.rl.builtin_rewards import Text, accuracy, between, format, language, length, text_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("<answer>7</answer>", "7", 1.0),
        ("<think>1</think><answer> 7\n</answer>", "7", 1.0),
        ("<answer>1</answer> no, <answer>7</answer>", "7", 1.0),
        ("<answer>7</answer> no, <answer>1</answer>", "7", 0.0),
        ("<answer>the answer is 7</answer>", "7", 0.0),
        ("<answer>77</answer>", "7", 0.0),
        ("7", "7", 0.0),
        ("<answer>7", "7", 0.0),
        ("7</answer>", "7", 0.0),
        ("", "7", 0.0),
        ("<answer></answer>", "", 1.0),
        ("<answer>7</answer>", None, None),
        ([{"role": "assistant", "content": "<answer>7</answer>"}], "7", 1.0),
    ],
)
def test_accuracy_is_all_or_nothing(completion: Text, answer: str | None, reward: float | None) -> None:
    assert accuracy([""], [completion], answer=[answer]) == [reward]


def test_accuracy_leaves_mathematics_to_others() -> None:
    assert accuracy(["", ""], ["<answer>7</answer>"] * 2, answer=["7", "7"], check=["math", "exact"]) == [None, 1.0]


def test_math_accuracy_compares_values() -> None:
    pytest.importorskip("math_verify")
    from ds_lightning.rl.math_reward import math_accuracy

    def score(given: str, truth: str | None, **columns: list[str]) -> list[float | None]:
        return math_accuracy([""], [f"<answer>{given}</answer>"], answer=[truth], **columns)

    for given, truth, reward in (
        ("\\frac{1}{2}", "0.5", 1.0),
        ("$\\frac{2}{4}$", "1/2", 1.0),
        ("1{,}000", "1000", 1.0),
        ("x + 1", "1 + x", 1.0),
        ("0.51", "0.5", 0.0),
        ("", "0.5", 0.0),
        ("__import__('os')", "0.5", 0.0),
    ):
        assert score(given, truth) == [reward], given
    assert score("1", None) == score("1", "1", check=["exact"]) == [None]
    assert math_accuracy([""], ["1"], answer=["1"]) == [0.0]


@pytest.mark.parametrize(
    ("prompt", "completion", "reward"),
    [
        ("", "<think>a</think><answer>b</answer>", 1.0),
        ("", " \n<think>a\nb</think>\n\n<answer>b</answer>\n", 1.0),
        ("1+1=<think>\n", "a</think><answer>b</answer>", 1.0),
        ([{"role": "user", "content": "1+1="}], "<think></think><answer></answer>", 1.0),
        ("1+1=<think>\n", "<think>a</think><answer>b</answer>", 0.0),
        ("", "a</think><answer>b</answer>", 0.0),
        ("", "<think>a</think><answer>b", 0.0),
        ("", "<think>a</think>so<answer>b</answer>", 0.0),
        ("", "<think>a</think><answer>b</answer>.", 0.0),
        ("", "Well, <think>a</think><answer>b</answer>", 0.0),
        ("", "<answer>b</answer><think>a</think>", 0.0),
        ("", "<think>a<answer>b</answer></think>", 0.0),
        ("", "<think>a</think><answer>b</answer><answer>b</answer>", 0.0),
        ("", "", 0.0),
    ],
)
def test_format_is_thought_then_answer_and_nothing_else(prompt: Text, completion: str, reward: float) -> None:
    assert format([prompt], [completion]) == [reward]


@pytest.mark.parametrize(
    ("thought", "code", "reward"),
    [
        ("one two three", "en", 1.0),
        ("one \u0434\u0432\u0430 three \u0447\u0435\u0442\u044b\u0440\u0435", "en", 0.5),
        ("one \u0434\u0432\u0430 three \u0447\u0435\u0442\u044b\u0440\u0435", "ru", 0.5),
        ("so \u4f60\u597d", "zh", 2 / 3),
        ("so \u4f60\u597d", "en", 1 / 3),
        ("3 + 4 = 7", "en", 1.0),
        ("", "en", 1.0),
        ("x_1 caf\u00e9", "fr", 1.0),
    ],
)
def test_language_is_the_share_of_words_in_its_script(thought: str, code: str, reward: float) -> None:
    assert language([""], [f"<think>{thought}</think>"], language=code) == [pytest.approx(reward)]
    assert language(["<think>"], [f"{thought}</think>\u4f60"], language=code) == [pytest.approx(reward)]


def test_without_a_thought_there_is_no_reward_for_its_language() -> None:
    assert language([""], ["plain words"]) == [0.0]
    with pytest.raises(ValueError, match="language is 'tlh', expected one of ar, de, el, en"):
        language([""], [""], language="tlh")


def test_length_costs_from_a_point_on() -> None:
    tokens = [0, 16, 17, 18, 20, 30]
    rewards = length([""] * 6, [""] * 6, completion_tokens=tokens, max_tokens=20, cache_tokens=4)
    assert rewards == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
    with pytest.raises(ValueError, match="cache_tokens is 21, expected between 1 and max_tokens = 20"):
        length([""], [""], completion_tokens=[1], max_tokens=20, cache_tokens=21)


def test_text_between_tags_is_that_of_the_last_pair() -> None:
    assert between("<a>1</a><a>2</a>", "<a>", "</a>") == "2"
    assert between("</a>1<a>", "<a>", "</a>") is None
    assert text_of([]) == ""


def test_scoring_loads_no_torch() -> None:
    modules = ", ".join(f"ds_lightning.rl.{name}" for name in ("worker", "builtin_rewards", "rewards", "tasks"))
    program = f"import sys, {modules}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "sympy", "reasoning_gym"} & set(done.stdout.split())
