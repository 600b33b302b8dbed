"""Text written by the model while it trains."""

from contextlib import ExitStack
from textwrap import indent
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from tokenizers import Tokenizer

from ds_lightning.callbacks.cost_ledger import CostLedger
from ds_lightning.callbacks.tensorboard_layout import tensorboard_loggers
from ds_lightning.generation import Generator
from ds_lightning.training.strategy import whole_weights


class Samples(Callback):
    """Continues fixed prompts every so many optimizer steps, and at the end of a complete run.

    The same noise is drawn each time, from a generator of its own: two samples differ only by what the model learned,
    and training's random numbers are what they would be without this callback. The continuations go to TensorBoard as
    text and to ``last``; the time is booked to the ledger's ``validate`` phase.

    Args:
        every_n_steps: Optimizer steps between two rounds of samples.
        prompts: Texts to continue.
        max_new_tokens: Tokens written after each prompt.
        temperature: Divides the logits before the softmax; 0 takes the likeliest token.
        seed: Seed of the noise.

    Attributes:
        first: Prompt and continuation of every prompt in the run's first round.
        last: Prompt and continuation of every prompt in the latest round.

    Raises:
        ValueError: If an argument is out of its range; at the start of fit, if a prompt cannot be continued.
    """

    def __init__(
        self,
        every_n_steps: int,
        prompts: list[str],
        max_new_tokens: int = 64,
        temperature: float = 0.8,
        seed: int = 0,
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("max_new_tokens", max_new_tokens)):
            if value < 1:
                raise ValueError(f"Samples: {name} is {value}, expected at least 1")
        if temperature < 0:
            raise ValueError(f"Samples: temperature is {temperature}, expected 0 or more")
        self.every_n_steps = every_n_steps
        self.prompts = prompts
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.seed = seed
        self.first: list[str] = []
        self.last: list[str] = []
        self._last_step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Refuse prompts that cannot be continued."""
        context = pl_module.config.max_position_embeddings
        longest = context - self.max_new_tokens
        for prompt in self.prompts:
            length = len(_tokenizer(trainer).encode(prompt).ids)
            if not 1 <= length <= longest:
                raise ValueError(
                    f"Samples: the prompt {prompt!r} has {length} tokens, expected 1 to {longest} "
                    f"(max_position_embeddings {context} less max_new_tokens {self.max_new_tokens})"
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting optimizer steps from where the run stands."""
        self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Sample after every ``every_n_steps``-th optimizer step."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        if trainer.global_step % self.every_n_steps == 0:
            self._sample(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Sample from the finished model; a run that was stopped early has better things to do."""
        if pl_module.progress >= 1 and trainer.global_step % self.every_n_steps != 0:
            self._sample(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Keep the first round of the run."""
        return {"first": self.first}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up."""
        self.first = state_dict["first"]

    def _sample(self, trainer: Trainer, pl_module: Any) -> None:
        tokenizer = _tokenizer(trainer)
        prompts = [tokenizer.encode(prompt).ids for prompt in self.prompts]
        with ExitStack() as stack:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set where mypy does not look
                if isinstance(callback, CostLedger):
                    stack.enter_context(callback.phase("validate"))
            stack.enter_context(trainer.precision_plugin.forward_context())
            # Every rank writes the same text: weights that are sharded are brought together by all of them.
            model = stack.enter_context(whole_weights(trainer.strategy, pl_module.model))
            samples = Generator(model).generate(
                prompts, max_new_tokens=self.max_new_tokens, temperature=self.temperature, seed=self.seed
            )
            self.last = [tokenizer.decode(prompts[sample.prompt] + sample.tokens.tolist()) for sample in samples]
        self.first = self.first or self.last
        for logger in tensorboard_loggers(trainer):
            for i, text in enumerate(self.last):
                # An indented code block: a fenced one could be closed by the text itself.
                logger.experiment.add_text(f"samples/{i}", indent(text, "    "), trainer.global_step)


def _tokenizer(trainer: Trainer) -> Tokenizer:
    datamodule = trainer.datamodule  # type: ignore[attr-defined]  # as above
    tokenizer = getattr(datamodule, "tokenizer", None)
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(
            f"Samples: the data module {type(datamodule).__name__} has tokenizer {tokenizer!r}, expected a "
            "tokenizers.Tokenizer: use TokenDataModule or remove the callback"
        )
    return tokenizer
