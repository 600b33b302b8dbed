"""How many held-out problems a model solves, measured at every validation."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ds_lightning.generation import Generator, Sample
from ds_lightning.rl.answers import score
from ds_lightning.rl.builtin_rewards import accuracy
from ds_lightning.rl.prompting import Prompter
from ds_lightning.rl.rewards import Reward, Scorer
from ds_lightning.rl.tasks import Task
from ds_lightning.training.strategy import whole_weights

SHOWN = 10
"""Answers that are kept for people to read."""


class PassAtOne(Callback):
    """Lets the model answer held-out problems, once greedily and once by sampling, and logs the share that is right.

    The problems never occur in training: the task keeps them apart. Logged: ``val/pass_at_1`` (sampled),
    ``val/pass_at_1_greedy`` and ``val/completion_length``. The time is booked as that of validation. Works with any
    module: pretraining, fine-tuning and reinforcement learning.

    Args:
        task: Where problems come from.
        tokenizer: Path of the ``tokenizer.json`` of the model; none: that of the data.
        problems: Problems of the last validation of a run.
        problems_on_the_way: Problems of the others.
        max_new_tokens: Tokens of an answer.
        temperature: Of the sampled answers.
        seed: Of problems and sampling.
        workers: Processes that score.

    Raises:
        ValueError: If a number is out of range.

    Attributes:
        first: Ten prompts of the run's first validation, with the greedy answers and whether they were right (1 or 0).
        last: The same of its latest validation.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: str | None = None,
        problems: int = 500,
        problems_on_the_way: int = 100,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        seed: int = 0,
        workers: int = 2,
    ) -> None:
        numbers = {"problems": problems, "problems_on_the_way": problems_on_the_way, "max_new_tokens": max_new_tokens}
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"PassAtOne: {name} is {value}, expected at least 1")
        if not temperature > 0:
            raise ValueError(f"PassAtOne: temperature is {temperature}, expected more than 0: 0 is measured as well")
        self.task = task
        self.tokenizer = tokenizer
        self.problems = problems
        self.problems_on_the_way = problems_on_the_way
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.seed = seed
        self.scorer = Scorer([Reward(accuracy.__name__)], workers=workers)
        self.first: list[dict[str, Any]] = []
        self.last: list[dict[str, Any]] = []

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer, score and log."""
        if trainer.sanity_checking:
            return
        prompter = Prompter(self.tokenizer or trainer.datamodule.tokenizer_file)  # type: ignore[attr-defined]
        count = self.problems_on_the_way if trainer.state.fn == "fit" else self.problems
        problems = [self.task.problem(number, self.seed, "held_out") for number in range(count)]
        share: dict[str, float] = {}
        lengths: list[int] = []
        with self.scorer as scorer, whole_weights(trainer.strategy, pl_module.model) as model:
            for name, temperature in (("pass_at_1_greedy", 0.0), ("pass_at_1", self.temperature)):
                samples = prompter.complete(
                    Generator(model),
                    [problem.prompt for problem in problems],
                    1,
                    max_new_tokens=self.max_new_tokens,
                    temperature=temperature,
                    seed=self.seed,
                    record_routing=False,
                )
                rewards = score(scorer, prompter, problems, samples).total
                share[name] = sum(reward or 0.0 for reward in rewards) / count
                lengths = [len(sample.tokens) for sample in samples]
                if not temperature:
                    self.last = [
                        _shown(prompter, problems[sample.prompt].prompt, sample, reward)
                        for sample, reward in zip(samples[:SHOWN], rewards[:SHOWN], strict=True)
                    ]
                    self.first = self.first or self.last
        for name, value in share.items():
            pl_module.log(f"val/{name}", value, prog_bar=name == "pass_at_1", sync_dist=True)
        pl_module.log("val/completion_length", sum(lengths) / count, sync_dist=True)

    def state_dict(self) -> dict[str, Any]:
        """Keep the first answers of the run."""
        return {"first": self.first}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them up."""
        self.first = state_dict["first"]


def _shown(prompter: Prompter, prompt: Any, sample: Sample, reward: float | None) -> dict[str, Any]:
    return {"prompt": prompter.text(prompt), "answer": prompter.decode(sample), "reward": reward or 0.0}
