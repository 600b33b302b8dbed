"""Oracles: the gradient of one big batch in fp64, an export read back, and lists of positions that are no padding."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds_lightning.data import Document, SFTDataModule, train_tokenizer
from ds_lightning.losses.load_balance import sequence_balance_loss
from ds_lightning.losses.next_token import mtp_labels, next_token_loss
from ds_lightning.models.hf import save_hf
from ds_lightning.ops.topk_gate import Gate
from ds_lightning.training import PretrainModule
from tests.models.tiny_export import CONFIG, random_model

SHAPE = replace(CONFIG, vocab_size=280)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("sft"))


def write_conversations(folder: Path) -> Path:
    """Write conversations of unequal length and a tokenizer; return their folder."""
    draw = random.Random(0)
    with (folder / "a.jsonl").open("w") as file:
        for number in range(40):
            file.write(json.dumps({"prompt": f"{number}", "completion": "word " * draw.randrange(1, 9)}) + "\n")
    train_tokenizer([Document("a", "0 1 2 3 word word")], 280).save(str(folder / "tokenizer.json"))
    return folder


def datamodule(source: Path) -> SFTDataModule:
    module = SFTDataModule(
        sources=[str(source / "a.jsonl")],
        folder=str(source / "prepared"),
        tokenizer=str(source / "tokenizer.json"),
        seq_len=64,
        batch_size=4,
        epochs=1,
        val_fraction=0.2,
    )
    module.prepare_data()
    module.setup("fit")
    return module


def with_trainer(module: Any, accumulate: int = 1, world_size: int = 1, rank: int = 0, **facts: Any) -> Any:
    module._trainer = module.trainer = SimpleNamespace(strategy=None,
        accumulate_grad_batches=accumulate, world_size=world_size, global_rank=rank, global_step=0,
        ckpt_path=None, gradient_clip_val=None, gradient_clip_algorithm=None, **{"datamodule": None, **facts},
    )  # fmt: skip
    return module


def gradients(source: Path, accumulate: int, world_size: int) -> tuple[float, dict[str, torch.Tensor], torch.Tensor]:
    """Loss, gradients and expert load of the first step, put together as Lightning does."""
    torch.manual_seed(0)
    module = PretrainModule(SHAPE, 1000, balance_loss_alpha=0.5)
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    with_trainer(module, accumulate, world_size).configure_model()
    model = module.model
    assert model is not None
    model.double()
    total = 0.0
    for rank in range(world_size):
        data = with_trainer(datamodule(source), accumulate, world_size, rank)
        for _, batch in zip(range(accumulate), data.train_dataloader(), strict=False):
            loss = module.training_step(dict(batch), 0) / accumulate / world_size
            loss.backward()
            total += float(loss.detach())
    assert module.expert_load is not None
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return total, named, module.expert_load


@pytest.mark.parametrize(("accumulate", "world_size"), [(1, 1), (4, 1), (2, 2)])
def test_a_step_is_the_mean_over_its_labels_however_it_is_split(source: Path, accumulate: int, world_size: int) -> None:
    torch.manual_seed(0)
    module = PretrainModule(SHAPE, 1000)
    with_trainer(module).configure_model()
    model = module.model
    assert model is not None
    model.double()
    data = datamodule(source)
    batch = next(iter(data.train_dataloader()))
    counted = [int((row != -100).sum()) for row in batch["labels"]]
    assert len(set(counted)) > 1, "rows must differ in labels, or a mean of means would pass"
    inputs, labels, segments = batch["input_ids"], batch["labels"], batch["segment_ids"]
    gates: list[Gate] = []
    hidden = model(inputs, segment_ids=segments, gates=gates)
    (ahead,) = model.mtp_hidden(inputs, hidden, segment_ids=segments, gates=gates)
    head = model.lm_head.weight
    expected = next_token_loss(hidden, head, labels) + 0.3 * next_token_loss(ahead, head, mtp_labels(labels, 1))
    expected = expected / sum(counted)
    balance = [sequence_balance_loss(gate.scores, SHAPE.num_experts_per_tok, seq_len=64) for gate in gates]
    expected = expected + 0.5 * sum(balance) / len(inputs)
    expected.backward()

    loss, grads, load = gradients(source, accumulate, world_size)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-12)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            # fp64 sums in another order
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-9, atol=1e-13)
    kept = int((segments >= 0).sum())
    assert 0 < kept < segments.numel()
    assert load.sum(-1).tolist() == [kept * SHAPE.num_experts_per_tok] * len(gates)


def test_weights_are_those_of_the_folder_and_a_checkpoint_wins(tmp_path: Path) -> None:
    model = random_model()
    save_hf(model, tmp_path / "weights")
    longer = replace(CONFIG, max_position_embeddings=128, initializer_range=0.5, rope_scaling=None)
    started = PretrainModule(longer, 10, weights=str(tmp_path / "weights"))
    with_trainer(started).configure_model()
    assert started.model is not None
    assert started.model.config == longer
    for name, tensor in started.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    resumed = PretrainModule(CONFIG, 10, weights=str(tmp_path / "gone"))
    with_trainer(resumed)
    resumed.trainer.ckpt_path = "some.ckpt"
    resumed.configure_model()
    assert resumed.model is not None
    assert not torch.equal(resumed.model.norm.weight, model.norm.weight)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    save_hf(random_model(), tmp_path / "weights")
    module = PretrainModule(replace(CONFIG, routed_scaling_factor=1.0), 10, weights=str(tmp_path / "weights"))
    message = r"weights holds a model with routed_scaling_factor 2\.5, the run's config has 1\.0, expected equal shapes"
    with pytest.raises(ValueError, match=message):
        with_trainer(module).configure_model()


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    save_hf(random_model(), tmp_path / "weights")
    (tmp_path / "weights/model.safetensors").rename(tmp_path / "weights/pytorch_model.bin")
    module = PretrainModule(CONFIG, 10, weights=str(tmp_path / "weights"))
    with pytest.raises(ValueError, match=r"holds pytorch_model\.bin, a pickle, .* expected model\.safetensors"):
        with_trainer(module).configure_model()


def test_the_data_say_how_many_tokens_where_the_module_does_not(source: Path) -> None:
    data = datamodule(source)
    module = PretrainModule(SHAPE)
    with_trainer(module).trainer.datamodule = data
    module.setup("fit")
    assert module.total_tokens == data.plan.total_tokens == len(data.rows("train")) * 64
    module.tokens_seen = 64
    assert module.progress == 64 / data.plan.total_tokens


def test_a_tokenizer_that_the_model_or_its_weights_do_not_know_is_refused(source: Path, tmp_path: Path) -> None:
    data = datamodule(source)
    small = PretrainModule(replace(SHAPE, vocab_size=200), 10)
    with_trainer(small).trainer.datamodule = data
    ids = data.opened.manifest.vocab_size
    with pytest.raises(ValueError, match=f"has {ids} ids, the model's vocab_size is 200, expected at least as many"):
        small.setup("fit")
    other = train_tokenizer([Document("a", "other other texts texts")], 280)
    other.save(str(tmp_path / "tokenizer.json"))
    module = PretrainModule(SHAPE, 10, weights=str(tmp_path))
    with_trainer(module).trainer.datamodule = data
    with pytest.raises(ValueError, match=r"gives \d+ of \d+ tokens other ids than .*tokenizer\.json, expected the tok"):
        module.setup("fit")
    other_source = source / "tokenizer.json"
    (tmp_path / "tokenizer.json").write_bytes(other_source.read_bytes())
    module.setup("fit")
