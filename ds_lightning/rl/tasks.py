"""Problems with a known answer: from reasoning-gym, or from JSON lines.

A task keeps questions for evaluation apart from those for training by a hash of the question itself. Seeds alone would
not do: in 300 problems of two one-digit numbers reasoning-gym repeats half of the questions, whatever the seed, and
two seeds n apart give the same problems n places later.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

Message = dict[str, str]
Prompt = str | list[Message]
Split = Literal["train", "held_out"]

ALLOWED = {
    "aiw": "equal text",
    "base_conversion": "equal text",
    "basic_arithmetic": "equal text",
    "binary_alternation": "equal text",
    "caesar_cipher": "equal text",
    "chain_sum": "equal decimals",
    "count_bits": "equal text",
    "count_primes": "equal text",
    "course_schedule": "equal text",
    "gcd": "equal text",
    "isomorphic_strings": "equal text",
    "largest_island": "equal text",
    "lcm": "equal text",
    "leg_counting": "equal text",
    "letter_counting": "equal text",
    "maze": "equal text",
    "number_sequence": "equal text",
    "products": "equal decimals",
    "ransom_note": "equal text",
    "rotten_oranges": "equal text",
    "simple_equations": "equal text",
    "simple_geometry": "equal text",
    "spell_backward": "equal text, case aside",
    "string_manipulation": "equal text",
    "syllogism": "equal text",
    "word_sorting": "equal lists of words",
}
"""Tasks of reasoning-gym with one right answer, and when its own scorer gives full marks.

Its scorers never see a completion: others of them evaluate what the model wrote, and many give part of the marks for
text around the answer. The reward ``accuracy`` compares with the one right answer as text, which for each of these
tasks is enough for full marks. ``tests/rl/test_tasks.py`` holds that against the scorers.
"""

_TRIES = 10_000
_INDICES = 2**32


@dataclass(frozen=True)
class Problem:
    """A prompt, and what its reward functions get besides."""

    prompt: Prompt
    columns: dict[str, Any]
    """Values of JSON; ``answer`` and ``check``, which says how to compare: ``exact`` or ``math``."""


class Task(Protocol):
    """A source of problems."""

    name: str

    def problem(self, index: int, seed: int, split: Split = "train") -> Problem:
        """Return one problem: the same for the same arguments, in any order, on any machine.

        Args:
            index: From 0 on, without an end.
            seed: Another seed is another order or choice; 0 or more.
            split: The questions of ``held_out`` never occur in ``train``.
        """
        ...


class ReasoningGymTask:
    """Problems that reasoning-gym makes up (extra ``rl``).

    Args:
        name: One of :data:`ALLOWED`.
        config: Settings of the dataset, such as ``max_terms``.
        template: Prompt, with ``{question}`` where the question belongs.
        keep: Regular expression of what is kept of a question: its first group; None: all. Long fixed words around a
            short problem teach a small model nothing.
        chat: Whether the prompt is a list of messages.
        system: Message that comes before it; with ``chat`` alone.
        held_out_share: Share of the questions that is kept for ``held_out``; 0: the splits share all questions.

    Raises:
        ValueError: If the task is not allowed, a setting is not known, or reasoning-gym is not installed.
    """

    def __init__(
        self,
        name: str,
        *,
        config: dict[str, Any] | None = None,
        template: str = "{question}",
        keep: str | None = None,
        chat: bool = False,
        system: str | None = None,
        held_out_share: float = 0.1,
    ) -> None:
        if name not in ALLOWED:
            raise ValueError(f"task {name!r} is not on the allow-list, expected one of {', '.join(ALLOWED)}")
        if keep is not None and re.compile(keep).groups < 1:
            raise ValueError(f"keep is {keep!r}, expected a regular expression with a group")
        self.name = name
        self.prompt = _PromptFormat(template, chat=chat, system=system)
        self.keep = None if keep is None else re.compile(keep)
        self.held_out_share = _checked_share(held_out_share)
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ValueError(f"task {name!r} needs reasoning-gym: pip install 'ds-lightning[rl]'")
        from reasoning_gym.factory import create_dataset

        try:
            self._dataset = create_dataset(name, seed=0, size=2**31 - 1, **(config or {}))
        except (AssertionError, TypeError, ValueError) as error:
            raise ValueError(f"task {name!r} with {config}: {error}") from error

    def problem(self, index: int, seed: int, split: Split = "train") -> Problem:
        """Return one problem; see :class:`Task`.

        Raises:
            ValueError: If ``index`` or ``seed`` is out of range, the split has no question, or ``keep`` finds nothing.
        """
        if not (0 <= index < _INDICES and seed >= 0):
            raise ValueError(f"index {index} and seed {seed}: expected 0 <= index < {_INDICES} and a seed of 0 or more")
        for attempt in range(_TRIES):
            # the dataset seeds a generator with the place: every problem has places of its own
            entry = self._dataset[(seed * _INDICES + index) * _TRIES + attempt]
            question, answer = entry["question"], entry["answer"]
            if _belongs(question, split, self.held_out_share):
                columns = {"answer": answer, "check": "exact", "task": self.name}
                return Problem(self.prompt(self._kept(question)), columns)
        raise ValueError(
            f"task {self.name!r} has no question for {split!r} in {_TRIES} tries: widen its config or change "
            f"held_out_share, now {self.held_out_share}"
        )

    def _kept(self, question: str) -> str:
        if self.keep is None:
            return question
        match = self.keep.search(question)
        if match is None:
            raise ValueError(f"keep {self.keep.pattern!r} finds nothing in the question {question!r}")
        return match[1]


class JsonLinesTask:
    """Problems from a file with one JSON object a line.

    Args:
        path: The file.
        prompt_key: Key of the prompt, text or messages.
        answer_key: Key of the right answer.
        check: How to compare with it: by mathematical value, or as text.
        template: Prompt around one that is text, with ``{question}`` where it belongs.
        chat: Whether a prompt that is text becomes a list of messages.
        system: Message that comes before it; with ``chat`` alone.
        held_out_share: Share of the prompts that is kept for ``held_out``; 0: the splits share all prompts.

    Raises:
        ValueError: If the file holds no problem, or a line is no problem.
        FileNotFoundError: If there is no such file.
    """

    def __init__(
        self,
        path: str,
        *,
        prompt_key: str = "prompt",
        answer_key: str = "answer",
        check: Literal["exact", "math"] = "math",
        template: str = "{question}",
        chat: bool = False,
        system: str | None = None,
        held_out_share: float = 0.1,
    ) -> None:
        self.name = Path(path).stem
        self.path = path
        prompt_format = _PromptFormat(template, chat=chat, system=system)
        share = _checked_share(held_out_share)
        self._problems: dict[Split, list[Problem]] = {"train": [], "held_out": []}
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                row = _read_row(line, f"{path}:{number}", prompt_key, answer_key)
                question, answer = row.pop(prompt_key), row.pop(answer_key)
                prompt = prompt_format(question) if isinstance(question, str) else question
                problem = Problem(prompt, {**row, "answer": str(answer), "check": check, "task": self.name})
                for split, problems in self._problems.items():
                    if _belongs(json.dumps(question), split, share):
                        problems.append(problem)

    def problem(self, index: int, seed: int, split: Split = "train") -> Problem:
        """Return one problem; see :class:`Task`. Every problem comes once before any comes twice.

        Raises:
            ValueError: If the split holds no problem.
        """
        problems = self._problems[split]
        if not problems:
            raise ValueError(f"{self.path} holds no problem for {split!r}: add problems or change held_out_share")
        turn, place = divmod(index, len(problems))
        return problems[_order(len(problems), f"{seed}/{turn}")[place]]


class MixedTask:
    """Problems of several tasks by turns.

    Args:
        tasks: At least one.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        if not tasks:
            raise ValueError("tasks is empty, expected at least one task")
        self.tasks = list(tasks)
        self.name = "+".join(task.name for task in tasks)

    def problem(self, index: int, seed: int, split: Split = "train") -> Problem:
        """Return one problem; see :class:`Task`."""
        turn, place = divmod(index, len(self.tasks))
        return self.tasks[place].problem(turn, seed, split)


