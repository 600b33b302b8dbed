"""Oracles: reasoning-gym's own scorers and their source; sets of questions; a JSON-lines file written here."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from ds_lightning.rl.builtin_rewards import accuracy
from ds_lightning.rl.tasks import ALLOWED, JsonLinesTask, MixedTask, ReasoningGymTask, Split, Task, load_task

pytest.importorskip("reasoning_gym")

SMALL = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def questions(task: Task, seed: int, split: Split, count: int) -> list[str]:
    return [str(task.problem(index, seed, split).prompt) for index in range(count)]


@pytest.mark.parametrize("name", ALLOWED)
def test_the_scorer_of_an_allowed_task_evaluates_nothing_and_agrees_on_right_and_wrong(name: str) -> None:
    from reasoning_gym.dataset import ProceduralDataset
    from reasoning_gym.factory import DATASETS, create_dataset

    scorer = DATASETS[name][0].score_answer
    assert not {"eval", "exec", "parse_expr", "sympify", "compile"} & set(scorer.__code__.co_names)
    assert (scorer is ProceduralDataset.score_answer) == (ALLOWED[name] == "equal text")
    dataset = create_dataset(name, seed=1, size=5)
    for entry in dataset:
        right = entry["answer"]
        for given in (right, f"{right} or so", right[:-1], ""):
            marks = dataset.score_answer(given, entry)
            ours = accuracy([""], [f"<answer>{given}</answer>"], answer=[right])
            assert ours == [float(marks == 1.0)], given


@pytest.mark.parametrize("name", ALLOWED)
def test_a_problem_depends_on_its_arguments_alone(name: str) -> None:
    task = load_task(name)
    problems = [task.problem(index, 3) for index in (5, 1, 5)]
    assert problems[0] == problems[2] != problems[1]
    assert problems[0] == load_task(name).problem(5, 3)
    assert problems[0] != task.problem(5, 4)
    assert problems[0].columns.keys() == {"answer", "check", "task"}
    json.dumps(problems[0].columns)


def test_the_answer_belongs_to_the_question() -> None:
    task = ReasoningGymTask("chain_sum", config=SMALL, keep=r": (.+) =$", template="{question}=")
    for index in range(50):
        problem = task.problem(index, 0)
        left, sign, right = str(problem.prompt).rstrip("=").split()
        assert problem.columns["answer"] == str(int(left) + int(sign + right))


def test_held_out_questions_never_occur_in_training() -> None:
    task = load_task("chain_sum", config=SMALL)
    training = {question for seed in range(3) for question in questions(task, seed, "train", 400)}
    held_out = [question for seed in range(3) for question in questions(task, seed, "held_out", 40)]
    assert len(training) > 120  # of 162, less a tenth
    assert set(held_out).isdisjoint(training)
    assert len(set(held_out)) > 5


def test_without_a_share_held_out_the_splits_are_one() -> None:
    task = load_task("chain_sum", config=SMALL, held_out_share=0.0)
    assert questions(task, 0, "train", 20) == questions(task, 0, "held_out", 20)


def test_neighbouring_seeds_share_no_run_of_problems() -> None:
    """reasoning-gym's own seeds do: problem 1 of seed 0 is problem 0 of seed 1."""
    task = load_task("chain_sum")
    one, two = questions(task, 0, "train", 50), questions(task, 1, "train", 50)
    assert len(set(one) & set(two)) < 3


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "sums.jsonl"
    rows = [{"prompt": f"What is {n} + 1?", "answer": n + 1, "level": n % 3} for n in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path


def test_lines_become_problems_with_their_columns(lines: Path) -> None:
    task = load_task(str(lines), held_out_share=0.0)
    found = [task.problem(index, 0) for index in range(40)]
    assert sorted(str(problem.prompt) for problem in found) == sorted(f"What is {n} + 1?" for n in range(40))
    for problem in found:
        n = int(str(problem.prompt).split()[2])
        assert problem.columns == {"answer": str(n + 1), "level": n % 3, "check": "math", "task": "sums"}


def test_every_line_comes_once_before_any_comes_twice_in_an_order_of_the_seed(lines: Path) -> None:
    task = load_task(str(lines), held_out_share=0.25)
    split = {name: len(task._problems[name]) for name in ("train", "held_out")}  # type: ignore[attr-defined]
    assert sum(split.values()) == 40
    assert split["held_out"] > 3
    turns = questions(task, 7, "train", 2 * split["train"])
    first, second = turns[: split["train"]], turns[split["train"] :]
    assert len(set(first)) == split["train"]
    assert sorted(first) == sorted(second)
    assert first != second
    assert first != questions(task, 8, "train", split["train"])
    assert set(turns).isdisjoint(questions(task, 7, "held_out", split["held_out"]))


def test_prompts_become_messages(lines: Path) -> None:
    task = load_task(str(lines), chat=True, system="Answer.", template="Q: {question}")
    prompt = task.problem(0, 0).prompt
    assert isinstance(prompt, list)
    system, user = prompt
    assert system == {"role": "system", "content": "Answer."}
    assert user["role"] == "user"
    assert user["content"].startswith("Q: What is ")


def test_messages_stay_as_they_are(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "2?"}]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"prompt": messages, "answer": "2"}))
    assert load_task(str(path), held_out_share=0.0).problem(0, 0).prompt == messages


