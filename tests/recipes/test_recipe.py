"""What a recipe may say. The oracles: messages spelled out by hand, the job's own signature, the shipped files."""

import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ds_lightning.config import DeepSeekConfig
from ds_lightning.models import DeepSeek
from ds_lightning.recipes.recipe import SAMPLE_OPTIONS, read_recipe
from ds_lightning.recipes.runner import _Runner
from ds_lightning.training import GRPOModule, PretrainModule
from ds_lightning.training_cli import run

CONFIGS = Path(__file__).parents[2] / "configs" / "recipes"
RECIPES = sorted(CONFIGS.glob("*.yaml"))
SIX = ["base", "zero", "cold_start", "rl_1", "sft", "rl_2"]
SAMPLE = {"from": "a", "task": {}, "rewards": [{"function": "format"}], "problems": 4}
FIT = {"model": {"init_args": {"lr": 1.0}}, "data": {"class_path": "x.RolloutDataModule"}}


def write(folder: Path, stages: Any, **top: Any) -> Path:
    (folder / "fit.yaml").write_text(yaml.safe_dump(FIT))
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump({"stages": stages, **top}))
    return path


def stage(name: str = "a", **others: Any) -> dict[str, Any]:
    return {"name": name, "fit": ["fit.yaml"], **others}


