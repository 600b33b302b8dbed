"""The reward of the measurement of GRPO; scoring processes import this file alone."""

from typing import Any


def share_of_letters(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Return the share of a completion's characters that are lower-case letters."""
    return [sum("a" <= one <= "z" for one in completion) / max(1, len(completion)) for completion in completions]
