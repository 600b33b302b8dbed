"""Every shipped YAML against the real parser and the instantiated model."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ds_lightning.config import DeepSeekConfig
from ds_lightning.cost.prices import read_hardware, read_prices
from ds_lightning.flops import active_param_count, param_count
from ds_lightning.models import DeepSeek
from ds_lightning.nn.moe import Router
from ds_lightning.training_cli import run

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS = sorted(CONFIGS.glob("model/*.yaml"))
RUNS = sorted([*CONFIGS.glob("pretrain/*.yaml"), *CONFIGS.glob("sft/*.yaml")])
TRAINERS = sorted(CONFIGS.glob("trainer/*.yaml"))


def shape(name: str) -> DeepSeekConfig:
    return DeepSeekConfig.from_dict(yaml.safe_load((CONFIGS / "model" / f"{name}.yaml").read_text()))


def resolved(*arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", ["ds-lightning"])
    with pytest.raises(SystemExit) as leaving:
        run(["fit", *arguments, "--print_config"])
    assert leaving.value.code in (0, None)
    return capsys.readouterr().out


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_a_model_has_the_parameters_of_the_closed_form(path: Path) -> None:
    config = shape(path.stem)
    with torch.device("meta"):
        model = DeepSeek(config)
    biases = [module.e_score_correction_bias for module in model.modules() if isinstance(module, Router)]
    counted = sum(p.numel() for p in model.parameters()) + sum(bias.numel() for bias in biases if bias is not None)
    assert counted == param_count(config, include_mtp=True)


def test_published_shapes_have_their_published_sizes() -> None:
    assert param_count(shape("v3")) == 671_026_419_200
    assert param_count(shape("v2_lite")) == 15_706_484_224  # of the released weights
    assert round(param_count(shape("moonlight")) / 1e9) == 16
    assert round(active_param_count(shape("v3")) / 1e9, 1) == 37.6  # both embeddings included


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_run_parses_and_its_resolved_form_parses_to_itself(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = resolved("--config", str(path), monkeypatch=monkeypatch, capsys=capsys)
    content = yaml.safe_load(first)
    assert content["model"]["init_args"]["config"]["hidden_size"] > 0
    file = tmp_path / "resolved.yaml"
    file.write_text(first)
    again = yaml.safe_load(resolved("--config", str(file), monkeypatch=monkeypatch, capsys=capsys))
    content.pop("out"), again.pop("out")  # named after the file
    assert again == content


def holds(found: Any, wanted: Any) -> bool:
    """Tell whether everything that is wanted is there, whatever defaults stand beside it."""
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(holds(found.get(key), value) for key, value in wanted.items())
    return bool(found == wanted)


@pytest.mark.parametrize("path", TRAINERS, ids=lambda path: path.stem)
def test_a_trainer_overlays_any_run(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = str(CONFIGS / "pretrain/tiny.yaml")
    out = resolved("--config", tiny, "--config", str(path), monkeypatch=monkeypatch, capsys=capsys)
    content = yaml.safe_load(out)
    assert holds(content["trainer"], yaml.safe_load(path.read_text())["trainer"])
    assert content["trainer"]["gradient_clip_val"] == 1.0
    assert content["out"] == "runs/tiny"


def test_data_and_model_of_a_run_fit_together() -> None:
    for path in RUNS:
        content = yaml.safe_load(path.read_text())
        config = shape(Path(content["model"]["init_args"]["config"]).stem)
        data = content["data"]["init_args"]
        assert data.get("vocab_size", 0) <= config.vocab_size, path
        assert data["seq_len"] <= config.max_position_embeddings, path


def test_prices_and_hardware_have_dates_and_sources() -> None:
    prices = [price for file in CONFIGS.glob("prices/20*.yaml") for price in read_prices(file)]
    assert prices
    assert all(price.date and price.source and price.usd_per_device_hour > 0 for price in prices)
    assert read_hardware()
