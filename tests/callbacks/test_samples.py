"""Oracles: a greedy loop over the model, the generator by itself, bitwise equal weights with and without samples."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from torch.utils.data import DataLoader

from ds_lightning.callbacks import samples
from ds_lightning.callbacks.samples import Samples
from ds_lightning.config import DeepSeekConfig
from ds_lightning.generation import Generator
from ds_lightning.models import DeepSeek

VOCAB = 24


def tiny_model() -> DeepSeek:
    torch.manual_seed(0)
    config = DeepSeekConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=1,
        intermediate_size=32,
        num_attention_heads=2,
        kv_lora_rank=8,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=4,
        max_position_embeddings=16,
        initializer_range=0.5,
    )
    return DeepSeek(config)


def sampled(model: DeepSeek, ids: Tensor, tokens: int, temperature: float, seed: int = 0) -> list[int]:
    (sample,) = Generator(model).generate([ids.tolist()], max_new_tokens=tokens, temperature=temperature, seed=seed)
    return list(sample.tokens.tolist())


def test_temperature_zero_takes_the_likeliest_token_at_every_position() -> None:
    model = tiny_model().eval()
    ids = [1, 2, 3]
    for _ in range(6):
        hidden = model(torch.tensor([ids]))
        scores = (hidden[0, -1] @ model.lm_head.weight.T).tolist()
        ids.append(max(range(VOCAB), key=lambda token: float(scores[token])))
    assert sampled(model, torch.tensor([1, 2, 3]), 6, temperature=0.0) == ids[3:]
    assert sampled(model, torch.tensor([1, 2, 3]), 6, temperature=1e-4) == ids[3:]


def test_a_model_that_has_sampled_can_still_be_trained() -> None:
    model = tiny_model()
    sampled(model, torch.tensor([1, 2]), 8, temperature=1.0)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert model.lm_head.weight.grad is None
    assert all(weight.grad is not None for weight in model.layers.parameters())


class Noisy(LightningModule):
    """Stands in for the pretraining module; its loss draws training's random numbers."""

    def __init__(self, steps: int, learning_rate: float = 0.1) -> None:
        super().__init__()
        self.model = tiny_model()
        self.config = self.model.config
        self.steps = steps
        self.learning_rate = learning_rate
        self.modes: set[tuple[bool, bool, bool]] = set()
        self.model.register_forward_hook(self.note_mode)

    def note_mode(self, *_: Any) -> None:
        training = all(part.training for part in self.model.modules())
        self.modes.add((torch.is_grad_enabled(), training, torch.is_autocast_enabled("cpu")))

    @property
    def progress(self) -> float:
        return self.trainer.global_step / self.steps

    def training_step(self, batch: Tensor) -> Tensor:
        logits = self.model.logits(self.model(batch))
        return ((logits + torch.randn_like(logits)) ** 2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


class Words(LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
        self.tokenizer.pre_tokenizer = Whitespace()

    def train_dataloader(self) -> DataLoader[Tensor]:
        rows: Any = torch.arange(16 * 4).reshape(16, 4) % VOCAB
        return DataLoader(rows, batch_size=1)


def fit(
    callbacks: list[Any],
    folder: Path,
    *,
    steps: int = 4,
    planned: int = 4,
    learning_rate: float = 0.1,
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
) -> Noisy:
    module = Noisy(planned, learning_rate)
    trainer = Trainer(
        max_steps=steps,
        accumulate_grad_batches=2,
        accelerator="cpu",
        precision=precision,
        logger=TensorBoardLogger(folder, name="", version=""),
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    torch.manual_seed(7)
    trainer.fit(module, Words())
    return module


def texts(folder: Path, prompt: int) -> dict[int, str]:
    events = EventAccumulator(str(folder))
    events.Reload()
    tag = f"samples/{prompt}/text_summary"
    if tag not in events.Tags()["tensors"]:
        return {}
    return {point.step: point.tensor_proto.string_val[0].decode() for point in events.Tensors(tag)}


def test_training_is_bitwise_what_it_is_without_samples(tmp_path: Path) -> None:
    callback = Samples(every_n_steps=1, prompts=["w1 w2", "w3"], max_new_tokens=5)
    with_samples, without = fit([callback], tmp_path / "a"), fit([], tmp_path / "b")
    for name, weight in without.model.state_dict().items():
        assert torch.equal(weight, with_samples.model.state_dict()[name]), name
    assert without.modes == {(True, True, False)}
    assert with_samples.modes == {(True, True, False), (False, False, False)}


def test_sampling_runs_in_the_precision_of_training(tmp_path: Path) -> None:
    module = fit([Samples(every_n_steps=1, prompts=["w1"], max_new_tokens=2)], tmp_path, precision="bf16-mixed")
    assert module.modes == {(True, True, True), (False, False, True)}


def test_samples_are_taken_once_every_n_optimizer_steps_and_at_the_end(tmp_path: Path) -> None:
    callback = Samples(every_n_steps=2, prompts=["w1 w2", "w3"], max_new_tokens=5)
    module = fit([callback], tmp_path, steps=5, planned=5)
    written = texts(tmp_path, 0)
    assert list(written) == [2, 4, 5]
    assert list(texts(tmp_path, 1)) == [2, 4, 5]
    assert written[5] == "    " + callback.last[0]
    expected = sampled(module.model.eval(), torch.tensor([1, 2]), 5, temperature=0.8, seed=0)
    assert callback.last[0] == " ".join(f"w{i}" for i in [1, 2, *expected])
    assert callback.last[1].startswith("w3 ")
    assert len(callback.last[1].split()) == 6


def test_a_run_stopped_before_its_end_takes_no_last_sample(tmp_path: Path) -> None:
    callback = Samples(every_n_steps=3, prompts=["w1"], max_new_tokens=2)
    fit([callback], tmp_path, steps=4, planned=100)
    assert list(texts(tmp_path, 0)) == [3]


def test_a_model_that_did_not_change_writes_the_same_text(tmp_path: Path) -> None:
    fit([Samples(every_n_steps=1, prompts=["w1"], temperature=1.0, max_new_tokens=9)], tmp_path, learning_rate=0.0)
    assert len(texts(tmp_path, 0)) == 4
    assert len(set(texts(tmp_path, 0).values())) == 1


def test_sampling_is_booked_as_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    phases: list[str] = []

    class FakeLedger(Callback):
        @contextmanager
        def phase(self, name: str) -> Iterator[None]:
            phases.append(f"enter {name}")
            yield
            phases.append(f"leave {name}, {len(callback.last)} written")

    monkeypatch.setattr(samples, "CostLedger", FakeLedger)
    callback = Samples(every_n_steps=4, prompts=["w1", "w2"], max_new_tokens=2)
    fit([FakeLedger(), callback], tmp_path)
    assert phases == ["enter validate", "leave validate, 2 written"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0}, "Samples: every_n_steps is 0, expected at least 1"),
        ({"max_new_tokens": 0}, "Samples: max_new_tokens is 0, expected at least 1"),
        ({"temperature": -1.0}, r"Samples: temperature is -1\.0, expected 0 or more"),
    ],
)
def test_an_argument_out_of_range_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Samples(**{"every_n_steps": 1, "prompts": ["w1"], **arguments})


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", r"the prompt '' has 0 tokens, expected 1 to 2 .max_position_embeddings 16 less max_new_tokens 14."),
        ("w1 w2 w3", "the prompt 'w1 w2 w3' has 3 tokens, expected 1 to 2 "),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_refused_before_training(
    prompt: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        fit([Samples(every_n_steps=1, prompts=[prompt], max_new_tokens=14)], tmp_path)


def test_a_data_module_without_tokenizer_is_refused_before_training() -> None:
    trainer = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"data module NoneType has tokenizer None, expected a tokenizers\.Tokenizer"):
        Samples(every_n_steps=1, prompts=["w1"]).on_fit_start(trainer, Noisy(1))
