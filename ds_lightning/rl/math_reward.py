"""Accuracy by mathematical value, with math-verify of the extra ``rl``. A module of its own: sympy loads slowly."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from math_verify import parse, verify

from ds_lightning.rl.builtin_rewards import ANSWER, Text, between, text_of

logging.getLogger("math_verify").setLevel(logging.CRITICAL)


def math_accuracy(
    prompts: Sequence[Text], completions: Sequence[Text], answer: Sequence[str | None], **columns: Any
) -> list[float | None]:
    r"""Return 1 for an answer of the same value as the right one, 0 for any other.

    The completion's answer stands between the last ``<answer>`` and ``</answer>``; both may be LaTeX, such as
    ``\frac{1}{2}``, or plain.

    Args:
        prompts: Not looked at.
        completions: What the model wrote.
        answer: Right answers; None: there is none to compare with.
        columns: ``check`` says which completions this is for: ``math``; all of them where it is missing.
    """
    checks = columns.get("check") or ["math"] * len(completions)
    rewards: list[float | None] = []
    for completion, truth, check in zip(completions, answer, checks, strict=True):
        given = between(text_of(completion), *ANSWER)
        applies = truth is not None and check == "math"
        rewards.append(float(given is not None and _equal(str(truth), given)) if applies else None)
    return rewards


def _equal(truth: str, given: str) -> bool:
    """Compare without math-verify's own limits of time, which are signals: the scoring process has a limit."""
    right, answer = (parse(_as_latex(text), parsing_timeout=None) for text in (truth, given))
    return bool(verify(right, answer, timeout_seconds=None))


def _as_latex(text: str) -> str:
    return text if "$" in text or "\\boxed" in text else f"${text.strip()}$"