def load_task(spec: str, **options: Any) -> Task:
    """Return the task of a name of :data:`ALLOWED`, or of a path to JSON lines.

    Args:
        spec: Name, or path that ends in ``.jsonl`` or ``.ndjson``.
        options: Further arguments of :class:`ReasoningGymTask` or :class:`JsonLinesTask`.

    Raises:
        ValueError: If it is neither.
    """
    if spec.endswith((".jsonl", ".ndjson")):
        return JsonLinesTask(spec, **options)
    return ReasoningGymTask(spec, **options)


class _PromptFormat:
    """Makes a prompt of a question."""

    def __init__(self, template: str, *, chat: bool, system: str | None) -> None:
        if "{question}" not in template:
            raise ValueError(f"template is {template!r}, expected '{{question}}' in it")
        if system is not None and not chat:
            raise ValueError("system is given without chat, expected chat: true with it")
        self.template = template
        self.chat = chat
        self.before = [] if system is None else [{"role": "system", "content": system}]

    def __call__(self, question: str) -> Prompt:
        text = self.template.replace("{question}", question)
        return [*self.before, {"role": "user", "content": text}] if self.chat else text


def _belongs(question: str, split: Split, held_out_share: float) -> bool:
    if held_out_share == 0:
        return True
    digest = hashlib.blake2b(question.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") < held_out_share * 2**64) == (split == "held_out")


def _checked_share(held_out_share: float) -> float:
    if not 0 <= held_out_share < 1:
        raise ValueError(f"held_out_share is {held_out_share}, expected a number from 0 to below 1")
    return held_out_share


@lru_cache(maxsize=4)
def _order(count: int, seed: str) -> list[int]:
    """Return a permutation that depends on nothing else; seeding with text does not depend on the process."""
    places = list(range(count))
    random.Random(seed).shuffle(places)
    return places


def _read_row(line: str, where: str, prompt_key: str, answer_key: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error.msg}), expected one object a line") from error
    if not isinstance(row, Mapping):
        raise ValueError(
            f"{where} is a {type(row).__name__}, expected an object with {prompt_key!r} and {answer_key!r}"
        )
    for key in (prompt_key, answer_key):
        if row.get(key) is None:
            raise ValueError(f"{where} has the keys {list(row)}, expected {key!r} with a value")
    prompt = row[prompt_key]
    messages = isinstance(prompt, list) and all(
        isinstance(message, dict) and {"role", "content"} <= message.keys() for message in prompt
    )
    if not isinstance(prompt, str) and not (messages and prompt):
        raise ValueError(f"{where}: {prompt_key!r} is {prompt!r}, expected text or messages with role and content")
    return dict(row)
