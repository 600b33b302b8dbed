"""Scores completions with several rewards, in processes that may do nothing else."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from ds_lightning.rl import builtin_rewards
from ds_lightning.rl.builtin_rewards import Text
from ds_lightning.rl.lockdown import LAYERS
from ds_lightning.rl.sandbox import CallError, Function, Limits, SandboxPool

BUILTIN = {
    "accuracy": "ds_lightning.rl.builtin_rewards",
    "format": "ds_lightning.rl.builtin_rewards",
    "language": "ds_lightning.rl.builtin_rewards",
    "length": "ds_lightning.rl.builtin_rewards",
    "math_accuracy": "ds_lightning.rl.math_reward",
}
"""Rewards that come with the package, and their modules."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reward:
    """A function that scores completions, and what it counts.

    The function has TRL's signature, ``f(prompts, completions, **columns) -> list[float | None]``, and is called with
    one completion at a time. It runs in a process without network, environment, other processes and files but those
    beside its module. What it raises ends the run, so a function that evaluates a completion has to catch what that
    raises; running into a limit or a protection does not end the run.
    """

    function: str
    """One of :data:`BUILTIN`, ``module:function`` or ``path/to/file.py:function``."""
    weight: float = 1.0
    """Factor in the sum."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of every call."""
    name: str | None = None
    """Name in metrics; None: that of the function."""
    cut_short: float | None = 0.0
    """Reward of a completion on which the function ran into a limit or its process died; None: it does not apply."""

    @property
    def label(self) -> str:
        """Name in metrics."""
        return self.name or self.function.rpartition(":")[2]


@dataclass(frozen=True)
class RewardBatch:
    """The rewards of a batch of completions."""

    total: list[float | None]
    """Weighted sum of the rewards that apply to a completion; None where none does."""
    per_reward: dict[str, list[float | None]]
    """Rewards without their weights, by the name of the function."""
    cut_short: dict[str, dict[str, int]]
    """How many calls of each function met a ``timeout``, a process that ``died``, or were ``refused`` something."""

    @classmethod
    def joined(cls, batches: Sequence[RewardBatch]) -> RewardBatch:
        """Return the rewards of several batches as those of one, in their order."""
        total = [reward for batch in batches for reward in batch.total]
        per_reward = {
            name: [reward for batch in batches for reward in batch.per_reward[name]] for name in batches[0].per_reward
        }
        cut_short = {
            name: {kind: sum(batch.cut_short[name][kind] for batch in batches) for kind in kinds}
            for name, kinds in batches[0].cut_short.items()
        }
        return cls(total, per_reward, cut_short)

    def metrics(self) -> dict[str, float]:
        """Return mean and unbiased deviation of each reward, as TRL names them, and the calls that were cut short."""
        found: dict[str, float] = {}
        for name, rewards in self.per_reward.items():
            known = [reward for reward in rewards if reward is not None]
            found[f"rewards/{name}/mean"] = statistics.fmean(known) if known else float("nan")
            found[f"rewards/{name}/std"] = statistics.stdev(known) if len(known) > 1 else 0.0
            for kind, count in self.cut_short[name].items():
                found[f"rewards/{name}/{kind}"] = float(count)
        return found


