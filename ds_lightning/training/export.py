"""Weights out of runs and into them, in Hugging Face layout."""

from pathlib import Path
from typing import Any

import torch

from ds_lightning.config import DeepSeekConfig, RopeScaling
from ds_lightning.data.tokenizer import END_OF_TEXT, PAD, load_tokenizer, special_id
from ds_lightning.flops import param_count
from ds_lightning.models import DeepSeek
from ds_lightning.models.hf import load_hf, save_hf
from ds_lightning.training import checkpoint
from ds_lightning.training.run_folder import CONFIG, read_config, value_at
from ds_lightning.training.shards import whole_state


def export_checkpoint(path: Path, folder: Path, *, tokenizer_file: Path | None = None, overwrite: bool = False) -> Path:
    """Write the weights of a run in Hugging Face layout, the tokenizer beside them.

    Args:
        path: Folder of a run (its newest valid checkpoint), or one of its checkpoints.
        folder: Where to write.
        tokenizer_file: A ``tokenizer.json``, a ``chat_template.jinja`` beside it if there is one; none: that of the
            run's data, whose end-of-text and padding tokens are then named.
        overwrite: Replace an earlier export.

    Returns:
        The checkpoint that was exported.

    Raises:
        ValueError: If there is no valid checkpoint, no run around it, no tokenizer, or the run's config is damaged.
    """
    run_dir, path = _locate(path)
    config = read_config(run_dir / CONFIG)
    fields = value_at(config, "model.init_args.config")
    prepared, named = (value_at(config, f"data.init_args.{key}") for key in ("folder", "tokenizer"))
    if not isinstance(fields, dict) or not (isinstance(prepared, str) or isinstance(named, str)):
        raise ValueError(f"{run_dir / CONFIG} lacks model.init_args.config or data.init_args.folder, expected a run's")
    own = tokenizer_file is None
    if tokenizer_file is None:
        tokenizer_file = Path(prepared) / "tokenizer.json" if prepared else Path(named)
    if not tokenizer_file.is_file():
        raise ValueError(f"{tokenizer_file} is missing, expected the run's tokenizer: name it with --tokenizer")
    eos_id = pad_id = None
    if own:
        tokenizer = load_tokenizer(tokenizer_file)
        eos_id, pad_id = special_id(tokenizer, END_OF_TEXT), special_id(tokenizer, PAD)
    try:
        model = build_model(fields, load_weights(path))
    except (RuntimeError, TypeError) as error:  # of the state and of the fields
        mismatch = str(error).splitlines()[-1].strip()
        raise ValueError(f"{run_dir / CONFIG} does not describe the weights of {path}: {mismatch}") from None
    save_hf(model, folder, tokenizer_file=tokenizer_file, eos_token_id=eos_id, pad_token_id=pad_id, overwrite=overwrite)
    return path


def _locate(path: Path) -> tuple[Path, Path]:
    """Return the folder of a run and the checkpoint in it that a path means."""
    if not path.exists():
        raise ValueError(f"{path} does not exist, expected the folder of a run or one of its checkpoints")
    if (path / CONFIG).is_file():
        newest, skipped = checkpoint.newest_valid(path / "checkpoints")
        if newest is None:
            reasons = "; ".join(map(str, skipped)) or f"{path / 'checkpoints'} holds none"
            raise ValueError(f"{path} has no valid checkpoint: {reasons}")
        return path, newest
    checkpoint.verify(path)
    path = path.parent if path.name == checkpoint.STATE else path
    run_dir = path.parent.parent
    if not (run_dir / CONFIG).is_file():
        raise ValueError(f"{run_dir / CONFIG} is missing, expected the config of the run that wrote {path}")
    return run_dir, path


def import_weights(source: Path, folder: Path, *, overwrite: bool = False) -> int:
    """Read a Hugging Face folder, check it, and write it in the layout of this package's exports, in fp32.

    Args:
        source: Folder with ``config.json`` and safetensors, FP8 blocks or not.
        folder: Where to write.
        overwrite: Replace an earlier import.

    Returns:
        Number of parameters, selection biases included.

    Raises:
        ValueError: If the folder's files do not make a DeepSeek model.
    """
    model = load_hf(source)
    tokenizer_file = source / "tokenizer.json"
    save_hf(model, folder, tokenizer_file=tokenizer_file if tokenizer_file.is_file() else None, overwrite=overwrite)
    return param_count(model.config, include_mtp=True)


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the state of the LightningModule in a checkpoint that was verified, brought together from all shards.

    Args:
        path: The checkpoint's folder.
    """
    if (path / checkpoint.STATE).is_dir():
        return whole_state(path / checkpoint.STATE)
    state: dict[str, torch.Tensor] = torch.load(path / checkpoint.STATE, map_location="cpu", weights_only=True)[
        "state_dict"
    ]
    return state


def build_model(config: dict[str, Any], state: dict[str, torch.Tensor]) -> DeepSeek:
    """Return the model of a run's checkpoint.

    Args:
        config: Fields of ``DeepSeekConfig``, as the run's config has them.
        state: State of the LightningModule around the model.
    """
    rope = config.get("rope_scaling")
    shape = DeepSeekConfig(**{**config, "rope_scaling": RopeScaling(**rope) if rope else None})
    with torch.device("meta"):
        model = DeepSeek(shape)
    weights = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
    model.load_state_dict(weights, assign=True)
    return model
