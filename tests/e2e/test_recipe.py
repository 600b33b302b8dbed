"""The smallest recipe by the real command, killed at random moments and run again; and its last weights elsewhere.

The oracles: the same recipe left alone, bitwise; a clock outside of the processes; transformers with the exported
weights, tokenizer and chat template.
"""

import json
import os
import random
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ds_lightning.generation import Generator
from ds_lightning.models.hf import load_hf
from ds_lightning.rl.prompting import Prompter
from ds_lightning.rl.tasks import ReasoningGymTask
from tests.callbacks.toy_run import differences
from tests.e2e.command import start

pytestmark = pytest.mark.soak

RECIPES = Path(__file__).parents[2] / "configs" / "recipes"
STAGES = ["base", "zero", "cold_start", "rl_1", "sft", "rl_2"]
FIRST_SECOND = 1.0
"""Until its ledger is open, a second on a busy machine, a killed runner leaves nothing that says that it was there."""
ENDS = 0.1
"""Seconds that the kernel takes to end a process, which no process can book."""

SHRUNK: dict[str, dict[str, Any]] = {
    "base": {
        "model.init_args.total_tokens": 16 * 8 * 64,
        "data.init_args.worked": 200,
        "data.init_args.batch_size": 8,
        "checkpoints.every_n_steps": 4,
    },
    "sft": {"data.init_args.epochs": 2, "checkpoints.every_n_steps": 2},
    "grpo": {
        "data.init_args.rewards": [  # an answer's length differs where none is right, so that there is a gradient
            {"function": "accuracy"},
            {"function": "format", "weight": 0.2},
            {"function": "language", "weight": 0.1},
            {"function": "length", "options": {"max_tokens": 12, "cache_tokens": 12}},
        ],
        "data.init_args.rollouts": 4,
        "data.init_args.prompts": 4,
        "data.init_args.num_generations": 4,
        "data.init_args.max_completion_length": 12,
        "data.init_args.steps_per_rollout": 2,
        "checkpoints.every_n_steps": 1,
        "trainer.val_check_interval": 4,
    },
}
"""What makes the stages short, by the config that they are made of: what is left is nearly all the start of their eight
processes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe."""
    folder = tmp_path_factory.mktemp("recipe")
    write_recipe(folder)
    return folder


def write_recipe(folder: Path, **settings: Any) -> None:
    """Write the recipe, with more settings for all of its stages by key, ``__`` for the dots."""
    recipe = yaml.safe_load((RECIPES / "tiny.yaml").read_text(encoding="utf-8"))
    passed = recipe["set"]["trainer.callbacks"][0]["init_args"]
    passed |= {"problems": 8, "problems_on_the_way": 4, "max_new_tokens": 8}
    recipe["set"] |= {key.replace("__", "."): value for key, value in settings.items()}
    for stage in recipe["stages"]:
        kind = Path(stage["fit"][0]).stem
        stage["fit"] = [str(RECIPES / name) for name in stage["fit"]]
        stage["set"] = {**stage.get("set", {}), **SHRUNK[kind]}
        if "sample" in stage:  # so little training gives no right answers: those that end are kept
            short = {"problems": 32, "n": 8, "keep": 0.0, "chunk": 8, "max_completion_length": 24}
            stage["sample"] = {**stage["sample"], **short}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe), encoding="ascii")


@dataclass
class RecipeRun:
    """A folder of a recipe, and the seconds of every attempt at it, from its start until its last process was gone."""

    folder: Path
    name: str
    seconds: list[float] = field(default_factory=list)

    def attempt(self, kill_after: float | None = None, *, everything: bool = False) -> bool:
        """Run the recipe; return whether it came to its end.

        Args:
            kill_after: Seconds after which the runner is killed; none: never.
            everything: Kill the processes of the stage too, which otherwise are told to stop by the runner's death.
        """
        began = time.monotonic()
        process = start(self.folder, "recipe", "tiny.yaml", "--out", self.name, "--json")
        try:
            out, err = process.communicate(timeout=900 if kill_after is None else kill_after)
        except subprocess.TimeoutExpired:
            assert kill_after is not None, "the recipe hangs"
            family = [process.pid, *_descendants(process.pid)]
            for pid in family if everything else family[:1]:
                os.kill(pid, signal.SIGKILL)
            process.communicate()
            while any(_alive(pid) for pid in family):
                time.sleep(0.01)
            self.seconds.append(time.monotonic() - began)
            return False
        self.seconds.append(time.monotonic() - began)
        assert process.returncode == 0, err[-3000:] + self.logs()
        assert [stage["name"] for stage in json.loads(out)["stages"]] == STAGES
        return True

    def logs(self) -> str:
        """Return the end of what every stage printed."""
        logs = sorted((self.folder / self.name).glob("*.log"))
        return "".join(f"\n{log.name}: {log.read_text()[-1000:]}" for log in logs)

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the weights of all stages, by stage and name."""
        found: dict[str, torch.Tensor] = {}
        for stage in STAGES:
            tensors = load_file(self.folder / self.name / stage / "weights" / "model.safetensors")
            found |= {f"{stage} {name}": tensor for name, tensor in tensors.items()}
        return found

    def ledger(self) -> dict[str, Any]:
        """Return what ``ds-lightning ledger --json`` prints."""
        process = start(self.folder, "ledger", self.name, "--json")
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        report: dict[str, Any] = json.loads(out)
        return report


def _descendants(pid: int) -> list[int]:
    """Return the processes that a process started, and those that they started."""
    found = list[int]()
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *_descendants(child)]
    return found


def _alive(pid: int) -> bool:
    """Tell whether a process runs; one that ended and that nobody asked for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture(scope="module")
