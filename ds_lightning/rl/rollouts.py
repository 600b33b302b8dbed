"""Rollouts as a dataset: iterating it lets the current policy answer problems, scores them, and yields batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader

from ds_lightning.generation import Generator
from ds_lightning.losses.policy import Totals
from ds_lightning.models import DeepSeek
from ds_lightning.rl.advantages import ScaleRewards, group_advantages, useful_groups
from ds_lightning.rl.answers import rollout_metrics, score, totals_of
from ds_lightning.rl.experience import Completion, Experience, collate
from ds_lightning.rl.prompting import Prompter
from ds_lightning.rl.rewards import Reward, RewardBatch, Scorer
from ds_lightning.rl.sandbox import Limits
from ds_lightning.rl.tasks import Task


@runtime_checkable
class _Phases(Protocol):
    """A callback that books time by phase."""

    def phase(self, name: str) -> AbstractContextManager[Any]: ...


class RolloutDataModule(pl.LightningDataModule):
    """Problems, answers of the current policy, rewards and advantages, as batches for :class:`GRPOModule`.

    DeepSeek-R1 (arXiv:2501.12948v2, section 2.1): a rollout is ``prompts`` problems with ``num_generations`` answers
    each; it is split at random into ``steps_per_rollout`` optimizer steps, each answer used once. With one step a
    rollout, training is strictly on-policy. Problems and random numbers depend on the seed and on how many problems
    came before, so a resumed run goes on as if it had not stopped; where it stops within a rollout, the rollout is
    part of the checkpoint.

    Args:
        task: Where problems come from.
        rewards: What answers are scored with.
        tokenizer: Path of the ``tokenizer.json`` beside the weights to start from.
        rollouts: Rollouts of the run.
        prompts: Problems of a rollout, over all ranks. R1-Zero: 512.
        num_generations: Answers a problem. R1: 16.
        steps_per_rollout: Optimizer steps that a rollout is split into. R1: 16.
        max_completion_length: Tokens of an answer.
        temperature: Of sampling, and of the policy that is trained. R1: 1, in its second stage 0.7.
        top_p: Sample from the likeliest tokens that together have this probability.
        top_k: Sample from this many likeliest tokens; 0: from all.
        scale_rewards: Deviation that divides advantages: that of the group, of the rollout, or none.
        equal_groups: Groups whose rewards are all equal give no gradient: ``keep`` them in the batches, ``skip`` them
            (the same gradient at less cost, but for a KL term), or ``resample`` other problems in their place
            (dynamic sampling, DAPO, arXiv:2503.14476, section 3.2).
        max_resamples: Further rounds of problems with ``resample``; what is then missing stays missing.
        max_batch: Answers that are generated together at most.
        limits: What scoring one answer may use.
        workers: Processes that score.
        seed: Of problems and sampling.

    Raises:
        ValueError: If a number is out of range.
    """

    stage = "grpo"

    def __init__(
        self,
        *,
        task: Task,
        rewards: list[Reward],
        tokenizer: str,
        rollouts: int,
        prompts: int = 16,
        num_generations: int = 8,
        steps_per_rollout: int = 1,
        max_completion_length: int = 64,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        scale_rewards: ScaleRewards = "group",
        equal_groups: Literal["keep", "skip", "resample"] = "keep",
        max_resamples: int = 3,
        max_batch: int = 128,
        limits: Limits | None = None,
        workers: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._check(
            num_generations,
            steps_per_rollout,
            temperature,
            rollouts=rollouts,
            prompts=prompts,
            max_completion_length=max_completion_length,
            max_batch=max_batch,
            workers=workers,
        )
        self.task = task
        self.scorer = Scorer(rewards, workers=workers, limits=limits)
        self.tokenizer_path = tokenizer
        self.rollouts = rollouts
        self.prompts = prompts
        self.num_generations = num_generations
        self.steps_per_rollout = steps_per_rollout
        self.max_completion_length = max_completion_length
        self.temperature = temperature
        self.top_p = top_p
        self.top_k = top_k
        self.scale_rewards = scale_rewards
        self.equal_groups = equal_groups
        self.max_resamples = max_resamples
        self.max_batch = max_batch
        self.seed = seed
        self.prompter: Prompter | None = None
        self._next_problem = 0
        self._steps: list[list[Experience]] = []  # of the running rollout
        self._scoring = False

    @staticmethod
    def _check(num_generations: int, steps_per_rollout: int, temperature: float, **counts: int) -> None:
        for name, value in {**counts, "steps_per_rollout": steps_per_rollout}.items():
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if num_generations < 2:
            raise ValueError(f"num_generations is {num_generations}, expected at least 2: a group is its own baseline")
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}, expected more than 0: exploration needs chance")
        if counts["prompts"] * num_generations % steps_per_rollout:
            raise ValueError(
                f"steps_per_rollout is {steps_per_rollout}, expected a divisor of prompts times num_generations, "
                f"{counts['prompts'] * num_generations}"
            )

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.rollouts * self.steps_per_rollout

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer, which exports carry along."""
        return Path(self.tokenizer_path)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, for samples."""
        return self._prompting.tokenizer

    @property
    def eos_id(self) -> int:
        """End of an answer."""
        return self._prompting.eos_id

    @property
    def pad_id(self) -> int:
        """Padding."""
        return self._prompting.pad_id

    @property
    def _prompting(self) -> Prompter:
        assert self.prompter is not None, "setup() loads the tokenizer"
        return self.prompter

    def setup(self, stage: str | None = None) -> None:
        """Load the tokenizer.

        Raises:
            ValueError: If ranks and accumulation cannot share a step evenly.
        """
        if self.prompter is None:
            self.prompter = Prompter(self.tokenizer_path)
        _, world_size, accumulate = self._layout()
        per_step = self.prompts * self.num_generations // self.steps_per_rollout
        if per_step % (world_size * accumulate):
            raise ValueError(
                f"prompts is {self.prompts}, num_generations {self.num_generations}, steps_per_rollout "
                f"{self.steps_per_rollout}: expected a step that {world_size} ranks times accumulate_grad_batches "
                f"{accumulate} share evenly"
            )

    def teardown(self, stage: str) -> None:
        """End the scoring processes."""
        if self._scoring:
            self.scorer.__exit__(None, None, None)
            self._scoring = False

    def train_dataloader(self) -> RolloutLoader:
        """Return the micro-batches of this rank, generated as they are asked for."""
        return RolloutLoader(self)

    def val_dataloader(self) -> DataLoader[int]:
        """Return one batch of nothing: what is measured on held-out problems, a callback measures."""
        return DataLoader([0])  # type: ignore[arg-type]  # without a batch Lightning would not validate

    def batches(self) -> Iterator[Experience]:
        """Yield micro-batches from where the run stands; a rollout is made when its first one is asked for."""
        done = self.trainer.global_step if self.trainer is not None else 0
        for rollout in range(done // self.steps_per_rollout, self.rollouts):
            first = done % self.steps_per_rollout if rollout == done // self.steps_per_rollout else 0
            if first == 0:
                self._steps = self._collect(rollout)
            for step in self._steps[first:]:
                yield from step

    def state_dict(self) -> dict[str, Any]:
        """Return how many problems were posed, and the running rollout of all ranks if steps of it are left."""
        within = self.trainer is not None and self.trainer.global_step % self.steps_per_rollout
        steps: list[list[Experience]] = []
        if within:  # in the order of the whole step, so that another number of ranks can share it
            of_ranks = zip(*self._policy.from_all_ranks(lambda: self._steps), strict=True)
            steps = [[micro for micros in zip(*step, strict=True) for micro in micros] for step in of_ranks]
        return {"next_problem": self._next_problem, "steps": steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: If the steps that are left are split into another number of micro-batches.
        """
        rank, world_size, accumulate = self._layout()
        for step in state_dict["steps"]:
            if len(step) != world_size * accumulate:
                raise ValueError(
                    f"the checkpoint is within a rollout whose steps have {len(step)} micro-batches, the run's have "
                    f"{world_size} ranks times accumulate_grad_batches {accumulate}, expected as many"
                )
        self._next_problem = state_dict["next_problem"]
        self._steps = [step[rank::world_size] for step in state_dict["steps"]]

    def _collect(self, rollout: int) -> list[list[Experience]]:
        """Make a rollout, with all ranks: return the micro-batches of each of its steps on this rank."""
        with self._policy.sampler() as model:
            kept, skipped, metrics = self._groups(model)
            steps = self.steps_per_rollout
            order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(self.seed + rollout)).tolist()
            parts = [[kept[place] for place in order[number::steps]] or kept[:1] for number in range(steps)]
            missing = len(skipped) // steps, sum(len(completion.sample.tokens) for completion in skipped) // steps
            micro_batches = [self._step(part, *missing) for part in parts]
            micro_batches[0][0]["metrics"] = metrics
            with self._phase("logprob"):
                self._policy.prepare(micro_batches, model)
        with self._phase("logprob"):
            self._policy.add_reference(micro_batches)
        return micro_batches

    def _step(self, members: Sequence[Completion], skipped: int, skipped_tokens: int) -> list[Experience]:
        """Return this rank's micro-batches of a step; answers of similar length are in one, and in those of all ranks.

        Args:
            members: The answers that are in it, of all ranks.
            skipped: Answers that count in the mean, without a gradient.
            skipped_tokens: Their tokens.
        """
        ordered = sorted(members, key=lambda completion: completion.length)
        totals = Totals(
            sequences=len(members) + skipped,
            tokens=sum(len(completion.sample.tokens) for completion in members) + skipped_tokens,
            max_tokens=self.max_completion_length,
        )
        rank, world_size, accumulate = self._layout()
        size = math.ceil(len(ordered) / (world_size * accumulate))
        starts = range(rank * size, world_size * accumulate * size, world_size * size)
        parts = [ordered[start : start + size] or [replace(ordered[0], counts=False)] for start in starts]
        experience = [collate(part, totals, pad_id=self._prompting.pad_id) for part in parts]
        for micro in experience:
            micro["step_tokens"] = sum(completion.length for completion in members)
            micro["step_samples"] = sum(completion.advantage != 0 for completion in members)
        return experience

    def _groups(self, model: DeepSeek) -> tuple[list[Completion], list[Completion], dict[str, float]]:
        """Answer problems; return the answers to learn from, those that only count in the mean, and metrics."""
        wanted, kept, every, rewards = self.prompts, list[list[Completion]](), list[list[Completion]](), []
        for _ in range(1 + (self.max_resamples if self.equal_groups == "resample" else 0)):
            groups, scored, useful = self._answer(model, wanted)
            rewards.append(scored)
            every += groups
            kept += [group for group, has_gradient in zip(groups, useful, strict=True) if has_gradient]
            if len(kept) >= wanted:
                break
        if self.equal_groups == "keep" or not kept:  # where none has a gradient, a step still needs a batch
            kept = every[:wanted]
        kept = kept[:wanted]
        in_batch = {id(group) for group in kept}
        skipped = [group for group in every if id(group) not in in_batch] if self.equal_groups == "skip" else []
        metrics = rollout_metrics(
            [completion for group in every for completion in group],
            RewardBatch.joined(rewards),
            self.num_generations,
            self.scale_rewards,
        )
        return [one for group in kept for one in group], [one for group in skipped for one in group], metrics

    def _answer(self, model: DeepSeek, count: int) -> tuple[list[list[Completion]], RewardBatch, list[bool]]:
        """Pose the next problems, and return the groups of answers, their rewards, and which groups are useful."""
        first, size = self._next_problem, self.num_generations
        self._next_problem += count
        with self._phase("rollout"):  # that of the slowest rank
            parts = self._policy.from_all_ranks(lambda: self._own_answers(model, first, count))
        completions = [completion for answers, _ in parts for completion in answers]
        scored = RewardBatch.joined([rewards for _, rewards in parts])
        totals = totals_of(scored)
        advantages, _ = group_advantages(totals, size, scale_rewards=self.scale_rewards)
        for completion, advantage in zip(completions, advantages.tolist(), strict=True):
            completion.advantage = advantage
        groups = [completions[start : start + size] for start in range(0, len(completions), size)]
        return groups, scored, useful_groups(totals, size).tolist()

    def _own_answers(self, model: DeepSeek, first: int, count: int) -> tuple[list[Completion], RewardBatch]:
        """Return this rank's equal share of the answers to some problems, and their rewards; groups may span ranks."""
        rank, world_size, _ = self._layout()
        size = self.num_generations
        start, stop = (count * size * end // world_size for end in (rank, rank + 1))
        before = start // size  # problems that other ranks answer
        numbers = range(first + before, first + math.ceil(stop / size))
        problems = [self.task.problem(number, self.seed) for number in numbers]
        samples = self._prompting.complete(
            Generator(model),
            [problem.prompt for problem in problems],
            size,
            max_new_tokens=self.max_completion_length,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            keys=list(numbers),
            numbers=range(start - before * size, stop - before * size),
            max_batch=self.max_batch,
        )
        with self._phase("reward"):
            if not self._scoring:
                self.scorer.__enter__()
                self._scoring = True
            scored = score(self.scorer, self._prompting, problems, samples)
        encoded = [self._prompting.encode(problem.prompt) for problem in problems]
        return [Completion(encoded[sample.prompt], sample) for sample in samples], scored

    @property
    def _policy(self) -> Any:
        assert self.trainer is not None, "a trainer asks for batches"
        return self.trainer.lightning_module

    def _phase(self, name: str) -> AbstractContextManager[Any]:
        callbacks: list[Any] = self.trainer.callbacks if self.trainer is not None else []  # type: ignore[attr-defined]
        books = next((callback for callback in callbacks if isinstance(callback, _Phases)), None)
        return nullcontext() if books is None else books.phase(name)

    def _layout(self) -> tuple[int, int, int]:
        """Return rank, ranks and accumulation."""
        if self.trainer is None:
            return 0, 1, 1
        return self.trainer.global_rank, self.trainer.world_size, self.trainer.accumulate_grad_batches


class RolloutLoader:
    """An iterable whose length is the whole run: Lightning then fetches no batch before the step before it is done."""

    def __init__(self, data: RolloutDataModule) -> None:
        self.data = data

    def __len__(self) -> int:
        return self.data.num_steps * self.data._layout()[2]

    def __iter__(self) -> Iterator[Experience]:
        return self.data.batches()
