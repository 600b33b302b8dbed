"""Oracles: the published law solved here by hand, and the parser and constructors of ``fit`` for the config."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from ds_lightning.config import DeepSeekConfig
from ds_lightning.cost import plan, plan_budget
from ds_lightning.cost.scaling import HIDDEN, shape
from ds_lightning.flops import param_count, train_flops_per_token


@pytest.fixture(scope="module")
def bought() -> dict[str, Any]:
    return plan_budget(300, device="h200")


def test_three_hundred_dollars_buy_the_size_of_the_law(bought: dict[str, Any]) -> None:
    """285 dollars at 3.5 an hour and the efficiency of the plan; M_opt and D_opt of arXiv:2401.02954, equation 4."""
    fields = yaml.safe_load(bought["yaml"])["model"]["init_args"]["config"]
    config = DeepSeekConfig.from_dict(fields)
    flops = 285 / 3.5 * 3600 * 989.5e12 * bought["efficiency"]["value"]
    body = train_flops_per_token(config, bought["seq_len"]) - 6 * config.vocab_size * config.hidden_size
    share = body / train_flops_per_token(config, bought["seq_len"])
    assert body == pytest.approx(0.1715 * (flops * share) ** 0.5243, rel=0.15)  # widths are steps of a tenth
    assert bought["tokens"] == pytest.approx(5.8316 * (flops * share) ** 0.4757, rel=0.25)
    assert bought["usd"] == pytest.approx(285, rel=0.02)
    assert bought["parameters"] == param_count(config)


def test_the_schedule_follows_the_laws(bought: dict[str, Any]) -> None:
    content = yaml.safe_load(bought["yaml"])
    body = bought["law_flops_per_token"] * bought["law_tokens"]
    assert content["model"]["init_args"]["lr"] == pytest.approx(0.3118 * body**-0.125, rel=0.01)
    batch = content["data"]["init_args"]["batch_size"] * content["data"]["init_args"]["seq_len"]
    assert 0.7 < batch / (0.2920 * body**0.3271) < 1.42  # a power of two
    assert all(source in " ".join(bought["law"].values()) for source in ("2401.02954", "2507.17702", "2412.19437"))


@pytest.mark.parametrize(("usd", "device", "devices"), [(300, "h200", None), (40, "h100", 2), (0.05, "cpu", None)])
def test_the_config_is_one_that_fit_takes(
    usd: float,
    device: str,
    devices: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from ds_lightning.training_cli import run

    report = plan_budget(usd, device=device, num_devices=devices)
    path = tmp_path / "bought.yaml"
    path.write_text(report["yaml"])
    monkeypatch.setattr(sys, "argv", ["ds-lightning"])
    with pytest.raises(SystemExit) as leaving:
        run(["fit", "--config", str(path), "--print_config"])
    assert leaving.value.code in (0, None)
    capsys.readouterr()
    again = plan(path)
    assert again["parameters"] == report["parameters"]
    assert again["num_devices"] == report["num_devices"]
    assert again["usd"] == pytest.approx(report["usd"])
    assert again["zero_stage"] == 0


def test_the_config_makes_its_module_and_data() -> None:
    from ds_lightning.data import TokenDataModule
    from ds_lightning.optim import WarmupStableDecay
    from ds_lightning.training import PretrainModule

    content = yaml.safe_load(plan_budget(0.05, device="cpu")["yaml"])
    settings, data = content["model"]["init_args"], content["data"]["init_args"]
    schedule = WarmupStableDecay(**settings["lr_schedule"]["init_args"])
    config = DeepSeekConfig.from_dict(settings["config"])
    module = PretrainModule(**{**settings, "config": config, "lr_schedule": schedule})
    module.configure_model()
    assert module.model is not None
    assert data["vocab_size"] <= config.vocab_size
    assert data["seq_len"] <= config.max_position_embeddings
    TokenDataModule(**data, total_tokens=settings["total_tokens"])


def test_more_money_buys_more_of_both() -> None:
    reports = [plan_budget(usd, device="h100") for usd in (3, 30, 300, 3000)]
    for less, more in pairwise(reports):
        assert less["active_parameters"] < more["active_parameters"]
        assert less["tokens"] < more["tokens"]


def test_much_money_takes_many_devices_and_says_where_the_law_ends() -> None:
    report = plan_budget(5e6, device="h800")
    assert report["num_devices"] > 512
    assert report["wall_seconds"] < 60 * 86400
    notes = " ".join(report["notes"])
    assert "outside the range that it was fitted on" in notes
    assert f"a wider model than {HIDDEN[-1]}" in notes


def test_shapes_pass_through_those_of_deepseek() -> None:
    assert shape(7168)[0].num_hidden_layers == 61
    assert abs(shape(2048)[0].num_hidden_layers - 27) <= 2
    assert shape(2048)[0].num_attention_heads == 16
    for hidden in HIDDEN:
        config, seq_len = shape(hidden)
        assert config.max_position_embeddings == seq_len
        assert 8 <= 2 * hidden / config.moe_intermediate_size <= 12 or hidden < 256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget_usd": -1, "device": "h100"}, "budget_usd is -1, expected more than 0"),
        ({"budget_usd": float("nan"), "device": "h100"}, "budget_usd is nan, expected more than 0"),
        ({"budget_usd": 1e-6, "device": "cpu"}, r"budget_usd is 1e-06: 0.0726 s of one cpu train nothing, expected"),
        ({"budget_usd": 9, "device": "h1000"}, r"device is 'h1000'; did you mean h100\?"),
        ({"budget_usd": 9, "device": "cpu", "usd_per_device_hour": 0}, "cpu costs 0 dollars, expected a price"),
        ({"budget_usd": 9, "device": "h100", "num_devices": 0}, "num_devices is 0, expected at least 1"),
    ],
)
def test_what_buys_nothing_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_budget(**options)