def straight(folder: Path) -> RecipeRun:
    """The recipe left alone."""
    run = RecipeRun(folder, "straight")
    assert run.attempt()
    return run


def test_every_stage_changes_the_weights(straight: RecipeRun) -> None:
    weights = straight.weights()
    heads = [weights[f"{stage} lm_head.weight"] for stage in STAGES]
    assert all((one != other).any() for place, one in enumerate(heads) for other in heads[:place])


@pytest.mark.parametrize("kills", [2, 10])
def test_a_recipe_killed_at_random_moments_ends_with_the_same_weights_and_books_all_its_time(
    straight: RecipeRun, kills: int
) -> None:
    draw, run = random.Random(kills), RecipeRun(straight.folder, f"killed-{kills}")
    whole = straight.seconds[0]
    killed = 0
    while killed < kills:
        # Two of three moments lie within what a stage takes, so that all of them come before the recipe's end.
        moment = draw.uniform(FIRST_SECOND, whole / (2 if kills == 2 else len(STAGES)))
        if run.attempt(moment, everything=draw.random() < 0.5):
            break
        killed += 1
    assert killed == kills, "it ended before"
    assert run.attempt()
    assert differences(run.weights(), straight.weights()) == []
    ledger, wall = run.ledger(), sum(run.seconds)
    assert ledger["chain"] == "ok"
    assert sum(phase["seconds"] for phase in ledger["phases"].values()) == pytest.approx(ledger["wall_seconds"])
    print(f"{kills} kills: booked {ledger['wall_seconds']:.2f} of {wall:.2f} s in {len(run.seconds)} attempts")
    assert ledger["wall_seconds"] == pytest.approx(wall, abs=0.01 * wall + ENDS * len(run.seconds))


def test_the_ledger_of_a_recipe_left_alone_is_its_wall_clock(straight: RecipeRun) -> None:
    ledger = straight.ledger()
    assert list(ledger["stages"]) == STAGES
    assert ledger["wall_seconds"] == pytest.approx(straight.seconds[0], rel=0.01)


def test_transformers_answers_a_held_out_problem_as_our_generator_does(straight: RecipeRun) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = straight.folder / straight.name / "rl_2" / "weights"
    theirs, found = AutoModelForCausalLM.from_pretrained(weights, output_loading_info=True)
    assert {name: list(keys) for name, keys in found.items() if keys} == {}
    recipe = yaml.safe_load((straight.folder / "tiny.yaml").read_text(encoding="ascii"))
    settings = recipe["set"]["trainer.callbacks"][0]["init_args"]["task"]["init_args"]
    task = ReasoningGymTask(**settings)
    tokenizer, prompter = AutoTokenizer.from_pretrained(weights), Prompter(weights / "tokenizer.json")
    for number in range(5):
        problem = task.problem(number, 0, "held_out").prompt
        assert isinstance(problem, list)
        prompt = tokenizer.apply_chat_template(
            problem, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert prompt["input_ids"][0].tolist() == prompter.encode(problem)
        with torch.no_grad():
            answer = theirs.eval().generate(**prompt, max_new_tokens=24, do_sample=False)
        tokens = answer[0, prompt["input_ids"].shape[1] :].tolist()
        [sample] = prompter.complete(Generator(load_hf(weights)), [problem], 1, max_new_tokens=24, temperature=0.0)
        assert tokens == sample.tokens.tolist()
        assert tokenizer.decode(tokens, skip_special_tokens=False).removesuffix("<|end_of_text|>") == prompter.decode(
            sample
        )
