"""Stands in for ``ds-lightning fit`` and ``sample``: books time, passes on a number, and does what it is told.

A stage's weights are a number: that of the stage before it times ten, plus one. ``FAKE`` in the environment is
``STAGE ACTION``: ``fail`` ends it with status 1, ``hang`` lets it wait for a signal and end with status 3, ``kill``
kills this process and its parent at once, ``early`` does so after a second in which it books nothing.
"""

import json
import os
import signal
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from ds_lightning.cost import Ledger, find_price
from ds_lightning.cost.ledger_report import ledger_report


def main(argv: list[str]) -> int:
    configs = [Path(value) for option, value in pairwise(argv) if option == "--config"]
    settings: dict[str, Any] = yaml.safe_load(configs[-1].read_text())
    fit = argv[0] == "fit"
    out = Path(argv[argv.index("--out") + 1]) if fit else Path(settings["ledger"]).parent
    stage, action = os.environ.get("FAKE", "none none").split()
    if action == "early" and stage == out.name:
        time.sleep(1.0)
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    ledger = Ledger.open(out / "ledger.jsonl", find_price("cpu"))
    with (out.parent / "calls.txt").open("a") as calls:
        calls.write(f"{out.name} {argv[0]}\n")
    ledger.enter("train" if fit else "rollout")
    time.sleep(0.1)
    if stage == out.name and fit:
        if action == "hang":
            print("hanging", file=sys.stderr, flush=True)
            signal.sigwait({signal.SIGINT, signal.SIGTERM})
            return 3
        if action == "fail":
            return 1
        if action == "kill":
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
    if not fit:
        folder = Path(settings["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "samples.jsonl").write_text("{}\n")
        (folder / "summary.json").write_text('{"kept": 1}\n')
        return 0
    weights = settings.get("model", {}).get("init_args", {}).get("weights")
    number = 1 if weights is None else 10 * int((Path(weights) / "number").read_text()) + 1
    (out / "weights").mkdir(exist_ok=True)
    (out / "weights" / "number").write_text(str(number))
    report = {"stages": [{"name": "fake", "pass_at_1": number / 1000}], "ledger": ledger_report(out)}
    (out / "report.json").write_text(json.dumps(report))
    return 0


if __name__ == "__main__":
    if os.environ.get("FAKE", "").endswith("hang"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    sys.exit(main(sys.argv[1:]))
