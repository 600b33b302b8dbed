"""What a rollout is made of: answers of the policy, and what they were scored with."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from ds_lightning.generation import Sample
from ds_lightning.rl.advantages import ScaleRewards, group_advantages
from ds_lightning.rl.builtin_rewards import THINK
from ds_lightning.rl.experience import Completion
from ds_lightning.rl.prompting import Prompter
from ds_lightning.rl.rewards import RewardBatch, Scorer
from ds_lightning.rl.tasks import Problem, Prompt


def score(scorer: Scorer, prompter: Prompter, problems: Sequence[Problem], samples: Sequence[Sample]) -> RewardBatch:
    """Score samples, each an answer to the problem of its number; a column that a problem lacks is None for it."""
    names = sorted({name for problem in problems for name in problem.columns})
    prompts, completions = list[Prompt](), list[Prompt]()
    columns: dict[str, list[Any]] = {name: [] for name in (*names, "completion_tokens")}
    for sample in samples:
        problem, text = problems[sample.prompt], prompter.decode(sample)
        prompts.append(problem.prompt)
        if isinstance(problem.prompt, str):
            completions.append(text)
        else:  # the generation prompt may hold the tag that begins the answer
            begun = THINK[0] if prompter.text(problem.prompt).endswith(THINK[0]) else ""
            completions.append([{"role": "assistant", "content": begun + text}])
        for name in names:
            columns[name].append(problem.columns.get(name))
        columns["completion_tokens"].append(len(sample.tokens))
    return scorer.score(prompts, completions, columns)


def totals_of(scored: RewardBatch) -> torch.Tensor:
    """Return the total reward of each completion; NaN where none applies."""
    return torch.tensor([math.nan if reward is None else reward for reward in scored.total])


def rollout_metrics(
    completions: Sequence[Completion], scored: RewardBatch, group_size: int, scale_rewards: ScaleRewards
) -> dict[str, float]:
    """Return what TRL logs of a rollout, under its names.

    Args:
        completions: All answers of the rollout, over all ranks.
        scored: Their rewards.
        group_size: Answers a problem.
        scale_rewards: As for :func:`group_advantages`.
    """
    _, found = group_advantages(totals_of(scored), group_size, scale_rewards=scale_rewards)
    lengths = torch.tensor([len(completion.sample.tokens) for completion in completions], dtype=torch.float)
    ended = torch.tensor([completion.sample.finish_reason == "stop" for completion in completions])
    metrics = {name: float(value) for name, value in found.items()} | scored.metrics()
    metrics["completions/mean_length"] = float(lengths.mean())
    metrics["completions/min_length"] = float(lengths.min())
    metrics["completions/max_length"] = float(lengths.max())
    metrics["completions/clipped_ratio"] = 1 - float(ended.float().mean())
    if ended.any():
        metrics["completions/mean_terminated_length"] = float(lengths[ended].mean())
    return metrics
