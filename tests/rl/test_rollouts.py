"""What each of some ranks has of a rollout, without a second process: a stand-in for the trainer says which rank it is.

The oracle is the rank that is alone: it has the whole of what others share.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds_lightning.generation import Sample
from ds_lightning.models import DeepSeek
from ds_lightning.rl.experience import Completion, Experience
from ds_lightning.rl.rewards import Reward, RewardBatch
from ds_lightning.rl.rollouts import RolloutDataModule
from tests.training.toy_rollouts import MODEL, REWARD, Letters, plain_rows, write_tokenizer


def datamodule(folder: Path, rank: int = 0, ranks: int = 1, accumulate: int = 1, **changes: Any) -> RolloutDataModule:
    """Return the data of one rank; ``steps_of_ranks``: what all of them hold."""
    of_ranks = changes.pop("steps_of_ranks", None)
    settings = {"rollouts": 2, "prompts": 3, "num_generations": 4, "max_completion_length": 5, "workers": 1, **changes}
    tokenizer = folder / "tokenizer.json"
    data = RolloutDataModule(
        task=Letters(),
        rewards=[Reward(f"{REWARD}:counts")],
        tokenizer=str(tokenizer) if tokenizer.is_file() else write_tokenizer(folder),
        **settings,
    )
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=rank,
        world_size=ranks,
        accumulate_grad_batches=accumulate,
        global_step=1,
        callbacks=[],
        lightning_module=SimpleNamespace(from_all_ranks=lambda make: of_ranks),
    )
    data.setup()
    return data


def test_ranks_write_what_one_writes_also_where_a_group_spans_them(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = DeepSeek(MODEL)

    def answers(rank: int, ranks: int) -> tuple[list[Any], list[float | None], dict[str, list[float | None]]]:
        data = datamodule(tmp_path, rank, ranks)
        completions, scored = data._own_answers(model, 7, 3)
        data.teardown("fit")
        assert len(completions) == 12 // ranks
        told = [(completion.prompt, completion.sample.tokens.tolist()) for completion in completions]
        return told, scored.total, scored.per_reward

    expected, rewards, by_name = answers(0, 1)
    assert len({str(prompt) for prompt, _ in expected}) == 3
    assert len({str(tokens) for _, tokens in expected}) == 12
    for ranks in (2, 3, 4):
        parts = [answers(rank, ranks) for rank in range(ranks)]
        assert [row for told, _, _ in parts for row in told] == expected
        assert [reward for _, total, _ in parts for reward in total] == rewards
        assert [reward for _, _, named in parts for reward in named["counts"]] == by_name["counts"]


def completions(count: int) -> list[Completion]:
    """Return answers of different lengths, not in order."""
    made = []
    for number in range(count):
        tokens = torch.arange(1 + number * 7 % count) + 10
        zeros = torch.zeros(len(tokens))
        made.append(Completion([3, number], Sample(0, tokens, zeros, zeros, "stop", None), 0.5 + number))
    return made


@pytest.mark.parametrize(("ranks", "accumulate"), [(2, 2), (4, 1), (1, 4)])
@pytest.mark.parametrize("count", [8, 6, 3])
def test_a_step_is_dealt_to_ranks_as_to_micro_batches(tmp_path: Path, ranks: int, accumulate: int, count: int) -> None:
    expected = datamodule(tmp_path, accumulate=4)._step(completions(count), 1, 9)
    for rank in range(ranks):
        found = datamodule(tmp_path, rank, ranks, accumulate)._step(completions(count), 1, 9)
        assert len(found) == accumulate
        for micro, wanted in zip(found, expected[rank::ranks], strict=True):
            assert torch.equal(plain_rows(micro), plain_rows(wanted))
            assert micro["advantages"].tolist() == wanted["advantages"].tolist()
            assert micro["mask"].tolist() == wanted["mask"].tolist()
            assert micro["totals"] == wanted["totals"]
            assert (micro["step_tokens"], micro["step_samples"]) == (wanted["step_tokens"], count)
    counted = [int(micro["mask"].any(1).sum()) for micro in expected]
    assert sum(counted) == count, "a row that fills an empty micro-batch counts for nothing"
    assert expected[0]["totals"] == (count + 1, count * (count + 1) // 2 + 9, 5)
    assert expected[0]["step_tokens"] == count * (count + 1) // 2 + 2 * count


def test_a_running_rollout_is_that_of_all_ranks_and_can_be_dealt_anew(tmp_path: Path) -> None:
    members = [completions(8), completions(4)]
    four = datamodule(tmp_path, accumulate=4)
    expected = [four._step(step, 0, 0) for step in members]
    of_ranks: list[list[list[Experience]]] = []
    for rank in range(2):
        data = datamodule(tmp_path, rank, 2, 2)
        of_ranks.append([data._step(step, 0, 0) for step in members])
    state = datamodule(tmp_path, 1, 2, 2, prompts=4, steps_per_rollout=2, steps_of_ranks=of_ranks).state_dict()
    for rank, ranks, accumulate in ((0, 2, 2), (1, 2, 2), (0, 1, 4), (3, 4, 1)):
        other = datamodule(tmp_path, rank, ranks, accumulate)
        other.load_state_dict(state)
        for step, wanted in zip(other._steps, expected, strict=True):
            tokens = [plain_rows(micro).tolist() for micro in step]
            assert tokens == [plain_rows(micro).tolist() for micro in wanted[rank::ranks]]
    message = r"within a rollout whose steps have 4 micro-batches, the run's have 1 ranks times .* 3, expected as many"
    with pytest.raises(ValueError, match=message):
        datamodule(tmp_path, accumulate=3).load_state_dict(state)


def test_rewards_of_several_batches_are_those_of_one() -> None:
    first = RewardBatch([1.0, None], {"a": [1.0, None]}, {"a": {"timeout": 1, "died": 0, "refused": 2}})
    second = RewardBatch([4.0], {"a": [4.0]}, {"a": {"timeout": 1, "died": 1, "refused": 0}})
    joined = RewardBatch.joined([first, second])
    assert joined.total == [1.0, None, 4.0]
    assert joined.per_reward == {"a": [1.0, None, 4.0]}
    assert joined.cut_short == {"a": {"timeout": 2, "died": 1, "refused": 2}}
    assert joined.metrics()["rewards/a/mean"] == 2.5
