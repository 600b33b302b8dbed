"""Files that start runs elsewhere. The oracles: the real parsers of the commands that they call."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from ds_lightning.cli import STOPPED, WRONG_INPUT
from ds_lightning.training_cli import run

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text(encoding="ascii")
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="ascii"))
JOBSET = yaml.safe_load((DOCKER / "kubernetes/jobset.yaml").read_text(encoding="ascii"))
SHELL = [DOCKER / "slurm/fit.sbatch", DOCKER / "torchrun/node", ROOT / "scripts/build_image"]
FILES = sorted(path for path in [*DOCKER.rglob("*"), ROOT / ".dockerignore"] if path.is_file())
PAGE = ROOT / "docs/cluster.md"


def parsed(options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Return the resolved config of ``ds-lightning fit`` with these options."""
    monkeypatch.setattr(sys, "argv", ["ds-lightning"])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as leaving:
        run(["fit", *options, "--print_config"])
    assert leaving.value.code in (0, None)
    config: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    sharded = "ZeRO" in str(config["trainer"]["strategy"])
    assert not (sharded and config["model"]["init_args"]["optimizer"] == "muon"), "which the module refuses"
    return config


def instructions(name: str) -> list[str]:
    """Return the arguments of an instruction of the Dockerfile, continued lines joined."""
    joined = re.sub(r"\\\n\s*", "", DOCKERFILE)
    return re.findall(rf"^{name} (.*)$", joined, flags=re.MULTILINE)


def stand_in(folder: Path, name: str, script: str) -> None:
    """Put a program of this name into a folder."""
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{script}\n", encoding="ascii")
    path.chmod(0o755)


def test_the_image_has_a_pinned_base_that_can_be_another() -> None:
    assert instructions("FROM") == ["${BASE}"]
    bases = [argument for argument in instructions("ARG") if argument.startswith("BASE=")]
    assert len(bases) == 1
    assert re.fullmatch(r"BASE=[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}", bases[0])


def test_the_image_runs_the_command_as_nobody_special() -> None:
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", instructions("USER")[-1])
    assert instructions("ENTRYPOINT") == ['["ds-lightning"]']
    owned = re.findall(r"chown \S+ ([\w ]+)", DOCKERFILE)
    assert owned == ["data runs"], "the code is root's"


def test_the_image_is_installed_as_any_checkout_is() -> None:
    assert any("scripts/setup" in command for command in instructions("RUN"))
    assert "-c constraints.txt" in (ROOT / "scripts/setup").read_text(encoding="ascii")


def test_what_goes_into_the_image_is_listed_and_there() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="ascii").splitlines()
    patterns = [line for line in lines if not line.startswith("#")]
    assert patterns[0] == "*"
    added = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    assert {"ds_lightning", "constraints.txt", "scripts/setup"} <= set(added)
    assert not [name for name in added if not (ROOT / name).exists()]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_holds_a_floating_tag_a_secret_or_a_privilege(path: Path) -> None:
    text = path.read_text(encoding="ascii")
    assert len(text.splitlines()) <= 90, "one reads it in a minute"
    assert max(map(len, text.splitlines())) <= 120
    assert not re.search(r":latest\b|privileged: *true|hostNetwork|docker\.sock|--bind_all", text)
    assert not re.search(r"(?i)\b\w*(token|secret|password|api_?key)\w*\s*[=:]\s*(?!false)\S", text)


@pytest.mark.parametrize("service", sorted(COMPOSE["services"]))
def test_a_service_is_confined_and_published_to_the_host_alone(service: str) -> None:
    settings = COMPOSE["services"][service]
    assert all(port.startswith("127.0.0.1:") for port in settings.get("ports", []))
    assert "network_mode" not in settings
    assert settings["read_only"]
    assert settings["cap_drop"] == ["ALL"]
    assert not re.search(r":latest$", settings["image"])


def test_tensorboard_is_reachable_and_cannot_write() -> None:
    settings = COMPOSE["services"]["tensorboard"]
    assert settings["ports"] == ["127.0.0.1:6006:6006"]
    assert settings["volumes"] == ["runs:/app/runs:ro"]


