"""What a run measured of its device, for plans of other runs on it."""

from __future__ import annotations

import datetime
import difflib
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ds_lightning.cost.ledger_report import ledger_report
from ds_lightning.cost.memory import Layout, memory_per_device, trained_params
from ds_lightning.cost.roofline import muon_flops
from ds_lightning.cost.run_config import RunConfig, lacks, read_run, read_sections
from ds_lightning.flops import forward_flops_per_token, train_flops_per_token

CALIBRATION = "calibration.json"
"""Name of the calibration that a run leaves in its folder."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Measured speeds of one device, each over what its phase had to do.

    Raises:
        ValueError: If a figure is negative or not a number, or nothing was trained.
    """

    device: str
    """Device in the price list."""
    num_devices: int
    """Devices of the run."""
    date: str
    """Day of the calibration."""
    run: str
    """Folder of the run."""
    train_seconds_per_flop: float
    """Device-seconds of ``train`` over FLOPs, those of Muon's orthogonalisation included."""
    data_seconds_per_token: float
    """Device-seconds of ``data`` a token."""
    validate_seconds_per_flop: float
    """Device-seconds of ``validate`` over forward FLOPs, samples included."""
    checkpoint_seconds_per_parameter: float
    """Seconds of one checkpoint over the model's parameters."""
    export_seconds_per_parameter: float
    """Seconds of the export over the model's parameters."""
    startup_seconds: float
    """Seconds of ``startup``, an attempt; with the preparation of data, if that run prepared them."""
    idle_seconds: float
    """Seconds of ``idle``, an attempt."""
    heldout_tokens: int
    """Tokens that the run validated on at its end."""
    base_memory_gb: float
    """Peak memory of a device less what the closed form counts: interpreter, libraries, mapped data, slack; 0 where the
    run did not record its peak."""

    def __post_init__(self) -> None:
        """Refuse what no run measures."""
        for field in fields(self):
            value = getattr(self, field.name)
            if str(field.type) == "str":
                if not isinstance(value, str):
                    raise ValueError(f"calibration: {field.name} is {value!r}, expected text")
                continue
            wrong = isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
            if wrong or value < 0:
                raise ValueError(f"calibration: {field.name} is {value!r}, expected a finite number of at least 0")
        if not self.train_seconds_per_flop or self.num_devices < 1:
            raise ValueError("calibration: train_seconds_per_flop and num_devices are expected to be more than 0")

    @classmethod
    def read(cls, file: str | Path) -> Calibration:
        """Read a calibration.

        Raises:
            ValueError: If the file is not JSON, or its keys are not those of a calibration.
            OSError: If it cannot be read.
        """
        try:
            values = json.loads(Path(file).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not JSON: {error}") from None
        known = [field.name for field in fields(cls)]
        if not isinstance(values, dict):
            raise ValueError(f"{file} holds a JSON {type(values).__name__}, expected the keys {', '.join(known)}")
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"expected {', '.join(known)}"
                raise ValueError(f"{file}: no key {key!r} in a calibration; {hint}")
        missing = [key for key in known if key not in values]
        if missing:
            raise ValueError(
                f"{file} lacks {', '.join(missing)}: write it anew with ds-lightning calibrate RUN_DIR FILE"
            )
        return cls(**values)

    def write(self, file: str | Path) -> None:
        """Write the calibration as JSON."""
        Path(file).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def calibration_from_run(run_dir: str | Path) -> dict[str, Any]:
    """Return what a finished run measured, as :meth:`Calibration.read` takes it.

    Args:
        run_dir: Folder of the run, with its config, ledger and report.

    Raises:
        ValueError: If the folder is not that of a finished run.
    """
    folder = Path(run_dir)
    report_path = folder / "report.json"
    ledger = ledger_report(folder)
    if not report_path.is_file():
        raise ValueError(f"{folder} has no report.json, expected a run that came to its end: calibrate with that")
    try:
        stage = json.loads(report_path.read_text(encoding="utf-8"))["stages"][0]
        tokens, peak = int(stage["tokens"]), float(stage.get("peak_memory_gb", 0.0))
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{report_path} has no stage with its tokens ({error!r}): end the run anew") from None
    run = read_run(folder / "config.yaml")
    terms = ledger["terms"][-1]
    devices, attempts = terms["num_devices"], ledger["attempts"]
    seconds = {phase: row["seconds"] for phase, row in ledger["phases"].items()}
    steps, parameters = run.steps(tokens), trained_params(run.model)
    heldout = heldout_tokens(run) or 0
    validated = validation_tokens(run, tokens, heldout, devices)
    saves = num_checkpoints(run, steps, sum(seconds.values()))
    measured = Calibration(
        device=terms["device"],
        num_devices=devices,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        run=str(folder),
        train_seconds_per_flop=seconds.get("train", 0.0) * devices / training_flops(run, tokens),
        data_seconds_per_token=seconds.get("data", 0.0) * devices / tokens,
        validate_seconds_per_flop=seconds.get("validate", 0.0)
        * devices
        / (validated * forward_flops_per_token(run.model, run.seq_len, include_mtp=False))
        if validated
        else 0.0,
        checkpoint_seconds_per_parameter=seconds.get("checkpoint", 0.0) / saves / parameters,
        export_seconds_per_parameter=seconds.get("export", 0.0) / parameters,
        startup_seconds=seconds.get("startup", 0.0) / attempts,
        idle_seconds=seconds.get("idle", 0.0) / attempts,
        heldout_tokens=heldout,
        base_memory_gb=max(0.0, peak - _closed_form_gb(run, terms["device"], devices)) if peak else 0.0,
    )
    return asdict(measured)


def write_calibration(run_dir: Path) -> Path | None:
    """Write ``calibration.json`` into the folder of a finished run; none where the planner cannot plan such a run.

    Raises:
        ValueError: If the folder is not that of a finished run.
    """
    if lacks(read_sections([run_dir / "config.yaml"])):
        return None
    path = run_dir / CALIBRATION
    Calibration(**calibration_from_run(run_dir)).write(path)
    return path


def _closed_form_gb(run: RunConfig, device: str, devices: int) -> float:
    """Return the memory that a plan without calibration counts for a device."""
    memory = memory_per_device(
        run.model,
        Layout(num_devices=devices, recompute=run["model.init_args.recompute"]),
        micro_rows=-(-run.batch_size // (devices * run["trainer.accumulate_grad_batches"])),
        seq_len=run.seq_len,
        mixed=run.mixed(device),
        optimizer=run["model.init_args.optimizer"],
        on_cpu=device == "cpu",
    )
    return memory.total / 1e9


def training_flops(run: RunConfig, tokens: float) -> float:
    """Return the FLOPs of training on a number of tokens, Muon's orthogonalisation included."""
    flops = tokens * train_flops_per_token(run.model, run.seq_len)
    if run["model.init_args.optimizer"] == "muon":
        flops += run.steps(tokens) * muon_flops(run.model)
    return flops


def heldout_tokens(run: RunConfig) -> int | None:
    """Return the held-out tokens of a run's prepared data; none where they are not prepared."""
    if not run["data.init_args.val_fraction"]:
        return 0
    path = Path(run.folder or "") / "manifest.json"
    if run.folder is None or not path.is_file():
        return None
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["splits"]["val"]["tokens"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} does not count the tokens of a split 'val', expected a prepared corpus") from None


def validation_tokens(run: RunConfig, tokens: float, heldout: int, devices: int) -> float:
    """Return the tokens that are validated on: on the way, before training, and all that are held out at the end.

    Args:
        run: The run.
        tokens: Tokens it is trained on.
        heldout: Tokens held out.
        devices: Devices, each with batches of its own.
    """
    if not heldout:
        return 0.0
    batch = run["data.init_args.val_batch_size"] * run.seq_len * devices
    batches = -(-heldout // batch)
    limit, interval = run["trainer.limit_val_batches"], run["trainer.val_check_interval"]
    each = min(limit, batches) if isinstance(limit, int) else math.floor(limit * batches)
    micro_batches = run.steps(tokens) * run["trainer.accumulate_grad_batches"]
    planned = run.steps(run.tokens) * run["trainer.accumulate_grad_batches"]
    interval = interval if isinstance(interval, int) else max(1.0, interval * planned)
    sanity = run["trainer.num_sanity_val_steps"]
    on_the_way = math.floor(micro_batches / interval + 1e-9) * each * batch
    return float(min(sanity, batches) * batch + on_the_way + heldout)


def num_checkpoints(run: RunConfig, steps: float, seconds: float) -> float:
    """Return how often a run of so many steps and seconds is saved, its end included."""
    every_steps, every_seconds = run["checkpoints.every_n_steps"], run["checkpoints.every_n_seconds"]
    if every_steps:
        return float(max(1, math.ceil(steps / every_steps - 1e-9)))
    return 1.0 + float(seconds // every_seconds if every_seconds else 0)
