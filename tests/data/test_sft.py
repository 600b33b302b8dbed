"""Oracle: each conversation rendered and encoded by itself, its labels by a loop over its tokens."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ds_lightning.data import ChatTemplate, Document, SFTDataModule, chat_tokenizer, load_tokenizer, train_tokenizer
from ds_lightning.data.batches import BatchLoader
from ds_lightning.data.packing import IGNORED, pack_best_fit
from ds_lightning.data.sampler import row_order
from ds_lightning.losses.next_token import next_token_loss
from tests.models.tiny_export import random_model

SEQ = 64


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and 60 conversations of one or two answers."""
    folder = tmp_path_factory.mktemp("sft")
    draw = random.Random(0)
    with (folder / "a.jsonl").open("w") as file:
        for number in range(60):
            turns = [
                {"role": role, "content": f"{number} " + "word " * draw.randrange(8)}
                for _ in range(draw.choice((1, 1, 2)))
                for role in ("user", "assistant")
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    train_tokenizer([Document("a", "0 1 2 3 4 5 6 7 8 9 word word")], 280).save(str(folder / "tokenizer.json"))
    return folder


def datamodule(source: Path, folder: Path | None = None, **changes: Any) -> SFTDataModule:
    arguments: dict[str, Any] = {
        "sources": [str(source / "a.jsonl")],
        "folder": str(folder or source / "prepared"),
        "tokenizer": str(source / "tokenizer.json"),
        "seq_len": SEQ,
        "batch_size": 4,
        "epochs": 2.5,
        "val_fraction": 0.2,
        "val_batch_size": 3,
        "seed": 3,
    }
    module = SFTDataModule(**(arguments | changes))
    module.prepare_data()
    module.setup("fit")
    return module


def on_rank(module: SFTDataModule, rank: int, world_size: int, accumulate: int = 1) -> SFTDataModule:
    module.trainer = SimpleNamespace(  # type: ignore[assignment]  # the facts it asks a trainer for
        global_rank=rank, world_size=world_size, accumulate_grad_batches=accumulate, global_step=0
    )
    return module


def expected_samples(source: Path) -> list[list[tuple[int, int]]]:
    """Each conversation as pairs of an input and its label, from the definition."""
    tokenizer = chat_tokenizer(load_tokenizer(source / "tokenizer.json"))
    samples = []
    for line in (source / "a.jsonl").read_text().splitlines():
        ids: list[int] = []
        counted: list[bool] = []
        for message in json.loads(line)["messages"]:
            if message["role"] == "user":
                parts = [(f"<|user|>{message['content']}<|assistant|><think>", False)]
            else:
                parts = [(f"</think>{message['content']}<|end_of_text|>", True)]
            for text, answer in parts:
                new = tokenizer.encode(text).ids
                ids += new
                counted += [answer] * len(new)
        labels = [token if here else IGNORED for token, here in zip(ids[1:], counted[1:], strict=True)]
        samples.append(list(zip(ids[:-1], labels, strict=True)))
    return samples


def samples_of(inputs: Tensor, labels: Tensor, segments: Tensor) -> list[list[tuple[int, int]]]:
    """The conversations of some rows, told apart by their segments."""
    samples = []
    for row in range(len(inputs)):
        for segment in range(int(segments[row].max()) + 1):
            here = segments[row] == segment
            samples.append(list(zip(inputs[row][here].tolist(), labels[row][here].tolist(), strict=True)))
    return samples


def test_every_conversation_is_in_one_row_whole_with_labels_on_its_answers_alone(source: Path) -> None:
    module = datamodule(source)
    found = []
    for split in ("train", "val"):
        rows = module.rows(split)
        assert len(rows) > 2
        for row in range(len(rows)):
            batch = rows[next(module.train_dataloader().requests())._replace(rows=(row,))]
            found += samples_of(batch["input_ids"], batch["labels"], batch["segment_ids"])
            counted = batch["labels"] != IGNORED
            assert rows.counted(np.array([row])) == int(counted.sum()) > 0
            assert not (counted & (batch["segment_ids"] < 0)).any()
            padding = batch["segment_ids"] < 0
            assert (batch["input_ids"][padding] == module.opened.manifest.pad_id).all()
            assert (padding.int().diff() >= 0).all()
    assert sorted(found) == sorted(expected_samples(source))


def steps_of(source: Path, world_size: int, accumulate: int, **changes: Any) -> list[tuple[int, int, list[list[int]]]]:
    loaders = [
        on_rank(datamodule(source, **changes), rank, world_size, accumulate).train_dataloader()
        for rank in range(world_size)
    ]
    ranks = [list(loader) for loader in loaders]
    assert [len(loader) for loader in loaders] == [len(batches) for batches in ranks]
    steps = []
    for start in range(0, len(ranks[0]), accumulate):
        batches = [ranks[rank][start + micro] for micro in range(accumulate) for rank in range(world_size)]
        (facts,) = {(batch["step_tokens"], batch["step_labels"]) for batch in batches}
        assert facts[1] == sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
        steps.append((*facts, torch.cat([batch["input_ids"] for batch in batches]).tolist()))
    return steps


@pytest.mark.parametrize(("world_size", "accumulate", "num_workers"), [(2, 1, 0), (1, 4, 0), (2, 2, 0), (1, 1, 2)])
def test_a_step_sees_the_same_rows_whatever_the_ranks_accumulation_and_workers(
    source: Path, world_size: int, accumulate: int, num_workers: int
) -> None:
    assert steps_of(source, world_size, accumulate, num_workers=num_workers) == steps_of(source, 1, 1)


def test_epochs_end_with_the_step_that_completes_them_and_each_has_an_order_of_its_own(source: Path) -> None:
    module = datamodule(source)
    size = len(module.rows("train"))
    assert module.plan.total_tokens == -(-5 * size // 2) * SEQ
    steps = steps_of(source, 1, 1)
    rows = [row for *_, step in steps for row in step]
    order = row_order(size, 0, len(rows), seed=3).tolist()
    assert sorted(order[:size]) == sorted(order[size : 2 * size]) == list(range(size))
    assert order[:size] != order[size : 2 * size]
    in_order = module.rows("train")[next(module.train_dataloader().requests())._replace(rows=tuple(range(size)))]
    assert rows == in_order["input_ids"][order].tolist()
    assert len(rows) - 4 < 2.5 * size <= len(rows)
    assert datamodule(source, epochs=None, total_tokens=1000).plan.total_tokens == 1000


@pytest.mark.parametrize("step", [1, 3])
def test_iteration_goes_on_where_the_state_was_taken(source: Path, step: int) -> None:
    straight = list(datamodule(source).train_dataloader())
    module = datamodule(source)
    module.load_state_dict({"tokens_seen": step * 4 * SEQ})
    rest = list(module.train_dataloader())
    assert len(rest) == len(straight) - step
    for one, other in zip(rest, straight[step:], strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert one["step_labels"] == other["step_labels"]


@pytest.mark.parametrize("world_size", [1, 3])
def test_validation_counts_every_held_out_answer_once(source: Path, world_size: int) -> None:
    ranks = []
    for rank in range(world_size):
        loader = on_rank(datamodule(source), rank, world_size).val_dataloader()
        assert isinstance(loader, BatchLoader)
        ranks.append(list(loader))
    assert len({len(batches) for batches in ranks}) == 1
    labels = torch.cat([batch["labels"].flatten() for batches in ranks for batch in batches])
    val = datamodule(source).rows("val")
    assert int((labels != IGNORED).sum()) == val.counted(np.arange(len(val) + 9))
    assert sum(batch["step_labels"] for batch in ranks[0]) == int((labels != IGNORED).sum())


def test_conversations_in_one_row_do_not_see_each_other(source: Path) -> None:
    module = datamodule(source)
    batch = module.rows("train")[
        next(module.train_dataloader().requests())._replace(rows=(len(module.rows("train")) - 2,))
    ]
    model = random_model().double()
    vocab, segments = model.config.vocab_size, batch["segment_ids"][0]
    inputs, labels = batch["input_ids"][0] % vocab, batch["labels"][0]
    labels = torch.where(labels == IGNORED, IGNORED, labels % vocab)
    assert int(segments.max()) >= 1
    together = next_token_loss(model(inputs[None], segment_ids=segments[None]), model.lm_head.weight, labels[None])
    alone = sum(
        next_token_loss(model(inputs[segments == s][None]), model.lm_head.weight, labels[segments == s][None])
        for s in range(int(segments.max()) + 1)
    )
    # Positions go on through the row: rotary tables in fp32 make attention depend on them by 1e-7 of its value.
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)
    seen = next_token_loss(model(inputs[None]), model.lm_head.weight, labels[None])
    assert abs(float(seen - together)) > 1e-4 * abs(float(together))


def test_rows_can_be_handed_to_a_worker_that_shares_no_memory(source: Path) -> None:
    loader = datamodule(source).train_dataloader()
    request = next(loader.requests())
    assert torch.equal(pickle.loads(pickle.dumps(loader.batches))[request]["labels"], loader.batches[request]["labels"])


def test_prompts_of_a_conversation_encode_to_its_markers(source: Path) -> None:
    module = datamodule(source)
    prompt = ChatTemplate(Path(module.folder) / "chat_template.jinja").render(
        [{"role": "user", "content": "1"}], add_generation_prompt=True
    )
    ids = module.tokenizer.encode(prompt).ids
    assert [module.tokenizer.id_to_token(index) for index in ids] == ["<|user|>", "1", "<|assistant|>", "<think>"]


@pytest.mark.parametrize(("overlong", "cut"), [("truncate", True), ("skip", False)])
def test_conversations_longer_than_a_row_are_cut_or_left_out_and_reported(
    source: Path, tmp_path: Path, overlong: str, cut: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    module = datamodule(source, tmp_path / "out", overlong=overlong, seq_len=16, val_fraction=0.0, epochs=1)
    assert module.val_dataloader() == []
    expected = []
    for sample in expected_samples(source):
        kept = sample[:16] if cut or len(sample) <= 16 else []
        if any(label != IGNORED for _, label in kept):
            expected.append(kept)
    size = len(module.rows("train"))
    batch = module.rows("train")[next(module.train_dataloader().requests())._replace(rows=tuple(range(size)))]
    assert sorted(samples_of(batch["input_ids"], batch["labels"], batch["segment_ids"])) == sorted(expected)
    long = sum(len(sample) > 16 for sample in expected_samples(source))
    assert module.opened.manifest.overlong == long > 0
    left_out = 60 - len(expected)
    assert capsys.readouterr().err.splitlines()[0] == (
        f"{long} of 60 conversations have more than seq_len + 1 = 17 tokens: {long - left_out} cut, {left_out} left out"
    )


def test_packing_leaves_less_than_the_shortest_sample_would_fill() -> None:
    draw = random.Random(0)
    lengths = [draw.randrange(1, 50) for _ in range(300)]
    rows = pack_best_fit(lengths, 64)
    assert sorted(sample for row in rows for sample in row) == list(range(300))
    filled = [sum(lengths[sample] for sample in row) for row in rows]
    assert max(filled) <= 64
    assert len(rows) <= 1.05 * sum(lengths) / 64 + 1
    expected: list[list[int]] = []
    for sample in sorted(range(300), key=lambda number: (-lengths[number], number)):
        rooms = [(64 - sum(lengths[s] for s in row), n) for n, row in enumerate(expected)]
        fitting = [(room, n) for room, n in rooms if room >= lengths[sample]]
        if fitting:
            expected[min(fitting)[1]].append(sample)
        else:
            expected.append([sample])
    assert rows == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": None}, "epochs is None and total_tokens None, expected one of them"),
        ({"total_tokens": 5}, r"epochs is 2\.5 and total_tokens 5, expected one of them"),
        ({"epochs": 0.0}, r"epochs is 0\.0, expected more than 0"),
        ({"batch_size": 0}, "batch_size is 0 and ramp_multiple 0, expected at least 1"),
        ({"val_fraction": 1.0}, r"val_fraction is 1\.0, expected at least 0 and less than 1"),
        ({"seq_len": 4, "overlong": "skip"}, "none of the 60 conversations fits into seq_len 4, expected at least one"),
        (
            {"seq_len": 9},
            r"a\.jsonl:\d+ has \d+ tokens, expected at most seq_len \+ 1 = 10: raise seq_len, or set over",
        ),
        ({"val_fraction": 1e-9}, r"the val split in .* has none of the 60 conversations, expected at least one: give"),
        ({"val_fraction": 0.9999999}, r"the train split in .* has none of the 60 conversations, expected at least one"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    source: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        datamodule(source, tmp_path / "out", **changes)


def test_a_folder_of_other_files_is_refused_and_one_of_the_same_reused(source: Path, tmp_path: Path) -> None:
    lines = (source / "a.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(lines))
    arguments: dict[str, Any] = {"sources": [str(tmp_path / "a.jsonl")], "folder": str(tmp_path / "out")}
    datamodule(source, **arguments)
    before = (tmp_path / "out/manifest.json").stat().st_mtime_ns
    datamodule(source, **arguments)
    assert (tmp_path / "out/manifest.json").stat().st_mtime_ns == before
    (tmp_path / "a.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(ValueError, match=r"out was prepared with sources_sha256 .*: choose another folder, delete"):
        datamodule(source, **arguments)
