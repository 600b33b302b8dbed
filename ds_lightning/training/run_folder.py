"""The folder of a run: which config it belongs to."""

from pathlib import Path
from typing import Any

import yaml

from ds_lightning.cost.run_config import first_difference
from ds_lightning.whole_file import write_whole

CONFIG = "config.yaml"

_FIXED = (
    "seed_everything",
    "model",
    "data",
    "trainer.precision",
    "trainer.accumulate_grad_batches",
    "trainer.gradient_clip_val",
)


def check_run_folder(folder: Path, config: dict[str, Any]) -> None:
    """Refuse a folder in which another training has saved its state.

    Model, data, seed, precision, accumulation and clipping may not change within a run; where it runs, how many
    processes read ahead, what it logs and how often it saves may. Before the first checkpoint there is nothing that
    another config could spoil.

    Args:
        folder: The run's folder.
        config: The resolved config.

    Raises:
        ValueError: If the folder belongs to another config; the message names the first difference.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, expected a folder for the run")
    if not (folder / CONFIG).is_file() or not any(folder.glob("checkpoints/step-*")):
        return
    earlier = read_config(folder / CONFIG)
    for key in _FIXED:
        difference = first_difference(key, _fixed(earlier, key), _fixed(config, key))
        if difference:
            raise ValueError(f"{folder} belongs to another config: {difference}; give another --out")


def _fixed(config: dict[str, Any], key: str) -> Any:
    """Return what may not change under a key: how many processes read ahead changes no batch."""
    value = value_at(config, key)
    if key != "data" or not isinstance(value_at(value, "init_args"), dict):
        return value
    return {**value, "init_args": {**value["init_args"], "num_workers": 0}}


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write the resolved config into a run folder.

    Args:
        folder: The run's folder; made if need be.
        config: The resolved config.

    Raises:
        OSError: If it cannot be written; an earlier config is then as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / CONFIG, yaml.safe_dump(config, sort_keys=False))


def read_config(path: Path) -> dict[str, Any]:
    """Read a config file.

    Raises:
        ValueError: If it is not a YAML mapping of sections.
        OSError: If it cannot be read.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}, expected YAML") from None
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path} is not YAML: {error.problem}{line}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {content!r:.80}, expected sections such as model, data and trainer")
    return content


def value_at(config: Any, key: str) -> Any:
    """Return the value under a dotted key; none where there is none."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config