class Scorer:
    """Scores completions in isolated processes; a context manager.

    Args:
        rewards: What is added up, at least one.
        workers: Processes.
        limits: What a call may use.
        layers: Protections of :data:`ds_lightning.rl.lockdown.LAYERS` to put on where the system has them.

    Raises:
        ValueError: If a reward is not known or two have one name; on entering, if a process cannot import a function.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        *,
        workers: int = 2,
        limits: Limits | None = None,
        layers: Sequence[str] = LAYERS,
    ) -> None:
        labels = [reward.label for reward in rewards]
        if not rewards or len(set(labels)) < len(labels):
            raise ValueError(f"the rewards are named {labels}, expected at least one and no name twice: set name")
        if workers < 1:
            raise ValueError(f"workers is {workers}, expected at least 1")
        self.rewards = list(rewards)
        self.workers = workers
        self.limits = limits or Limits()
        self.layers = tuple(layers)
        self._functions = [_find(reward) for reward in rewards]
        self._pool: SandboxPool | None = None

    def __enter__(self) -> Scorer:
        """Start the processes and say which protections are active."""
        self._pool = SandboxPool(self._functions, workers=self.workers, limits=self.limits, layers=self.layers)
        missing = [layer for layer in LAYERS if layer not in self.protections]
        log.info("scoring processes are protected by %s", ", ".join(self.protections))
        if missing:
            log.warning("scoring processes run without %s", ", ".join(missing))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    @property
    def protections(self) -> list[str]:
        """Layers that are active in the scoring processes."""
        return self._pool.protections if self._pool is not None else []

    def score(
        self, prompts: Sequence[Text], completions: Sequence[Text], columns: Mapping[str, Sequence[Any]] | None = None
    ) -> RewardBatch:
        """Return the rewards of completions.

        Args:
            prompts: One a completion, text or messages.
            completions: Text or messages.
            columns: Further keyword arguments of the functions, one value of JSON a completion: the ``answer`` of
                ``accuracy``, the ``completion_tokens`` of ``length``.

        Raises:
            ValueError: If the numbers of prompts, completions and values differ, or a function raises or returns
                anything but one finite number or None: the function and the completion are named.
            RuntimeError: If a function answers none of its calls within its limits.
        """
        assert self._pool is not None, "score inside a with statement"
        columns = columns or {}
        for name, values in {"prompts": prompts, **columns}.items():
            if len(values) != len(completions):
                raise ValueError(
                    f"{name} holds {len(values)} values, expected one for each of {len(completions)} completions"
                )
        calls = [
            {
                "prompt": prompt,
                "completion": completion,
                "columns": {name: values[place] for name, values in columns.items()},
            }
            for place, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        try:
            outcomes = self._pool.run(calls)
        except CallError as error:
            message = f"reward {self.rewards[error.function].label!r} on completion {error.call}: {error}"
            raise (ValueError if error.answered else RuntimeError)(message) from None
        per_reward: dict[str, list[float | None]] = {}
        cut_short: dict[str, dict[str, int]] = {}
        for place, reward in enumerate(self.rewards):
            of_function = [row[place] for row in outcomes]
            kinds = [outcome.kind for outcome in of_function]
            per_reward[reward.label] = [
                outcome.value if outcome.kind == "value" else reward.cut_short for outcome in of_function
            ]
            cut_short[reward.label] = {kind: kinds.count(kind) for kind in ("timeout", "died", "refused")}
        return RewardBatch(self._totals(per_reward, len(completions)), per_reward, cut_short)

    def _totals(self, per_reward: dict[str, list[float | None]], completions: int) -> list[float | None]:
        totals: list[float | None] = []
        for place in range(completions):
            terms = [
                reward.weight * value
                for reward in self.rewards
                if (value := per_reward[reward.label][place]) is not None
            ]
            totals.append(sum(terms) if terms else None)
        return totals


def _find(reward: Reward) -> Function:
    """Return where scoring processes find a reward, without importing it here."""
    if reward.function in BUILTIN:
        if reward.function == "math_accuracy" and importlib.util.find_spec("math_verify") is None:
            raise ValueError("reward 'math_accuracy' needs math-verify: pip install 'ds-lightning[rl]'")
        if hasattr(builtin_rewards, reward.function):
            known = list(inspect.signature(getattr(builtin_rewards, reward.function)).parameters)
            for option in reward.options:
                if option not in known:
                    raise ValueError(
                        f"reward {reward.function!r} has no option {option!r}, expected some of {known[2:-1]}"
                    )
        return Function(BUILTIN[reward.function], reward.function, options=reward.options)
    where, colon, name = reward.function.rpartition(":")
    if not colon or not where or not name.isidentifier():
        raise ValueError(
            f"reward {reward.function!r}: expected one of {', '.join(BUILTIN)}, module:function or file.py:function"
        )
    if where.endswith(".py"):
        file = Path(where).resolve()
        if not file.is_file():
            raise ValueError(f"reward {reward.function!r}: there is no file {str(file)!r}")
        return Function(file.stem, name, str(file), (), reward.options, (str(file.parent),))
    top = where.partition(".")[0]
    spec = importlib.util.find_spec(top) if top.isidentifier() else None
    if spec is None:
        raise ValueError(f"reward {reward.function!r}: there is no module {top!r}")
    places = list(spec.submodule_search_locations or ([spec.origin] if spec.has_location and spec.origin else []))
    path = tuple(str(Path(entry).resolve()) for entry in sys.path)
    readable = tuple(str(Path(place).resolve()) for place in places)
    listable = tuple(str(Path(place).parent) for place in readable)
    return Function(where, name, None, path, reward.options, readable, listable)
