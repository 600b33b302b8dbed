"""Reward functions of a user, good and bad, that tests hand to scoring processes."""

import time
from typing import Any

started = time.monotonic()


def runs(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Do the worst: execute what the model wrote."""
    for completion in completions:
        exec(completion, {})
    return [1.0] * len(completions)


def counts(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    return [None if completion == "" else len(completion) for completion in completions]


def scaled(prompts: list[str], completions: list[str], answer: list[int], factor: float) -> list[float]:
    return [factor * value for value in answer]


def raises(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    if "bad" in completions:
        raise KeyError("no such thing\nas this")
    return [0.0] * len(completions)


def too_many(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [1.0, 2.0]


def not_a_number(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float("nan")]


def text(prompts: list[str], completions: list[str], **columns: Any) -> list[str]:
    return ["high"]


def no_list(prompts: list[str], completions: list[str], **columns: Any) -> float:
    return 1.0


def never_returns(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    while True:
        time.sleep(60)


def leaves(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    raise SystemExit(0)


def share_of_letter(prompts: list[str], completions: list[str], letter: str, **columns: Any) -> list[float]:
    return [completion.count(letter) / max(1, len(completion)) for completion in completions]


def dislikes(prompts: list[str], completions: list[str], prompt: str, **columns: Any) -> list[float]:
    if prompt in prompts:
        raise ValueError(f"I do not like {prompt}")
    return [0.0] * len(completions)