@pytest.mark.parametrize(
    ("stages", "top", "message"),
    [
        ([], {}, r"stages is \[\], expected a list of at least one stage"),
        (["a"], {}, r"stages\[0\] is 'a', expected a mapping with name and fit"),
        ([stage()], {"stage": 1}, r"'stage' is no key of a recipe; did you mean stages\?"),
        ([stage(form="b")], {}, r"stages\[0\]: 'form' is no key of a stage; did you mean from\?"),
        ([stage("A b")], {}, r"name is 'A b', expected lower-case letters"),
        ([stage("recipe")], {}, r"name is 'recipe', expected lower-case letters"),
        ([stage(), stage()], {}, r"stages\[1\]: name is 'a' again"),
        ([{"name": "a"}], {}, r"\(a\): fit is None, expected a list of config files"),
        ([stage(**{"from": "b"}), stage("b")], {}, r"\(a\): from is 'b', expected none: it is the first stage"),
        ([stage(), stage("b", **{"from": "c"})], {}, r"from is 'c', expected one of the stages before it, a"),
        ([stage(), stage("b", sample={**SAMPLE, "from": "b"})], {}, r"sample.from is 'b', expected one of the stages"),
        ([stage(), stage("b", sample={**SAMPLE, "kep": 1})], {}, r"'kep' is no key of a sample; did you mean keep\?"),
        ([stage(), stage("b", sample={"from": "a", "task": {}})], {}, r"sample has no rewards, expected one"),
        ([stage(), stage("b", sample=3)], {}, r"sample is 3, expected a mapping"),
        ([stage(set={"data.init_args.folder": "x"})], {}, r"set has data.init_args.folder, which the recipe's runner"),
        ([stage()], {"seed": -1}, r"seed is -1, expected a whole number of at least 0"),
        ([stage()], {"cost": {"usd": 1}}, r"cost: 'usd' is no key of a cost"),
        ([stage()], {"budget": {"eur": 1}}, r"budget: 'eur' is no key of a budget, expected some of usd"),
        ([stage()], {"budget": {"usd": 1}}, r"budget.shares has , expected every stage: a$"),
        ([stage()], {"budget": {"usd": 1, "shares": {"b": 1}}}, r"budget.shares has b, expected every stage: a$"),
        ([stage()], {"budget": [1]}, r"budget is \[1\], expected a mapping"),
        ([stage()], {"budget": {"usd": -1, "shares": {"a": 1}}}, r"budget.usd is -1, expected a number above 0"),
        ([stage()], {"budget": {"usd": 1, "shares": {"a": 0}}}, r"budget.shares.a is 0, expected a number above 0"),
        (
            [stage(set={"budget.usd": 3})],
            {"budget": {"usd": 1, "shares": {"a": 1}}},
            r"budget is the recipe's, and stage a sets one of its own: leave one out",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path, stages: Any, top: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_recipe(write(tmp_path, stages, **top))
    assert "\n" not in str(error.value)


def test_a_config_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"other\.yaml"):
        read_recipe(write(tmp_path, [{"name": "a", "fit": ["other.yaml"]}]))


def test_options_of_a_stage_win_over_those_of_all_and_of_files(tmp_path: Path) -> None:
    stages = [stage(), stage("b", set={"model.init_args.lr": 3.0})]
    recipe = read_recipe(write(tmp_path, stages, set={"model.init_args.lr": 2.0, "trainer.devices": 8}, seed=4))
    assert [one.sections["model"]["init_args"]["lr"] for one in recipe.stages] == [2.0, 3.0]
    assert [one.devices for one in recipe.stages] == [8, 8]
    assert [one.seed for one in recipe.stages] == [400, 401]
    assert read_recipe(recipe.path, seed=1).stages[1].seed == 101


def test_a_stage_may_spend_its_part_of_what_others_left(tmp_path: Path) -> None:
    shares = {"usd": 100, "hours": 10, "shares": {"c": 2, "a": 5, "b": 3}}
    budget = read_recipe(write(tmp_path, [stage(), stage("b"), stage("c")], budget=shares)).budget
    assert budget is not None
    assert budget.of("a", {"usd": 0, "hours": 0}) == {"usd": 50, "hours": 5}
    assert budget.of("b", {"usd": 40, "hours": 6}) == pytest.approx({"usd": 36, "hours": 2.4}), "3 of 5 parts"
    assert budget.of("c", {"usd": 99, "hours": 0}) == {"usd": 1, "hours": 10}
    with pytest.raises(ValueError, match=r"^budget.usd of the recipe is 100, of which 101 are spent before stage b"):
        budget.of("b", {"usd": 101, "hours": 0})


def test_limits_go_over_those_of_the_recipe_and_shares_alone_set_none(tmp_path: Path) -> None:
    shares = {"a": 1, "b": 3}
    path = write(tmp_path, [stage(), stage("b")], budget={"shares": shares})
    assert read_recipe(path).budget is None
    budget = read_recipe(path, limits={"hours": 8.0}).budget
    assert budget is not None
    assert budget.of("a", {"hours": 0.0}) == {"hours": 2.0}
    path = write(tmp_path, [stage(), stage("b")], budget={"usd": 1, "hours": 1, "shares": shares})
    budget = read_recipe(path, limits={"hours": 8.0}).budget
    assert budget is not None
    assert budget.limits == {"usd": 1, "hours": 8.0}
    path = write(tmp_path, [stage(), stage("b")])
    with pytest.raises(ValueError, match=r"budget.shares has , expected every stage: a, b$"):
        read_recipe(path, limits={"usd": 1.0})


def test_what_a_recipe_may_say_of_sampling_is_what_the_job_takes() -> None:
    from ds_lightning.recipes.rejection import Rejection

    owned = {"weights", "folder", "seed", "device", "limits"}
    assert set(SAMPLE_OPTIONS) == set(inspect.signature(Rejection).parameters) - owned


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_has_the_six_stages(path: Path) -> None:
    recipe = read_recipe(path)
    assert [one.name for one in recipe.stages] == SIX
    assert [one.start for one in recipe.stages] == [None, "base", "base", "cold_start", "base", "sft"]
    assert [one.sample["from"] for one in recipe.stages if one.sample] == ["zero", "rl_1"]
    assert [one.rolls_out for one in recipe.stages] == [False, True, False, True, False, True]


def parsed(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Return the resolved config of a fit."""
    monkeypatch.setattr(sys, "argv", ["ds-lightning"])
    with pytest.raises(SystemExit):
        run(["fit", *arguments, "--print_config"])
    content: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return content


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_stages_of_a_shipped_recipe_parse_and_their_modules_can_be_made(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = read_recipe(path)
    runner = _Runner(recipe, tmp_path, [], 0, 0)
    shapes = []
    for one in recipe.stages:
        overlay = tmp_path / f"{one.name}.yaml"
        overlay.write_text(yaml.safe_dump(runner._overlay(one)))
        configs = [part for file in (*one.files, overlay) for part in ("--config", str(file))]
        content = parsed(configs, monkeypatch, capsys)
        assert content["seed_everything"] == one.seed
        assert content["data"]["init_args"]["seed"] == one.seed
        callbacks = [callback["class_path"].rpartition(".")[2] for callback in content["trainer"]["callbacks"]]
        assert callbacks == ["PassAtOne"]
        kind = GRPOModule if one.rolls_out else PretrainModule
        assert content["model"]["class_path"] == f"ds_lightning.training.{kind.__name__}"
        config = DeepSeekConfig.from_dict(content["model"]["init_args"]["config"])
        with torch.device("meta"):
            model = DeepSeek(config)
        shapes.append({name: weight.shape for name, weight in model.named_parameters()})
        data = content["data"]["init_args"]
        longest = data.get("seq_len") or data["max_completion_length"] + 1
        assert longest <= config.max_position_embeddings, one.name
    assert all(shape == shapes[0] for shape in shapes), "stages hand over weights"


def test_deepseeks_numbers_are_those_of_the_paper() -> None:
    """The oracle: arXiv:2501.12948v2, sections 2 and B.4, and sums by hand."""
    stages = {one.name: one.sections for one in read_recipe(CONFIGS / "r1_deepseek.yaml").stages}
    zero, rl_2 = (stages[name]["data"]["init_args"] for name in ("zero", "rl_2"))
    module = stages["zero"]["model"]["init_args"]
    assert (module["lr"], module["beta"], module["ref_update_steps"]) == (3e-6, 0.001, 400)
    assert zero["prompts"] * zero["num_generations"] == 8192
    assert zero["prompts"] // zero["steps_per_rollout"] == 32
    assert zero["rollouts"] * zero["steps_per_rollout"] == 10_400
    assert (zero["num_generations"], zero["temperature"], zero["max_completion_length"]) == (16, 1.0, 32_768)
    assert round(rl_2["rollouts"] * rl_2["steps_per_rollout"], -2) == 1_700
    assert rl_2["temperature"] == 0.7
    assert stages["rl_1"]["model"]["init_args"]["epsilon"] == 10
    sft = stages["sft"]
    assert (sft["data"]["init_args"]["seq_len"], sft["data"]["init_args"]["batch_size"]) == (32_768, 128)
    assert sft["data"]["init_args"]["epochs"] in (2, 3)
    schedule = sft["model"]["init_args"]["lr_schedule"]["init_args"]
    assert (sft["model"]["init_args"]["lr"], schedule["final"], schedule["shape"]) == (5e-5, 0.1, "cosine")
