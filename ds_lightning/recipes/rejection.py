"""Rejection sampling: a model answers problems, and the answers that score well enough become data to train on."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser

from ds_lightning.cost import Ledger, find_price
from ds_lightning.cost.energy import nvml_meter
from ds_lightning.cost.ledger_report import LEDGER_NAME
from ds_lightning.cost.run_config import first_difference
from ds_lightning.generation import Generator, Sample
from ds_lightning.generation.device import Device, check_device
from ds_lightning.models.hf import load_hf
from ds_lightning.rl.answers import score
from ds_lightning.rl.builtin_rewards import THINK
from ds_lightning.rl.prompting import Prompter
from ds_lightning.rl.rewards import Reward, RewardBatch, Scorer
from ds_lightning.rl.sandbox import Limits
from ds_lightning.rl.tasks import Problem, Task
from ds_lightning.user_errors import one_line, writing
from ds_lightning.whole_file import write_whole

SAMPLES = "samples.jsonl"
"""The answers that were kept, one JSON object a line; there is no such file before all is done."""
SUMMARY = "summary.json"
SETTINGS = "settings.json"

_MAY_CHANGE = ("folder", "ledger", "cost", "num_devices", "workers", "limits")


class Rejection:
    """Samples answers to problems of the train split, scores them, and keeps those that are good enough.

    DeepSeek-R1 (arXiv:2501.12948v2, section 2.3.3) fine-tunes on such answers. What is kept depends on weights,
    settings and seed alone: it is made in chunks of problems, each written atomically and never made again.

    Args:
        weights: Folder in Hugging Face layout, with the ``tokenizer.json``.
        folder: Where chunks and result go.
        task: Where problems come from.
        rewards: What answers are scored with.
        problems: Problems to answer.
        n: Answers a problem.
        keep: Least total reward of an answer that is kept. An answer that was cut off at its longest is never kept.
        per_problem: Answers that are kept of one prompt at most, the first ones; equal texts count once.
        temperature: Of sampling.
        top_p: Sample from the likeliest tokens that together have this probability.
        top_k: Sample from this many likeliest tokens; 0: from all.
        max_completion_length: Tokens of an answer.
        max_batch: Answers that are generated together at most.
        chunk: Problems between two writes.
        workers: Processes that score.
        limits: What scoring one answer may use.
        seed: Of problems and sampling.
        device: Where the model runs.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        *,
        weights: str,
        folder: str,
        task: Task,
        rewards: list[Reward],
        problems: int,
        n: int = 8,
        keep: float = 1.0,
        per_problem: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        max_completion_length: int = 64,
        max_batch: int = 128,
        chunk: int = 32,
        workers: int = 2,
        limits: Limits | None = None,
        seed: int = 0,
        device: Device = "cpu",
    ) -> None:
        numbers = {"problems": problems, "n": n, "per_problem": per_problem, "chunk": chunk, "max_batch": max_batch}
        for name, value in {**numbers, "max_completion_length": max_completion_length}.items():
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}, expected more than 0: equal answers are no choice")
        self.weights = weights
        self.folder = Path(folder)
        self.task = task
        self.scorer = Scorer(rewards, workers=workers, limits=limits)
        self.problems = problems
        self.n = n
        self.keep = keep
        self.per_problem = per_problem
        self.sampling: dict[str, Any] = {
            "max_new_tokens": max_completion_length,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "max_batch": max_batch,
            "seed": seed,
        }
        self.chunk = chunk
        self.seed = seed
        self.device = device
        self.stopped = False

    def run(self, ledger: Ledger) -> Path | None:
        """Make what is missing; return the file of what was kept, or none if a signal came before it was complete.

        Raises:
            ValueError: If no answer is good enough, or weights or rewards will not do.
        """
        result = self.folder / SAMPLES
        missing = [number for number in range(-(-self.problems // self.chunk)) if not self._chunk(number).is_file()]
        if result.is_file():
            return result
        if missing:
            prompter = Prompter(Path(self.weights) / "tokenizer.json")
            generator = Generator(load_hf(self.weights).to(self.device))
            with self.scorer as scorer, _listening(self):
                for number in missing:
                    if self.stopped:
                        return None
                    record = self._sample(number, prompter, generator, scorer, ledger)
                    with ledger.phase("export"):
                        write_whole(self._chunk(number), json.dumps(record, ensure_ascii=False) + "\n")
                    done = min((number + 1) * self.chunk, self.problems)
                    print(
                        f"sampling  {done:,} of {self.problems:,} problems, {record['reached']:,} of "
                        f"{record['answers']:,} answers reach {self.keep:g}",
                        file=sys.stderr,
                        flush=True,
                    )
        with ledger.phase("export"):
            self._assemble(result)
        return result

    def _sample(
        self, number: int, prompter: Prompter, generator: Generator, scorer: Scorer, ledger: Ledger
    ) -> dict[str, Any]:
        """Return what a chunk brings."""
        numbers = range(number * self.chunk, min((number + 1) * self.chunk, self.problems))
        problems = [self.task.problem(index, self.seed) for index in numbers]
        with ledger.phase("rollout"):
            samples = prompter.complete(
                generator,
                [problem.prompt for problem in problems],
                self.n,
                keys=list(numbers),
                record_routing=False,
                **self.sampling,
            )
        with ledger.phase("reward"):
            scored = score(scorer, prompter, problems, samples)
        rows = list(self._reaching(prompter, problems, samples, scored))
        best = max((reward for reward in scored.total if reward is not None), default=None)
        return {"answers": len(samples), "reached": len(rows), "best": best, "rows": rows}

    def _reaching(
        self, prompter: Prompter, problems: Sequence[Problem], samples: Sequence[Sample], scored: RewardBatch
    ) -> Iterator[dict[str, Any]]:
        """Yield the answers that are good enough, as a fine-tuning reads them."""
        for sample, reward in zip(samples, scored.total, strict=True):
            text = prompter.decode(sample)
            if reward is None or reward < self.keep or sample.finish_reason != "stop" or not text.strip():
                continue
            prompt = problems[sample.prompt].prompt
            completion: Any = text
            if not isinstance(prompt, str):
                begun = THINK[0] if prompter.text(prompt).endswith(THINK[0]) else ""
                completion = [{"role": "assistant", "content": begun + text}]
            yield {"prompt": prompt, "completion": completion, "reward": reward}

    def _assemble(self, result: Path) -> None:
        """Put the chunks together, without what is there already."""
        records = [
            json.loads(self._chunk(number).read_text("utf-8")) for number in range(-(-self.problems // self.chunk))
        ]
        lines, seen, kept = list[str](), set[str](), dict[str, int]()
        for row in (row for record in records for row in record["rows"]):
            prompt, text = json.dumps(row["prompt"]), json.dumps([row["prompt"], row["completion"]])
            if text not in seen and kept.get(prompt, 0) < self.per_problem:
                seen.add(text)
                kept[prompt] = kept.get(prompt, 0) + 1
                lines.append(json.dumps(row, ensure_ascii=False))
        answers, reached = (sum(record[name] for record in records) for name in ("answers", "reached"))
        if not lines:
            best = max((record["best"] for record in records if record["best"] is not None), default=None)
            raise ValueError(
                f"{self.weights}: none of {answers} answers has a reward of keep, {self.keep:g} (the best has {best}): "
                "sample more, train longer, or lower keep"
            )
        summary = {"problems": self.problems, "answers": answers, "reached": reached, "kept": len(lines)}
        write_whole(self.folder / SUMMARY, json.dumps(summary) + "\n")
        write_whole(result, "\n".join(lines) + "\n")

    def _chunk(self, number: int) -> Path:
        return self.folder / f"chunk-{number:05d}.json"


def run(argv: list[str]) -> int:
    """Run ``ds-lightning sample``, and return the exit status: 3 where a signal ended it between two chunks.

    Raises:
        ValueError: If a setting is wrong, or the folder was begun with others; one line.
    """
    parser = ArgumentParser(prog="ds-lightning sample", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with these options")
    parser.add_class_arguments(Rejection)
    parser.add_argument("--ledger", type=str, help="file that books the time; none: ledger.jsonl in the folder")
    parser.add_argument("--cost", type=dict[str, Any], default={}, help="device, usd_per_device_hour, market")
    parser.add_argument("--num_devices", type=int, default=1, help="devices held meanwhile")
    try:
        options = parser.parse_args(argv)
    except ArgumentError as error:
        raise ValueError(one_line(str(error), [action.dest for action in parser._actions])) from None
    options.pop("config", None)
    folder = Path(options.folder)
    path = Path(options.ledger) if options.ledger else folder / LEDGER_NAME
    with writing(folder):
        check_device(options.device)
        price = find_price(**{"device": "cpu", **options.cost})
        meter = nvml_meter([str(torch.cuda.get_device_properties(0).uuid)]) if options.device == "cuda" else None
        ledger = Ledger.open(path, price, num_devices=options.num_devices, meter=meter)
        try:
            _claim(folder, options.as_dict())
            made = parser.instantiate_classes(options).as_dict()
            outside = ("ledger", "cost", "num_devices")
            job = Rejection(**{name: value for name, value in made.items() if name not in outside})
            result = job.run(ledger)
        finally:
            ledger.close()
    if result is None:
        print(f"stopped early; the same command goes on in {folder}", file=sys.stderr)
        return 3
    summary = json.loads((folder / SUMMARY).read_text("utf-8"))
    print(f"kept {summary['kept']:,} of {summary['answers']:,} answers in {result}", file=sys.stderr)
    return 0


def _claim(folder: Path, options: dict[str, Any]) -> None:
    """Write the settings into a new folder, or check that an old one was begun with them."""
    settings = json.loads(
        json.dumps({key: value for key, value in options.items() if key not in _MAY_CHANGE}, default=vars)
    )
    path = folder / SETTINGS
    folder.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        difference = first_difference("", json.loads(path.read_text("utf-8")), settings)
        if difference:
            raise ValueError(
                f"{folder} was sampled with other settings: {difference}; delete it or give another folder"
            )
    else:
        write_whole(path, json.dumps(settings, indent=1) + "\n")


@contextmanager
def _listening(job: Rejection) -> Iterator[None]:
    """Let signals end the job between two chunks; a second SIGINT ends it at once."""

    def stop(number: int, frame: Any) -> None:
        if job.stopped and number == signal.SIGINT:
            raise KeyboardInterrupt
        job.stopped = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
