"""Worked problems for pretraining. The oracles: Python's arithmetic, the task's splits, counts by hand."""

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ds_lightning.data.tokenizer import special_id
from ds_lightning.rl.tasks import ReasoningGymTask
from ds_lightning.rl.worked_problems import WorkedProblemsDataModule, solve

TASK = ReasoningGymTask(
    "chain_sum",
    config={"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
    keep=": (.+) =$",
    chat=True,
    held_out_share=0.3,
)


def module(folder: Path, **options: Any) -> WorkedProblemsDataModule:
    settings: dict[str, Any] = {"worked": 300, "sources": [], "seq_len": 32, "batch_size": 4, "total_tokens": 1000}
    settings |= {"vocab_size": 300, "val_fraction": 0.1}
    return WorkedProblemsDataModule(task=TASK, folder=str(folder / "data"), **{**settings, **options})


def test_the_steps_of_a_sum_are_right() -> None:
    assert solve("12 + 7") == ("10 + 0 = 10; 2 + 7 = 9; 10 + 9 = 19", 19)
    assert solve("12 + 7 - 40", slip=-3) == (
        "10 + 0 = 10; 2 + 7 = 9; 10 + 9 = 19; 10 - 40 = -30; 9 - 0 = 9; -30 + 9 = -24",
        -24,
    )
    assert solve("-8 - 345")[0] == "0 - 300 = -300; 0 - 40 = -40; -8 - 5 = -13; -300 - 40 = -340; -340 - 13 = -353"
    assert solve("3 + 4", slip=2) == ("3 + 4 = 9", 9)
    assert solve("-5 - 4") == ("-5 - 4 = -9", -9)


def value(terms: str) -> int:
    """Add up ``12 + 7 - 40``."""
    return sum(int(term) for term in terms.replace("+ ", "+").replace("- ", "-").split())


def test_every_step_is_true_and_the_last_is_the_result() -> None:
    draw = random.Random(0)
    for _ in range(500):
        terms = [f"{draw.choice('+-')} {draw.randint(0, 9999)}" for _ in range(draw.randint(1, 3))]
        question = f"{draw.randint(-999, 999)} {' '.join(terms)}"
        thought, result = solve(question)
        steps = [step.partition(" = ") for step in thought.split("; ")]
        assert [value(left) for left, _, _ in steps] == [int(right) for _, _, right in steps]
        assert int(steps[-1][2]) == result == value(question)


@pytest.mark.parametrize("question", ["3 * 4", "What is 3 + 4?", "3", "3 + x"])
def test_a_question_that_is_no_sum_is_refused(question: str) -> None:
    with pytest.raises(ValueError, match="expected a sum of whole numbers such as '12 \\+ 7': set keep"):
        solve(question)


def test_documents_are_in_the_shares_asked_for(tmp_path: Path) -> None:
    data = module(tmp_path, formats={"tags": 0.3, "thought": 0.5, "bare": 0.2}, wrong=0.25)
    documents = [data.document(number) for number in range(1000)]
    forms = {"tags": 0, "thought": 0, "bare": 0}
    wrong = 0
    for text in documents:
        match = re.fullmatch(r"<\|user\|>(.+?)<\|assistant\|><think>(.*?)</think>(<answer>)?(-?\d+)(</answer>)?", text)
        assert match, text
        forms["tags" if match[3] else "thought" if match[2] else "bare"] += 1
        wrong += int(match[4]) != solve(match[1])[1]
    assert forms["tags"] == pytest.approx(300, abs=60)  # four deviations of a binomial distribution
    assert forms["thought"] == pytest.approx(500, abs=64)
    assert wrong == pytest.approx(250, abs=55)
    assert documents[7] == data.document(7)
    assert [module(tmp_path, seed=1).document(number) for number in range(9)] != documents[:9]


def test_no_question_is_held_out(tmp_path: Path) -> None:
    problems = [TASK.problem(number, seed, "held_out") for number in range(300) for seed in (0, 3)]
    held_out = {problem.prompt[0]["content"] for problem in problems if not isinstance(problem.prompt, str)}
    data = module(tmp_path)
    asked = {data.document(number).partition("<|assistant|>")[0].removeprefix("<|user|>") for number in range(300)}
    assert len(asked) > 50
    assert not asked & held_out


def test_tags_are_tokens_of_their_own_and_the_text_comes_back(tmp_path: Path) -> None:
    data = module(tmp_path, val_fraction=0.0)
    data.prepare_data()
    data.setup()
    tokens = np.asarray(data.opened.train.read(0, len(data.opened.train)))
    think = special_id(data.tokenizer, "<think>")
    assert (tokens == think).sum() == 300
    text = data.tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
    pieces = [piece for piece in text.split("<|end_of_text|>") if piece]
    assert sorted(pieces) == sorted(data.document(number) for number in range(300))
    sources = data.sources
    data.prepare_data()  # as the last validation does
    assert data.sources == sources
    module(tmp_path, val_fraction=0.0).prepare_data()  # again: what is there is used
    with pytest.raises(ValueError, match="was prepared with"):
        module(tmp_path, val_fraction=0.0, wrong=0.5).prepare_data()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"worked": 0}, "worked is 0, expected at least 1"),
        ({"formats": {"tag": 1.0}}, r"formats is \{'tag': 1.0\}, expected shares of tags, thought, bare"),
        ({"formats": {"tags": 0.5}}, "the shares of formats add up to 0.5, expected 1"),
        ({"wrong": 1.5}, "wrong is 1.5, expected 0 to 1"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(tmp_path, **options)
