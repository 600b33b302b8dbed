"""Rejection sampling in this process. The oracles: the definition as a loop over the answers, the job left alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_lightning.cost import Ledger, Price
from ds_lightning.data.conversations import read_conversations
from ds_lightning.models import DeepSeek
from ds_lightning.models.hf import save_hf
from ds_lightning.recipes import rejection
from ds_lightning.recipes.rejection import SAMPLES, SUMMARY, Rejection, run
from ds_lightning.rl.rewards import Reward
from tests.training.toy_rollouts import MODEL, Letters, write_tokenizer

REWARD = Path(__file__).parents[1] / "rl" / "reward_functions.py"
PRICE = Price(device="toy", usd_per_device_hour=1.0, date="2026-01-01", source="test")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights that often ends its answers."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = DeepSeek(MODEL)
    tokenizer = Path(write_tokenizer(folder / "source"))
    save_hf(model, folder / "weights", tokenizer_file=tokenizer, eos_token_id=0, pad_token_id=1)
    return folder / "weights"


def job(weights: Path, folder: Path, **options: Any) -> Rejection:
    reward = Reward(f"{REWARD}:share_of_letter", options={"letter": "e"})
    settings: dict[str, Any] = {"problems": 10, "n": 16, "chunk": 4, "keep": 0.0, "per_problem": 3, "workers": 1}
    settings |= {"max_completion_length": 40, "temperature": 1.0, **options}
    return Rejection(weights=str(weights), folder=str(folder), task=Letters(), rewards=[reward], **settings)


def complete(one: Rejection) -> Path | None:
    one.folder.mkdir(parents=True, exist_ok=True)
    ledger = Ledger.open(one.folder / "ledger.jsonl", PRICE, background=False)
    try:
        return one.run(ledger)
    finally:
        ledger.close()


@pytest.fixture(scope="module")
def alone(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = complete(job(weights, tmp_path_factory.mktemp("alone")))
    assert result is not None
    return result


def test_what_is_kept_is_what_the_definition_keeps(weights: Path, alone: Path) -> None:
    rows = [json.loads(line) for line in alone.read_text().splitlines()]
    chunks = [json.loads(path.read_text()) for path in sorted(alone.parent.glob("chunk-*.json"))]
    wanted: list[dict[str, Any]] = []
    for row in [row for chunk in chunks for row in chunk["rows"]]:
        same = [one for one in wanted if one["prompt"] == row["prompt"]]
        if len(same) < 3 and row["completion"] not in [one["completion"] for one in same]:
            wanted.append(row)
    assert rows == wanted
    assert rows
    summary = json.loads((alone.parent / SUMMARY).read_text())
    assert summary == {
        "problems": 10,
        "answers": 160,
        "reached": sum(chunk["reached"] for chunk in chunks),
        "kept": len(rows),
    }
    assert 0 < summary["reached"] < 160, "an answer that was cut off is not kept"


def test_fine_tuning_reads_what_is_kept(alone: Path) -> None:
    assert len(list(read_conversations([str(alone)]))) == len(alone.read_text().splitlines())


def test_a_job_that_stopped_between_two_chunks_brings_the_same_file(
    weights: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    sample = Rejection._sample

    def once(self: Rejection, number: int, *rest: Any) -> dict[str, Any]:
        made.append(number)
        self.stopped = True
        return sample(self, number, *rest)

    monkeypatch.setattr(Rejection, "_sample", once)
    assert complete(job(weights, tmp_path)) is None
    assert not (tmp_path / SAMPLES).exists()
    assert complete(job(weights, tmp_path)) is None
    result = complete(job(weights, tmp_path))
    assert made == [0, 1, 2], "no chunk is made twice"
    assert result is not None
    assert result.read_bytes() == alone.read_bytes()


def test_a_job_that_is_complete_does_nothing(alone: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rejection, "load_hf", None)
    assert complete(job(weights, alone.parent)) == alone


def test_another_seed_brings_other_answers(weights: Path, alone: Path, tmp_path: Path) -> None:
    result = complete(job(weights, tmp_path, seed=1))
    assert result is not None
    assert result.read_bytes() != alone.read_bytes()


def test_no_answer_that_is_good_enough_is_an_error(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none of 160 answers has a reward of keep, 2 \(the best has .*\): sample"):
        complete(job(weights, tmp_path, keep=2.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"problems": 0}, "problems is 0, expected at least 1"),
        ({"chunk": 0}, "chunk is 0, expected at least 1"),
        ({"temperature": 0.0}, "temperature is 0.0, expected more than 0"),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        job(tmp_path, tmp_path, **options)


def test_a_folder_that_was_begun_with_other_settings_is_refused(weights: Path, tmp_path: Path) -> None:
    task = '{"class_path": "tests.training.toy_rollouts.Letters"}'
    common = [f"--weights={weights}", f"--folder={tmp_path / 'samples'}", f"--task={task}", "--problems=2", "--n=16"]
    common += ['--rewards=[{"function": "format"}]', "--workers=1", "--max_completion_length=40"]
    assert run([*common, "--keep=0"]) == 0
    with pytest.raises(ValueError, match=r"was sampled with other settings: keep was 0.0, is now 1.0; delete it or"):
        run([*common, "--keep=1"])
    with pytest.raises(ValueError, match=r"kep"):
        run([*common, "--kep=1"])
