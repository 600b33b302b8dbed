"""Oracle: the plain order of rows, which every way of sharing it out and every interruption must reproduce."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.nn import functional

from ds_lightning.data import TokenDataModule
from ds_lightning.data.batches import BatchLoader
from ds_lightning.data.sampler import row_order

SEQ = 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "corpus"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number}.txt").write_text(f"Text number {number}, " + "word " * (number % 5))
    return folder


def datamodule(corpus: Path, **changes: Any) -> TokenDataModule:
    arguments: dict[str, Any] = {
        "sources": [str(corpus)],
        "folder": str(corpus.parent / "prepared"),
        "seq_len": SEQ,
        "batch_size": 8,
        "total_tokens": 20 * 8 * SEQ,
        "vocab_size": 280,
        "val_fraction": 0.2,
        "val_batch_size": 3,
        "ramp_tokens": 300,
        "start_batch_size": 4,
        "mask_documents": True,
        "seed": 3,
    }
    module = TokenDataModule(**(arguments | changes))
    module.prepare_data()
    module.setup("fit")
    return module


def on_rank(module: TokenDataModule, rank: int, world_size: int, accumulate: int = 1) -> TokenDataModule:
    module.trainer = SimpleNamespace(  # type: ignore[assignment]  # the three facts it asks a trainer for
        global_rank=rank, world_size=world_size, accumulate_grad_batches=accumulate, global_step=0
    )
    return module


def steps_of(corpus: Path, world_size: int, accumulate: int, **changes: Any) -> list[tuple[int, list[list[int]]]]:
    """The rows of each optimizer step, put together from all ranks and micro-batches."""
    loaders = [
        on_rank(datamodule(corpus, **changes), rank, world_size, accumulate).train_dataloader()
        for rank in range(world_size)
    ]
    ranks = [list(loader) for loader in loaders]
    assert [len(loader) for loader in loaders] == [len(batches) for batches in ranks]
    steps = []
    for start in range(0, len(ranks[0]), accumulate):
        batches = [ranks[rank][start + micro] for micro in range(accumulate) for rank in range(world_size)]
        assert len({(batch["step_tokens"], batch["step_labels"]) for batch in batches}) == 1
        assert sum(int((batch["labels"] != -100).sum()) for batch in batches) == batches[0]["step_labels"]
        rows = torch.cat([torch.cat([batch["input_ids"], batch["labels"][:, -1:]], 1) for batch in batches])
        steps.append((batches[0]["step_tokens"], rows.tolist()))
    return steps


@pytest.mark.parametrize(
    ("world_size", "accumulate", "num_workers"), [(2, 1, 0), (1, 2, 0), (4, 1, 0), (2, 2, 0), (1, 4, 0), (2, 1, 2)]
)
def test_a_step_sees_the_same_tokens_whatever_the_ranks_accumulation_and_workers(
    corpus: Path, world_size: int, accumulate: int, num_workers: int
) -> None:
    assert steps_of(corpus, world_size, accumulate, num_workers=num_workers) == steps_of(corpus, 1, 1)


def test_steps_follow_the_order_and_the_ramp(corpus: Path) -> None:
    module = datamodule(corpus)
    tokens = module.opened.train.read(0, len(module.opened.train)).tolist()
    size = (len(tokens) - 1) // SEQ
    steps = steps_of(corpus, 1, 1)
    sizes = [len(rows) for _, rows in steps]
    assert sizes == [4] * 10 + [8] * 15
    order = row_order(size, 0, sum(sizes), seed=3).tolist()
    assert max(order) == size - 1
    assert sum(sizes) > size
    expected = [tokens[row * SEQ : row * SEQ + SEQ + 1] for row in order]
    assert [row for _, rows in steps for row in rows] == expected
    assert [count for count, _ in steps] == [rows * SEQ for rows in sizes]
    assert sum(count for count, _ in steps[:-1]) < module.plan.total_tokens <= sum(count for count, _ in steps)


def test_labels_follow_the_inputs_and_segments_the_documents(corpus: Path) -> None:
    module = datamodule(corpus)
    eos = module.opened.manifest.eos_id
    batch = next(iter(module.train_dataloader()))
    assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])
    for inputs, segments in zip(batch["input_ids"].tolist(), batch["segment_ids"].tolist(), strict=True):
        assert segments == [inputs[:position].count(eos) for position in range(SEQ)]
    assert all(batch[name].dtype == torch.int64 for name in ("input_ids", "labels", "segment_ids"))
    assert "segment_ids" not in next(iter(datamodule(corpus, mask_documents=False).train_dataloader()))


@pytest.mark.parametrize("step", [1, 7, 10, 11, 24])
def test_iteration_goes_on_where_the_state_was_taken(corpus: Path, step: int) -> None:
    straight = list(datamodule(corpus).train_dataloader())
    module = datamodule(corpus)
    module.load_state_dict({"tokens_seen": module.plan.step(step).tokens_before})
    assert module.state_dict() == {"tokens_seen": module.plan.step(step).tokens_before}
    loader = module.train_dataloader()
    assert len(loader) == len(straight)
    rest = list(loader)
    assert len(rest) == len(straight) - step
    for one, other in zip(rest, straight[step:], strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])


def test_the_position_may_be_loaded_after_the_loader_was_made(corpus: Path) -> None:
    module = datamodule(corpus)
    loader = module.train_dataloader()
    iterator = iter(loader)
    module.load_state_dict({"tokens_seen": module.plan.step(5).tokens_before})
    assert len(list(iterator)) == len(loader) - 5


def test_a_position_of_another_schedule_is_refused(corpus: Path) -> None:
    with pytest.raises(ValueError, match="stands at 33 tokens, where no step of batch_size 8"):
        datamodule(corpus).load_state_dict({"tokens_seen": 33})


@pytest.mark.parametrize(("world_size", "val_batch_size"), [(1, 3), (2, 3), (4, 5), (3, 64)])
def test_validation_predicts_every_held_out_token_but_the_first_once(
    corpus: Path, world_size: int, val_batch_size: int
) -> None:
    ranks = []
    for rank in range(world_size):
        loader = on_rank(datamodule(corpus, val_batch_size=val_batch_size), rank, world_size).val_dataloader()
        assert isinstance(loader, BatchLoader)
        ranks.append(list(loader))
        assert len(ranks[-1]) == len(loader)
    assert len({len(batches) for batches in ranks}) == 1
    val = datamodule(corpus).opened.val
    rows = [batch for index in range(len(ranks[0])) for batch in (batches[index] for batches in ranks)]
    labels = torch.cat([batch["labels"] for batch in rows])
    assert labels[labels != -100].tolist() == val.read(1, len(val)).tolist()
    for batches in zip(*ranks, strict=True):
        counted = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        assert [batch["step_labels"] for batch in batches] == [counted] * world_size
        assert [batch["step_tokens"] for batch in batches] == [world_size * batches[0]["labels"].numel()] * world_size


def test_the_bytes_of_the_labels_are_those_of_the_held_out_text(corpus: Path) -> None:
    module = datamodule(corpus)
    labels = torch.cat([batch["labels"].flatten() for batch in module.val_dataloader()])
    counted = labels[labels != -100].numpy()
    size = (corpus.parent / "prepared/val.txt").stat().st_size
    assert int(module.token_bytes[counted].sum(dtype=np.int64)) == size > 0


def test_without_held_out_documents_there_is_no_validation(corpus: Path, tmp_path: Path) -> None:
    assert datamodule(corpus, val_fraction=0.0, folder=str(tmp_path / "out")).val_dataloader() == []


def test_iterating_leaves_the_global_random_state_alone(corpus: Path) -> None:
    module = datamodule(corpus)
    before = torch.get_rng_state()
    next(iter(module.train_dataloader()))
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_can_be_handed_to_a_worker_that_shares_no_memory(corpus: Path) -> None:
    loader = datamodule(corpus).train_dataloader()
    request = next(loader.requests())
    copy = pickle.loads(pickle.dumps(loader.batches))
    assert torch.equal(copy[request]["input_ids"], loader.batches[request]["input_ids"])


class Bigram(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(280, 280)
        self.seen: list[tuple[int, list[list[int]]]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.seen.append((batch_idx, batch["input_ids"].tolist()))
        return functional.cross_entropy(self.table(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())

    def validation_step(self, batch: dict[str, Any]) -> None:
        assert batch["labels"].shape == batch["input_ids"].shape

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Kill(pl.Callback):
    """Saves after an optimizer step, and ends the run some micro-batches later."""

    def __init__(self, path: Path, save_after: int, kill_after: int) -> None:
        self.path = path
        self.save_after = save_after
        self.kill_after = kill_after

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.save_after and not self.path.exists():
            trainer.save_checkpoint(self.path)
        if trainer.fit_loop.total_batch_idx + 1 == self.kill_after:
            raise RuntimeError("killed")


def trainer(tmp_path: Path, *callbacks: pl.Callback) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        val_check_interval=6,
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
    )


@pytest.mark.parametrize(("save_after", "kill_after"), [(5, 11), (6, 12), (17, 37), (25, 50)])
def test_a_killed_fit_goes_on_bitwise_as_if_it_had_not_been(
    corpus: Path, tmp_path: Path, save_after: int, kill_after: int
) -> None:
    torch.manual_seed(0)
    straight = Bigram()
    module = datamodule(corpus)
    straight_trainer = trainer(tmp_path)
    straight_trainer.fit(straight, module)
    assert straight_trainer.global_step == module.plan.num_steps == 25
    assert module.state_dict() == {"tokens_seen": module.plan.step(25).tokens_before}

    torch.manual_seed(0)
    killed = Bigram()
    with pytest.raises(RuntimeError, match="killed"):
        trainer(tmp_path, Kill(tmp_path / "a.ckpt", save_after, kill_after)).fit(killed, datamodule(corpus))
    assert killed.seen == straight.seen[:kill_after]

    resumed = Bigram()
    resumed_trainer = trainer(tmp_path)
    resumed_trainer.fit(resumed, datamodule(corpus), ckpt_path=tmp_path / "a.ckpt")
    assert resumed.seen == straight.seen[2 * save_after :]
    assert resumed_trainer.global_step == 25
    assert torch.equal(resumed.table.weight, straight.table.weight)


@pytest.mark.parametrize(
    ("world_size", "accumulate", "changes", "message"),
    [
        (3, 1, {}, "batch_size is 8 rows, expected a multiple of 3 ranks times accumulate_grad_batches 1"),
        (2, 3, {}, "batch_size is 8 rows, expected a multiple of 2 ranks times accumulate_grad_batches 3"),
        (2, 4, {}, "ramp_multiple is 4 rows, expected a multiple of 2 ranks times accumulate_grad_batches 4"),
        (2, 1, {"ramp_multiple": 1}, "ramp_multiple is 1 rows, expected a multiple of 2 ranks"),
    ],
)
def test_a_batch_that_cannot_be_shared_out_evenly_is_refused(
    corpus: Path, world_size: int, accumulate: int, changes: dict[str, int], message: str
) -> None:
    module = on_rank(datamodule(corpus, **changes), 0, world_size, accumulate)
    with pytest.raises(ValueError, match=message):
        module.train_dataloader()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 0}, "seq_len is 0, expected at least 1"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"val_batch_size": 0}, "val_batch_size is 0, expected at least 1"),
        ({"seed": -1}, "seed is -1 and num_workers 0, expected 0 or more"),
        ({"num_workers": -2}, "seed is 3 and num_workers -2, expected 0 or more"),
        ({"ramp_multiple": 0}, "ramp_multiple 0, expected at least 1"),
        ({"total_tokens": 0}, "total_tokens is 0, expected at least 1"),
        ({"seq_len": 5000}, r"the train split in .* has \d+ tokens in \d+ documents, expected at least seq_len \+ 1"),
        ({"seq_len": 500}, r"the val split in .* has \d+ tokens in \d+ documents, .* = 501: give more documents"),
    ],
)
def test_numbers_that_cannot_work_are_refused(corpus: Path, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        datamodule(corpus, **changes)


def test_the_data_package_does_not_import_lightning() -> None:
    code = "import sys, ds_lightning.data; assert 'lightning' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_data_package_has_no_other_lazy_name() -> None:
    import ds_lightning.data

    with pytest.raises(AttributeError, match=r"module 'ds_lightning\.data' has no attribute 'Nothing'"):
        ds_lightning.data.Nothing  # noqa: B018  # looking it up is the test
