"""Oracle: the tensors that went in, and the message that names what keeps them from coming out."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer

from ds_lightning.config import DeepSeekConfig
from ds_lightning.data import Document, train_tokenizer
from ds_lightning.models import DeepSeek
from ds_lightning.models.hf import load_hf, save_hf
from ds_lightning.training import checkpoint
from ds_lightning.training.export import build_model, export_checkpoint, import_weights
from tests.models.tiny_export import random_model

VOCAB = 300
SHAPE = replace(random_model().config, vocab_size=VOCAB)
FIELDS: dict[str, Any] = asdict(SHAPE)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([Document("a", "some text")], VOCAB)


def state_of(shape: DeepSeekConfig) -> dict[str, torch.Tensor]:
    """Return the state that a LightningModule around a random model has."""
    return {f"model.{key}": value for key, value in DeepSeek(shape).state_dict().items()}


@pytest.fixture
def run(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """A run folder with a checkpoint of a random model."""
    (tmp_path / "data").mkdir()
    tokenizer.save(str(tmp_path / "data" / "tokenizer.json"))
    run = tmp_path / "run"
    temporary = checkpoint.temporary(run / "checkpoints", 3)
    checkpoint.begin(temporary)
    torch.save({"state_dict": state_of(SHAPE)}, temporary / checkpoint.STATE)
    checkpoint.publish(temporary, tokens=30)
    _write_config(run, FIELDS)
    return run


def _write_config(run: Path, fields: Any) -> None:
    init = {"config": fields} if isinstance(fields, dict) else {}
    config = {"model": {"init_args": init}, "data": {"init_args": {"folder": str(run.parent / "data")}}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.parametrize("named", ["", "checkpoints/step-00000003", "checkpoints/step-00000003/state.ckpt"])
def test_a_run_and_its_checkpoint_give_the_same_weights(run: Path, named: str, tmp_path: Path) -> None:
    path = export_checkpoint(run / named, tmp_path / "hf")
    assert path == run / "checkpoints" / "step-00000003"
    trained = torch.load(path / checkpoint.STATE)["state_dict"]
    exported = load_hf(tmp_path / "hf").state_dict()
    assert {f"model.{name}" for name in exported} == trained.keys()
    assert all(torch.equal(exported[name.removeprefix("model.")], value) for name, value in trained.items())


def test_what_was_exported_is_imported(run: Path, tmp_path: Path) -> None:
    export_checkpoint(run, tmp_path / "hf")
    size = sum(part.numel() for part in load_hf(tmp_path / "hf").state_dict().values())
    assert import_weights(tmp_path / "hf", tmp_path / "again") == size
    (tmp_path / "hf" / "tokenizer.json").unlink()
    import_weights(tmp_path / "hf", tmp_path / "again", overwrite=True)
    assert not (tmp_path / "again" / "tokenizer.json").exists()


def test_yarn_comes_back_from_the_fields_of_a_config() -> None:
    assert SHAPE.rope_scaling is not None
    assert build_model(FIELDS, state_of(SHAPE)).config == SHAPE
    plain = replace(SHAPE, rope_scaling=None)
    assert build_model(asdict(plain), state_of(plain)).config == plain


def _no_checkpoint(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def _damaged_checkpoint(run: Path) -> None:
    (run / "checkpoints" / "step-00000003" / "state.ckpt").write_bytes(b"")


def _no_model(run: Path) -> None:
    _write_config(run, None)


def _wrong_shape(run: Path) -> None:
    _write_config(run, {**FIELDS, "hidden_size": FIELDS["hidden_size"] * 2})


def _unknown_field(run: Path) -> None:
    _write_config(run, {**FIELDS, "hidden_siz": 3})


def _impossible_shape(run: Path) -> None:
    _write_config(run, {**FIELDS, "num_attention_heads": 0})


def _no_tokenizer(run: Path) -> None:
    (run.parent / "data" / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_no_checkpoint, r"run has no valid checkpoint: .*checkpoints holds none"),
        (_damaged_checkpoint, r"run has no valid checkpoint: skipped .*state.ckpt has 0 bytes, expected \d+"),
        (_no_model, r"config.yaml lacks model.init_args.config or data.init_args.folder, expected a run's"),
        (_wrong_shape, r"config.yaml does not describe the weights of .*step-00000003: size mismatch"),
        (_unknown_field, r"config.yaml does not describe the weights of .*hidden_siz"),
        (_impossible_shape, r"num_attention_heads is 0, expected at least 1"),
        (_no_tokenizer, r"tokenizer.json is missing, expected the run's tokenizer: name it with --tokenizer"),
    ],
)
def test_a_run_that_cannot_be_exported_is_named(run: Path, spoil: Any, message: str, tmp_path: Path) -> None:
    spoil(run)
    with pytest.raises(ValueError, match=message):
        export_checkpoint(run, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_checkpoint_without_its_run_is_refused(run: Path, tmp_path: Path) -> None:
    (run / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"config.yaml is missing, expected the config of the run that wrote"):
        export_checkpoint(run / "checkpoints" / "step-00000003", tmp_path / "hf")
    with pytest.raises(
        ValueError, match=r"none does not exist, expected the folder of a run or one of its checkpoints"
    ):
        export_checkpoint(tmp_path / "none", tmp_path / "hf")


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(run: Path, tmp_path: Path) -> None:
    larger, words = tmp_path / "larger.json", "river stone cloud light number value return define class import yield "
    train_tokenizer([Document("a", words * 9)], 310).save(str(larger))
    with pytest.raises(ValueError, match=r"larger.json has ids up to \d+, expected at most 299 \(vocab_size - 1\)"):
        export_checkpoint(run, tmp_path / "hf", tokenizer_file=larger)


def test_an_earlier_export_is_replaced_only_when_told(run: Path, tmp_path: Path) -> None:
    export_checkpoint(run, tmp_path / "hf")
    with pytest.raises(ValueError, match=r"hf is not empty \(config.json\), expected a new folder; overwrite replaces"):
        export_checkpoint(run, tmp_path / "hf")
    export_checkpoint(run, tmp_path / "hf", overwrite=True)
    save_hf(random_model(), tmp_path / "other")
    with pytest.raises(ValueError, match=r"other holds a model with vocab_size \d+, expected 300 to overwrite it"):
        export_checkpoint(run, tmp_path / "other", overwrite=True)