def test_tasks_take_turns(lines: Path) -> None:
    tasks: list[Task] = [load_task(str(lines)), load_task("chain_sum")]
    mixed = MixedTask(tasks)
    assert mixed.name == "sums+chain_sum"
    assert [mixed.problem(index, 1) for index in range(4)] == [
        tasks[place].problem(turn, 1) for turn in range(2) for place in range(2)
    ]


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("countdown", {}, "task 'countdown' is not on the allow-list, expected one of aiw, base_conversion"),
        ("chain_sum", {"config": {"terms": 2}}, "task 'chain_sum' with {'terms': 2}: .*unexpected keyword argument"),
        ("chain_sum", {"config": {"min_terms": 0}}, "'chain_sum' with {'min_terms': 0}: min_terms must be positive"),
        ("chain_sum", {"template": "?"}, "template is '\\?', expected '{question}' in it"),
        ("chain_sum", {"system": "Hi"}, "system is given without chat, expected chat: true with it"),
        ("chain_sum", {"keep": "="}, "keep is '=', expected a regular expression with a group"),
        ("chain_sum", {"held_out_share": 1.0}, r"held_out_share is 1\.0, expected a number from 0 to below 1"),
    ],
)  # fmt: skip
def test_a_task_that_cannot_be_is_refused(spec: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_task(spec, **options)


def test_an_index_or_seed_out_of_range_is_refused() -> None:
    with pytest.raises(
        ValueError, match="index -1 and seed 0: expected 0 <= index < 4294967296 and a seed of 0 or more"
    ):
        load_task("chain_sum").problem(-1, 0)


def test_a_question_without_what_is_kept_is_refused() -> None:
    with pytest.raises(ValueError, match=r"keep '\(z\+\)' finds nothing in the question 'State the final answer"):
        load_task("chain_sum", keep="(z+)").problem(0, 0)


def test_a_task_with_too_few_questions_is_refused() -> None:
    task = load_task("chain_sum", config={**SMALL, "min_terms": 1, "max_terms": 1}, held_out_share=1e-9)
    with pytest.raises(ValueError, match="task 'chain_sum' has no question for 'held_out' in 10000 tries"):
        task.problem(0, 0, "held_out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r":1 is not JSON \(.*\), expected one object a line"),
        ("[1]", r":1 is a list, expected an object with 'prompt' and 'answer'"),
        ('\n{"prompt": "1?"}', r":2 has the keys \['prompt'\], expected 'answer' with a value"),
        ('{"prompt": 1, "answer": 1}', r":1: 'prompt' is 1, expected text or messages with role and content"),
        ('{"prompt": [], "answer": 1}', r":1: 'prompt' is \[\], expected text or messages with role and content"),
    ],
)
def test_a_line_that_is_no_problem_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        JsonLinesTask(str(path))


def test_a_file_without_a_problem_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match=r"none\.jsonl holds no problem for 'train'"):
        JsonLinesTask(str(path)).problem(0, 0)
    with pytest.raises(ValueError, match="tasks is empty, expected at least one task"):
        MixedTask([])


def test_the_constructors_are_the_schema() -> None:
    for task in (ReasoningGymTask, JsonLinesTask, MixedTask):
        assert all(
            parameter.annotation is not inspect.Parameter.empty
            for name, parameter in inspect.signature(task).parameters.items()
        )
