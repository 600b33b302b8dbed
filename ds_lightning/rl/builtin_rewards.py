"""Rewards that come with the package, with TRL's signature: one number a completion, or None where it does not apply.

They read completions as text and evaluate nothing. They run in scoring processes, so nothing here imports torch.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

THINK = ("<think>", "</think>")
ANSWER = ("<answer>", "</answer>")

Message = dict[str, str]
Text = str | Sequence[Message]
"""A string, or messages with ``role`` and ``content``."""

_WORD = re.compile(r"[^\W\d_]+")
_SCRIPTS = {
    "ar": ("ARABIC",),
    "de": ("LATIN",),
    "el": ("GREEK",),
    "en": ("LATIN",),
    "es": ("LATIN",),
    "fr": ("LATIN",),
    "hi": ("DEVANAGARI",),
    "ja": ("HIRAGANA", "KATAKANA", "CJK"),
    "ko": ("HANGUL",),
    "ru": ("CYRILLIC",),
    "zh": ("CJK",),
}
_UNSPACED = ("HIRAGANA", "KATAKANA", "CJK")


def accuracy(
    prompts: Sequence[Text], completions: Sequence[Text], answer: Sequence[str | None], **columns: Any
) -> list[float | None]:
    """Return 1 for the right answer and 0 for any other: there is no credit for a part of it.

    The completion's answer stands between the last ``<answer>`` and ``</answer>``. It equals the column ``answer`` as
    text with surrounding space removed.

    Args:
        prompts: Not looked at.
        completions: What the model wrote.
        answer: Right answers; None: there is none to compare with.
        columns: ``check`` may say of a completion that it is for :mod:`ds_lightning.rl.math_reward`: ``math``.
    """
    checks = columns.get("check") or ["exact"] * len(completions)
    rewards: list[float | None] = []
    for completion, truth, check in zip(completions, answer, checks, strict=True):
        given = between(text_of(completion), *ANSWER)
        applies = truth is not None and check == "exact"
        rewards.append(float(given is not None and given.strip() == str(truth).strip()) if applies else None)
    return rewards


def format(prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float | None]:
    """Return 1 for ``<think>...</think><answer>...</answer>`` with space alone around the parts, else 0.

    DeepSeek-R1 (arXiv:2501.12948, section 2.2.2, "Reward Modeling"). Each tag stands exactly once. ``<think>`` may
    stand at the end of the prompt instead.

    Args:
        prompts: What the model went on from.
        completions: What the model wrote.
        columns: Not looked at.
    """
    return [float(_well_formed(_opened(*pair))) for pair in zip(prompts, completions, strict=True)]


def language(
    prompts: Sequence[Text], completions: Sequence[Text], language: str = "en", **columns: Any
) -> list[float | None]:
    """Return the share of words between ``<think>`` and ``</think>`` that are in the script of a language.

    DeepSeek-R1 (arXiv:2501.12948, section 2.3.2, "Reasoning-oriented Reinforcement Learning"): the share of words of
    the target language in the chain of thought. Here a word counts by its script, so that mixtures of languages with
    one script pass; characters of scripts without spaces are words. 1 where there is no word, as in bare arithmetic; 0
    without a chain of thought.

    Args:
        prompts: What the model went on from.
        completions: What the model wrote.
        language: Code of two letters.
        columns: Not looked at.

    Raises:
        ValueError: If the language is not known.
    """
    if language not in _SCRIPTS:
        raise ValueError(f"language is {language!r}, expected one of {', '.join(_SCRIPTS)}")
    rewards: list[float | None] = []
    for pair in zip(prompts, completions, strict=True):
        thought = between(_opened(*pair), *THINK)
        scripts = [script for word in _WORD.findall(thought or "") for script in _scripts(word)]
        wanted = sum(script in _SCRIPTS[language] for script in scripts)
        rewards.append(0.0 if thought is None else wanted / len(scripts) if scripts else 1.0)
    return rewards


def length(
    prompts: Sequence[Text],
    completions: Sequence[Text],
    completion_tokens: Sequence[int],
    max_tokens: int,
    cache_tokens: int,
    **columns: Any,
) -> list[float | None]:
    """Return 0 for a completion that is short enough, down to -1 for one that uses up ``max_tokens``.

    DAPO (arXiv:2503.14476, section 3.4, "Overlong Reward Shaping").

    Args:
        prompts: Not looked at.
        completions: Not looked at.
        completion_tokens: Tokens of each completion.
        max_tokens: From here on the reward is -1.
        cache_tokens: The last ones of ``max_tokens``, over which it falls evenly.
        columns: Not looked at.

    Raises:
        ValueError: If the last tokens are none, or more than all.
    """
    if not 0 < cache_tokens <= max_tokens:
        raise ValueError(f"cache_tokens is {cache_tokens}, expected between 1 and max_tokens = {max_tokens}")
    return [min(0.0, max(-1.0, (max_tokens - cache_tokens - n) / cache_tokens)) for n in completion_tokens]


def text_of(text: Text) -> str:
    """Return a string, or the content of the last message."""
    return text if isinstance(text, str) else text[-1]["content"] if text else ""


def between(text: str, start: str, end: str) -> str | None:
    """Return what stands between the last complete pair of tags."""
    before, closed, _ = text.rpartition(end)
    _, opened, inside = before.rpartition(start)
    return inside if closed and opened else None


def _opened(prompt: Text, completion: Text) -> str:
    """Return the completion with the tag that the prompt ends with."""
    prefilled = text_of(prompt).rstrip().endswith(THINK[0])
    return (THINK[0] if prefilled else "") + text_of(completion)


def _well_formed(text: str) -> bool:
    if any(text.count(tag) != 1 for tag in (*THINK, *ANSWER)):
        return False
    before, _, rest = text.partition(THINK[0])
    _, thought_ends, rest = rest.partition(THINK[1])
    gap, answer_starts, rest = rest.partition(ANSWER[0])
    _, answer_ends, after = rest.partition(ANSWER[1])
    return bool(thought_ends and answer_starts and answer_ends) and not (before + gap + after).strip()


def _scripts(word: str) -> list[str]:
    """Return the script of a word, or of each character where words are not spaced."""
    scripts = [unicodedata.name(character, "?").partition(" ")[0] for character in word]
    first = scripts[0]
    return scripts if first in _UNSPACED else [first]
