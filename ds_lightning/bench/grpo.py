"""Samples a second of ``GRPOModule`` in an ordinary fit, and of TRL's ``GRPOTrainer``."""

import logging
import random
import tempfile
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.table import Table
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ds_lightning.bench import reward
from ds_lightning.bench.contest import BACKENDS, CONFIG, OURS, check_settings, contest_table, figures, in_turns, now
from ds_lightning.data.tokenizer import END_OF_TEXT, PAD, SPECIAL_TOKENS
from ds_lightning.generation.device import Device
from ds_lightning.models import DeepSeek
from ds_lightning.models.hf import save_hf
from ds_lightning.rl.rewards import Reward
from ds_lightning.rl.rollouts import RolloutDataModule
from ds_lightning.rl.tasks import Problem, Split
from ds_lightning.training import GRPOModule

_LR = 1e-4
_CLIP = 1.0


def bench_grpo(
    repeats: int = 5,
    steps: int = 3,
    prompts: int = 8,
    num_generations: int = 16,
    prompt_tokens: int = 32,
    completion_tokens: int = 48,
    device: Device = "cpu",
) -> dict[str, Any]:
    """Measure both sides in turns, in fp32, from the same weights: steps that sample, score and train.

    A step is strictly on-policy: ``prompts`` times ``num_generations`` answers, one update with the loss of GRPO, AdamW
    and clipping, no KL term. No answer ends early: the tokenizer's end of text is one token more than the model can
    write. The first step of each training, with the start of scoring processes, is not measured. TRL has gradient
    checkpointing and bf16, its defaults, turned off: on a small model on a CPU both cost time.

    Args:
        repeats: Measured trainings of each side, after one that is not.
        steps: Measured steps of a training.
        prompts: Prompts of a step.
        num_generations: Answers to each.
        prompt_tokens: Tokens of every prompt.
        completion_tokens: Tokens of every answer.
        device: Where both sides run.

    Returns:
        Settings; seconds of every round, and samples a second by their median; the ratio to the best peer; how many
        ``samples`` and ``sampled_tokens`` each side trained on in all.

    Raises:
        ValueError: If TRL is not installed, or an argument is out of range.
    """
    settings = {"steps": steps, "prompts": prompts, "num_generations": num_generations}
    settings |= {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    check_settings("trl", device, repeats=repeats, **settings)
    if num_generations < 2:
        raise ValueError(f"num_generations is {num_generations}, expected at least 2: a group is its own baseline")
    context = CONFIG.max_position_embeddings
    if prompt_tokens + completion_tokens > context:
        raise ValueError(
            f"prompt_tokens is {prompt_tokens} and completion_tokens {completion_tokens}, expected at most {context} "
            "together"
        )
    torch.manual_seed(0)
    model = DeepSeek(CONFIG)
    texts = _Digits(prompts * (steps + 1), prompt_tokens)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        save_hf(model, folder)
        _tokenizer().save(str(folder / "tokenizer.json"))
        sides: dict[str, _Side] = {OURS: _Ours(folder, texts, settings, device)}
        sides |= {f"trl {backend}": _Theirs(folder, texts, settings, device, backend) for backend in BACKENDS}
        seconds = in_turns({name: side.train for name, side in sides.items()}, repeats)
    counts = {name: {"samples": side.samples, "sampled_tokens": side.tokens} for name, side in sides.items()}
    measured = figures(model, device, seconds, steps * prompts * num_generations, "samples")
    return {"repeats": repeats, **settings, **measured, "counts": counts}


def grpo_table(measured: dict[str, Any]) -> Table:
    """Return the figures for a terminal."""
    size = f"{measured['prompts']} prompts with {measured['num_generations']} answers"
    length = f"{measured['prompt_tokens']} + {measured['completion_tokens']} tokens"
    return contest_table(measured, "grpo", f"{size}, {length}, {measured['steps']} steps", "samples")


class _Digits:
    """Prompts of digits, which are one token each, in the order in which both sides see them."""

    name = "digits"

    def __init__(self, count: int, tokens: int) -> None:
        draw = random.Random(0)
        self.prompts = ["".join(draw.choices("0123456789", k=tokens)) for _ in range(count)]

    def problem(self, index: int, seed: int, split: Split = "train") -> Problem:
        return Problem(self.prompts[index], {})


def _tokenizer() -> Tokenizer:
    """Return bytes and pairs of letters, as many as the model knows; who loads it adds the end of text behind them."""
    special = [token for token in SPECIAL_TOKENS if token != END_OF_TEXT]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = "abcdefghijklmnopqrstuvwxyz"
    pairs = [(first, second) for first in letters for second in letters]
    pairs = pairs[: CONFIG.vocab_size - len(alphabet) - len(special)]
    vocab = {token: index for index, token in enumerate([*alphabet, *map("".join, pairs)])}
    tokenizer = Tokenizer(models.BPE(vocab, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    assert tokenizer.get_vocab_size() == CONFIG.vocab_size
    return tokenizer


class _Side(ABC):
    """One side: trains from the same weights again and again, and counts what it trained on."""

    def __init__(self, folder: Path, texts: _Digits, settings: dict[str, int], device: Device) -> None:
        self.folder, self.texts, self.settings, self.device = folder, texts, settings, device
        self.samples = self.tokens = 0
        self.ends: list[float] = []

    def train(self) -> float:
        """Train, and return the seconds from the end of the first step to that of the last."""
        self.ends = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on loaders and loggers, and deprecated names of their own
            self.run()
        assert len(self.ends) == self.settings["steps"] + 1
        return self.ends[-1] - self.ends[0]

    @abstractmethod
    def run(self) -> None:
        """Train, and note the end of every step."""

    def count(self, samples: int, tokens: int) -> None:
        """Note what was trained on."""
        self.samples += samples
        self.tokens += tokens


class _Ours(_Side):
    def run(self) -> None:
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
        data = RolloutDataModule(
            task=self.texts,
            rewards=[Reward(f"{reward.__file__}:share_of_letters")],
            tokenizer=str(self.folder / "tokenizer.json"),
            rollouts=self.settings["steps"] + 1,
            prompts=self.settings["prompts"],
            num_generations=self.settings["num_generations"],
            max_completion_length=self.settings["completion_tokens"],
            max_batch=self.settings["prompts"] * self.settings["num_generations"],
        )
        module = GRPOModule(CONFIG, weights=str(self.folder), lr=_LR, weight_decay=0.0)
        trainer = Trainer(
            accelerator=self.device,
            devices=1,
            max_epochs=1,
            gradient_clip_val=_CLIP,
            logger=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[_Count(self)],
        )
        trainer.fit(module, datamodule=data)


class _Count(Callback):
    def __init__(self, side: _Side) -> None:
        self.side = side

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.side.ends.append(now())
        self.side.count(len(batch["mask"]), int(batch["mask"].sum()))


class _Theirs(_Side):
    def __init__(self, folder: Path, texts: _Digits, settings: dict[str, int], device: Device, backend: str) -> None:
        super().__init__(folder, texts, settings, device)
        self.backend = backend

    def run(self) -> None:
        import transformers
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        options = GRPOConfig(
            output_dir=str(self.folder.with_name("trl")),
            use_cpu=self.device == "cpu",
            bf16=False,
            gradient_checkpointing=False,
            max_steps=self.settings["steps"] + 1,
            per_device_train_batch_size=self.settings["prompts"] * self.settings["num_generations"],
            num_generations=self.settings["num_generations"],
            max_completion_length=self.settings["completion_tokens"],
            loss_type="grpo",
            beta=0.0,
            learning_rate=_LR,
            max_grad_norm=_CLIP,
            shuffle_dataset=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=transformers.AutoModelForCausalLM.from_pretrained(self.folder, experts_implementation=self.backend),
            args=options,
            processing_class=transformers.PreTrainedTokenizerFast(
                tokenizer_file=str(self.folder / "tokenizer.json"), eos_token=END_OF_TEXT, pad_token=PAD
            ),
            reward_funcs=self.score,
            train_dataset=Dataset.from_dict({"prompt": self.texts.prompts}),
            callbacks=[_ends(self)],
        )
        assert trainer.model.dtype == torch.float32
        assert trainer.model.config._experts_implementation == self.backend
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()

    def score(
        self, prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: Any
    ) -> list[float]:
        """Score a rollout, all of which is trained on, and count it."""
        self.count(len(completion_ids), sum(map(len, completion_ids)))
        return reward.share_of_letters(prompts, completions)


def _ends(side: _Side) -> Any:
    """Return a callback of transformers that notes the end of every step."""
    from transformers import TrainerCallback

    class Ends(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            side.ends.append(now())

    return Ends()
