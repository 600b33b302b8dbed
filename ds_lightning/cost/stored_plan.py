"""The plan that a run starts from, kept in its folder until the bill can be held against it."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from ds_lightning.cost.planner import Terms, plan_run
from ds_lightning.cost.run_config import lacks, run_of
from ds_lightning.whole_file import write_whole

PLAN = "plan.json"
"""Name of the plan in a run folder."""

PLANNED = "only pretraining on a number of tokens is planned"


def store_plan(
    folder: Path, config: dict[str, Any], *, num_devices: int, calibration: str | None = None
) -> dict[str, Any]:
    """Write ``plan.json`` of a run that begins, or keep that of an earlier attempt with the same settings.

    Args:
        folder: The run's folder.
        config: The resolved config.
        num_devices: Devices that the run holds.
        calibration: File written by ``ds-lightning calibrate``; none: published speeds.

    Returns:
        ``date``; ``settings``, what the plan depends on; ``calibration``; ``plan`` as :func:`ds_lightning.cost.plan`
        returns it, or none and the ``reason`` why there is none.

    Raises:
        ValueError: If a calibration is given and a run that can be planned cannot be planned by it, or an earlier plan
            is damaged.
    """
    earlier = read_plan(folder)
    stored: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "calibration": calibration,
        "settings": None,
        "plan": None,
        "reason": "",
    }
    if missing := lacks(config):
        stored["reason"] = f"the config has no {' and no '.join(missing)}: {PLANNED}"
    else:
        run = run_of(config, (str(folder / "config.yaml"),))
        stored["settings"] = json.loads(json.dumps({**run.values, "num_devices": num_devices}))
        if earlier is not None and all(earlier[key] == stored[key] for key in ("settings", "calibration")):
            return earlier
        terms = Terms(run["cost.device"], num_devices, prices_file=config.get("cost", {}).get("prices_file"))
        try:
            stored["plan"] = plan_run(run, terms, calibration=calibration)
        except ValueError as error:
            if calibration is not None:
                raise
            stored["reason"] = str(error)  # a run that nobody can plan still runs, and its report says why
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / PLAN, json.dumps(stored, indent=1) + "\n")
    return stored


def read_plan(folder: Path) -> dict[str, Any] | None:
    """Return what :func:`store_plan` wrote; none where a run was not planned.

    Raises:
        ValueError: If the file is damaged.
    """
    path = folder / PLAN
    if not path.is_file():
        return None
    try:
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        stored["settings"], stored["calibration"], stored["plan"], stored["reason"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no stored plan ({error}): delete it, the next run writes it anew") from None
    return stored