@pytest.mark.parametrize("service", ["train", "train-gpu"])
def test_a_service_trains(service: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command, *options = COMPOSE["services"][service]["command"]
    assert command == "fit"
    assert parsed(options, monkeypatch, capsys)["out"].startswith("runs/")


def job() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the spec of the template's one job, and its pod's one container."""
    (replicated,) = JOBSET["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    return spec, container


def test_the_pods_of_a_job_set_find_each_other_and_count_alike(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, container = job()
    command, *options = container["args"]
    assert command == "fit"
    trainer = parsed(options, monkeypatch, capsys)["trainer"]
    assert spec["parallelism"] == spec["completions"] == trainer["num_nodes"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(trainer["devices"])
    name, (replicated,) = JOBSET["metadata"]["name"], JOBSET["spec"]["replicatedJobs"]
    environment = {variable["name"]: variable for variable in container["env"]}
    assert environment["MASTER_ADDR"]["value"] == f"{name}-{replicated['name']}-0-0.{name}"
    assert set(environment) == {"MASTER_ADDR", "MASTER_PORT", "NODE_RANK"}
    assert "job-completion-index" in environment["NODE_RANK"]["valueFrom"]["fieldRef"]["fieldPath"]


def test_the_pods_of_a_job_set_are_unprivileged_and_restarted_but_for_wrong_input() -> None:
    spec, container = job()
    pod = spec["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" == instructions("USER")[-1]
    assert not pod["automountServiceAccountToken"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert not container["securityContext"]["allowPrivilegeEscalation"]
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["values"] == [WRONG_INPUT]
    assert STOPPED not in rule["onExitCodes"]["values"]
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(instructions("VOLUME")[0].split()) <= mounted


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_a_shell_script_is_one(path: Path) -> None:
    assert path.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_a_node_calls_torchrun_with_options_that_it_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(tmp_path, "torchrun", 'printf "%s\\n" "$@"')
    given = ["2", "8", "10.0.0.1", "--config", "configs/pretrain/small.yaml", "--config", "configs/trainer/ddp8.yaml"]
    done = subprocess.run(
        [DOCKER / "torchrun/node", *given], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    torchrun = get_args_parser().parse_args(done.stdout.split())
    assert (torchrun.nnodes, torchrun.nproc_per_node, torchrun.rdzv_endpoint) == ("2", "8", "10.0.0.1:29400")
    assert (torchrun.module, torchrun.training_script) == (True, "ds_lightning")
    command, *options = torchrun.training_script_args
    assert command == "fit"
    trainer = parsed(options, monkeypatch, capsys)["trainer"]
    assert (trainer["num_nodes"], int(trainer["devices"]), trainer["accelerator"]) == (2, 8, "gpu")


def test_a_node_without_its_arguments_says_what_it_expects() -> None:
    done = subprocess.run([DOCKER / "torchrun/node", "2"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "expected the number of machines, of GPUs, the address where they meet" in done.stderr


def test_the_image_is_not_built_without_the_tools(tmp_path: Path) -> None:
    for tool in ("bash", "dirname", "realpath", "env"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    command = [ROOT / "scripts/build_image", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": str(tmp_path)})
    assert done.returncode == 2
    assert done.stderr.startswith("build_image: no buildah on PATH, expected one")


def page_commands() -> list[list[str]]:
    """Return the commands in the indented blocks of the page, continued lines joined."""
    text = PAGE.read_text(encoding="ascii").replace("\\\n", " ")
    lines = re.findall(r"^ {4}(\S.*)$", text, flags=re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def fit_options(words: list[str]) -> list[str] | None:
    """Return the options of ``ds-lightning fit`` in a command of the page, ranks included; none: it makes no run."""
    if words[:2] == ["ds-lightning", "fit"]:
        return words[2:]
    if "docker/slurm/fit.sbatch" in words:
        nodes = words[words.index("--nodes") + 1] if "--nodes" in words else "2"
        return [*words[words.index("docker/slurm/fit.sbatch") + 2 :], "--trainer.num_nodes", nodes]
    if words[0] == "docker/torchrun/node":
        return [*words[4:], "--trainer.num_nodes", words[1], "--trainer.devices", words[2]]
    if words[0] == "scripts/two_nodes":
        return [*words[words.index("--") + 1 :], "--trainer.num_nodes", "2", "--trainer.devices", "1"]
    return None


RUNS = [options for words in page_commands() if (options := fit_options(words)) is not None]


@pytest.mark.parametrize("options", RUNS, ids=" ".join)
def test_every_run_of_the_page_parses_and_its_batch_divides(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = parsed(options, monkeypatch, capsys)
    trainer = config["trainer"]
    ranks = int(trainer["devices"]) * trainer["num_nodes"]
    assert config["data"]["init_args"]["batch_size"] % (ranks * trainer["accumulate_grad_batches"]) == 0


def test_every_file_that_the_page_calls_is_there() -> None:
    named = [word for words in page_commands() for word in words if re.match(r"(\./)?(docker|scripts|configs)/", word)]
    assert {"docker/slurm/fit.sbatch", "docker/kubernetes/jobset.yaml", "docker/compose.yaml"} <= set(named)
    assert not [word for word in named if not (ROOT / word).exists()]
    assert len(RUNS) >= 4
