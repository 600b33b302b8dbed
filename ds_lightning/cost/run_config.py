"""What a plan needs from the YAML that trains, read without torch.

Defaults are those of the constructors that the keys belong to; a test holds the two together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ds_lightning.config import DeepSeekConfig

DEFAULTS: dict[str, Any] = {
    "model.init_args.optimizer": "adamw",
    "model.init_args.recompute": False,
    "data.init_args.val_fraction": 0.02,
    "data.init_args.val_batch_size": 8,
    "data.init_args.ramp_tokens": 0,
    "data.init_args.start_batch_size": None,
    "trainer.accelerator": "auto",
    "trainer.devices": "auto",
    "trainer.num_nodes": 1,
    "trainer.precision": None,
    "trainer.accumulate_grad_batches": 1,
    "trainer.val_check_interval": 1.0,
    "trainer.limit_val_batches": 1.0,
    "trainer.num_sanity_val_steps": 2,
    "cost.device": "cpu",
    "cost.usd_per_device_hour": None,
    "cost.market": "on-demand",
    "budget.usd": None,
    "budget.hours": None,
    "checkpoints.every_n_steps": None,
    "checkpoints.every_n_seconds": None,
}
"""Keys that may be left out, by their dotted name."""

REQUIRED = (
    "model.init_args.config",
    "model.init_args.total_tokens",
    "data.init_args.seq_len",
    "data.init_args.batch_size",
)


@dataclass(frozen=True)
class RunConfig:
    """A run as its YAML describes it.

    Raises:
        ValueError: If a number is out of range.
    """

    files: tuple[str, ...]
    """Where it was read from."""
    model: DeepSeekConfig
    values: dict[str, Any]
    """Values of the keys in ``DEFAULTS`` and ``REQUIRED`` by dotted name."""
    folder: str | None
    """Where the data are or will be prepared."""

    def __post_init__(self) -> None:
        """Refuse what could not be trained."""
        for key in ("model.init_args.total_tokens", "data.init_args.seq_len", "data.init_args.batch_size"):
            value = self.values[key]
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{key} is {value!r}, expected a whole number of at least 1")
        for key in ("budget.usd", "budget.hours"):
            value = self.values[key]
            if value is not None and not value > 0:
                raise ValueError(f"{key} is {value}, expected more than 0")

    def __getitem__(self, key: str) -> Any:
        """Return a value by its dotted name."""
        return self.values[key]

    @property
    def tokens(self) -> int:
        """Planned tokens."""
        return int(self["model.init_args.total_tokens"])

    @property
    def seq_len(self) -> int:
        """Tokens a row."""
        return int(self["data.init_args.seq_len"])

    @property
    def batch_size(self) -> int:
        """Rows of an optimizer step after the ramp."""
        return int(self["data.init_args.batch_size"])

    def mixed(self, device: str) -> bool:
        """Whether products run in 16 bits; taken for granted where no precision is given and the device is a GPU."""
        precision = self["trainer.precision"]
        return device != "cpu" if precision is None else str(precision).startswith(("bf16", "16"))

    @property
    def devices(self) -> int | None:
        """Devices that the trainer asks for; none: whatever there is."""
        devices = self["trainer.devices"]
        if isinstance(devices, list):
            devices = len(devices)
        return devices * self["trainer.num_nodes"] if isinstance(devices, int) and devices > 0 else None

    def steps(self, tokens: float) -> float:
        """Optimizer steps of a number of tokens; the batch grows evenly over the ramp, as its stairs do."""
        ramp, full = self["data.init_args.ramp_tokens"], self.batch_size * self.seq_len
        if not ramp:
            return tokens / full
        first = self["data.init_args.start_batch_size"] * self.seq_len
        inside = min(tokens, ramp)
        # d steps = d tokens / (first + (full - first) tokens / ramp)
        growth = (full - first) / ramp
        climbed = inside / first if growth == 0 else math.log1p(growth * inside / first) / growth
        return float(climbed + (tokens - inside) / full)


def read_run(files: str | Path | Sequence[str | Path]) -> RunConfig:
    """Read the config files of a run, later ones over earlier ones.

    Raises:
        ValueError: If a file is not YAML, or together they describe no model, no data or no tokens.
        OSError: If a file cannot be read.
    """
    paths = [Path(files)] if isinstance(files, str | Path) else [Path(file) for file in files]
    return run_of(read_sections(paths), tuple(map(str, paths)))


def read_sections(files: Sequence[str | Path]) -> dict[str, Any]:
    """Return the sections of config files, later ones over earlier ones, with the fields of the model in their place.

    Raises:
        ValueError: If a file is not YAML.
        OSError: If a file cannot be read.
    """
    content: dict[str, Any] = {}
    for path in map(Path, files):
        content = merged(content, _resolved(read_yaml(path), path))
    return content


def run_of(content: dict[str, Any], files: tuple[str, ...]) -> RunConfig:
    """Take what a plan needs out of a config.

    Raises:
        ValueError: If the config describes no model, no data or no tokens.
    """
    names = ", ".join(files)
    values = {key: _at(content, key, default) for key, default in DEFAULTS.items()}
    for key in REQUIRED:
        values[key] = _at(content, key, None)
        if values[key] is None:
            raise ValueError(f"{names} has no {key}, expected a run such as configs/pretrain/tiny.yaml")
    shape = values.pop("model.init_args.config")
    if not isinstance(shape, dict):
        raise ValueError(f"{names}: model.init_args.config is {shape!r}, expected a file or the fields of a model")
    return RunConfig(
        files=files,
        model=DeepSeekConfig.from_dict(shape),
        values=values,
        folder=_at(content, "data.init_args.folder", None),
    )


def lacks(content: dict[str, Any]) -> list[str]:
    """Return the keys that a plan needs and a config does not have: those of fine-tuning by epochs, of rollouts."""
    return [key for key in REQUIRED if _at(content, key, None) is None]


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of sections.

    Raises:
        ValueError: If it is not one.
        OSError: If it cannot be read.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {content!r:.80}, expected sections such as model, data and trainer")
    return content


def _resolved(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Put the fields of a model in the place of the path to them, which is relative to the file."""
    shape = _at(content, "model.init_args.config", None)
    if isinstance(shape, str):
        content["model"]["init_args"]["config"] = read_yaml(path.parent / shape)
    return content


def merged(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Return nested settings in which later ones replace earlier ones, value by value."""
    both = dict(earlier)
    for key, value in later.items():
        nested = isinstance(value, dict) and isinstance(earlier.get(key), dict)
        both[key] = merged(earlier[key], value) if nested else value
    return both


def first_difference(key: str, earlier: Any, now: Any) -> str:
    """Say in what two nested settings differ first, by dotted key; an empty text where they are equal."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        for name in [*earlier, *(name for name in now if name not in earlier)]:
            difference = first_difference(f"{key}.{name}" if key else name, earlier.get(name), now.get(name))
            if difference:
                return difference
        return ""
    return "" if earlier == now else f"{key} was {earlier!r}, is now {now!r}"


def _at(content: Any, key: str, default: Any) -> Any:
    for part in key.split("."):
        if not isinstance(content, dict) or part not in content:
            return default
        content = content[part]
    return default if content is None else content
