"""Worked problems to pretrain on: what a base model has seen of a task before reinforcement learning."""

from __future__ import annotations

import hashlib
import json
import random
import re
from pathlib import Path
from typing import Any

from ds_lightning.data import ChatTemplate, TokenDataModule
from ds_lightning.data.tokenizer import END_OF_TEXT
from ds_lightning.rl.builtin_rewards import ANSWER, THINK
from ds_lightning.rl.tasks import Task
from ds_lightning.whole_file import write_whole

FORMATS = ("tags", "thought", "bare")
"""How an answer is written: in both pairs of tags, after a thought without the tags of an answer, or by itself."""

_SUM = re.compile(r"-?\d+(?: [+-] \d+)+")


class WorkedProblemsDataModule(TokenDataModule):
    """Text for pretraining of which a part are solved sums, written as conversations in several formats.

    A base model of the web's text has seen solutions in every form, some of them wrong; this is the same in small.
    Only a part uses the tags that rewards ask for, so that reinforcement learning has something to find. Problems are
    those of the train split: held-out questions never occur. The documents are JSON lines beside ``folder``, a
    function of the settings that name the file.

    Args:
        task: Sums of whole numbers, such as reasoning-gym's ``chain_sum``, as prompts of messages.
        worked: Documents.
        formats: Share of each of :data:`FORMATS`; they add up to 1.
        wrong: Share of documents with a wrong result.
        sources: Other text, as for :class:`TokenDataModule`; it should spell no special token.
        folder: Where the prepared shards are, or go.
        seed: Of documents, split and order.
        options: As for :class:`TokenDataModule`.

    Raises:
        ValueError: If a share is out of range; in ``prepare_data``, if a question is no sum.
    """

    def __init__(
        self,
        *,
        task: Task,
        worked: int,
        sources: list[str],
        folder: str,
        formats: dict[str, float] | None = None,
        wrong: float = 0.0,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(sources=sources, folder=folder, seed=seed, markup=True, **options)
        formats = {"tags": 0.2, "thought": 0.4, "bare": 0.4} if formats is None else formats
        if worked < 1:
            raise ValueError(f"worked is {worked}, expected at least 1")
        if not set(formats) <= set(FORMATS) or any(share < 0 for share in formats.values()):
            raise ValueError(f"formats is {formats}, expected shares of {', '.join(FORMATS)}")
        if abs(sum(formats.values()) - 1) > 1e-6:
            raise ValueError(f"the shares of formats add up to {sum(formats.values())}, expected 1")
        if not 0 <= wrong <= 1:
            raise ValueError(f"wrong is {wrong}, expected 0 to 1")
        self.task = task
        self.worked = worked
        self.formats = formats
        self.wrong = wrong
        self.worked_seed = seed
        self.texts = list(sources)
        self.template = ChatTemplate()

    def prepare_data(self) -> None:
        """Write the documents, and prepare them with the other text."""
        if self.sources == self.texts:  # the last validation asks again, and documents take a while
            self.sources = [*self.texts, str(self._written())]
        super().prepare_data()

    def _written(self) -> Path:
        """Write the documents and return their file."""
        documents = [json.dumps({"text": self.document(number)}) for number in range(self.worked)]
        text = "\n".join(documents) + "\n"
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        folder = Path(self.folder)
        path = folder.with_name(f"{folder.name}-worked-{digest}.jsonl")
        if not path.is_file():
            folder.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text)
        return path

    def document(self, number: int) -> str:
        """Return one document: the same for the same settings, in any order.

        Raises:
            ValueError: If the question is no sum.
        """
        problem = self.task.problem(number, self.worked_seed)
        prompt = problem.prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        draw = random.Random(f"{self.worked_seed}/{number}")
        form = draw.choices(list(self.formats), list(self.formats.values()))[0]
        slip = draw.choice((-10, -3, -2, -1, 1, 2, 3, 10)) if draw.random() < self.wrong else 0
        thought, result = solve(messages[-1]["content"], slip)
        answer = {
            "tags": f"{THINK[0]}{thought}{THINK[1]}{ANSWER[0]}{result}{ANSWER[1]}",
            "thought": f"{THINK[0]}{thought}{THINK[1]}{result}",
            "bare": f"{THINK[0]}{THINK[1]}{result}",
        }[form]
        text = self.template.render([*messages, {"role": "assistant", "content": answer}])
        return text.removesuffix(END_OF_TEXT)  # every document is given one


def solve(question: str, slip: int = 0) -> tuple[str, int]:
    """Return the steps of a sum of whole numbers from left to right, and its result.

    Two numbers are added place by place: ``27 + 45`` is ``20 + 40 = 60; 7 + 5 = 12; 60 + 12 = 72``. Each step is one of
    few facts, so that thinking in steps pays: the result at once is one of thousands.

    Args:
        question: Such as ``12 + 7 - 4``.
        slip: By how much the last step is wrong.

    Raises:
        ValueError: If the question is no sum.
    """
    if not _SUM.fullmatch(question):
        raise ValueError(f"the question is {question!r}, expected a sum of whole numbers such as '12 + 7': set keep")
    first, *rest = question.split(" ")
    total, steps = int(first), list[str]()
    for place in range(0, len(rest), 2):
        term = int(rest[place + 1]) * (-1 if rest[place] == "-" else 1)
        steps += _by_places(total, term, rest[place])
        total += term
    if slip:
        total += slip
        steps[-1] = f"{steps[-1].partition(' = ')[0]} = {total}"
    return "; ".join(steps), total


def _by_places(total: int, term: int, sign: str) -> list[str]:
    """Return the steps of one addition: hundreds, tens and units by themselves, then their sums together."""
    places = [10**power for power in reversed(range(len(str(max(abs(total), abs(term))))))]
    left, right = (_digits(number, places) for number in (total, term))
    sums = [a + b for a, b in zip(left, right, strict=True)]
    steps = [f"{a} {sign} {abs(b)} = {c}" for a, b, c in zip(left, right, sums, strict=True)]
    found, *others = sums
    for other in others:
        steps.append(f"{found} {'-' if other < 0 else '+'} {abs(other)} = {found + other}")
        found += other
    return steps


def _digits(number: int, places: list[int]) -> list[int]:
    """Return what each place contributes to a number: -27 is -20 and -7."""
    return [(1 if number >= 0 else -1) * (abs(number) // place % 10) * place for place in places]
