"""What the prose claims. The oracles: the files it names, the command's own list of commands, the measured figures."""

import importlib.machinery
import importlib.util
import json
import re
import shlex
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ds_lightning.cli import main

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROSE = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("configs/*.md"), *ROOT.glob("ds_lightning/*/*.md")]
)


def commands(text: str) -> list[list[str]]:
    """Return the commands in the indented blocks of a page, split into words, without prompts of a path."""
    lines = re.findall(
        r"^ {4}((?:ds-lightning|make|\./scripts/|scripts/).*)$", text.replace("\\\n", " "), flags=re.MULTILINE
    )
    return [shlex.split(line, comments=True) for line in lines]


def tree_paths() -> list[str]:
    """Return the paths of the README's annotated tree, from its indentation."""
    block = re.search(r"## The tree\n\n(.*?)\n\n", README, flags=re.DOTALL)
    assert block
    paths, parents = [], [""]
    for line in block[1].splitlines():
        entry = re.match(r" {4}( *)(\S+) {2,}\S", line)
        assert entry, f"no annotated path in {line!r}"
        depth = len(entry[1]) // 2
        parents[depth + 1 :] = [parents[depth] + entry[2]]
        paths.append(parents[depth + 1])
    return paths


@pytest.mark.parametrize("page", PROSE, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_that_is_shown_exists(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nonesuch"]) == 2
    known = capsys.readouterr().err.partition("expected one of ")[2].strip().split(", ")
    assert "fit" in known
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for words in commands(page.read_text(encoding="utf-8")):
        if words[0] == "ds-lightning":
            assert words[1] in known, f"no command {words[1]!r}"
            configs = [words[index + 1] for index, word in enumerate(words) if word == "--config"]
            assert all((ROOT / config).is_file() for config in configs), configs
        elif words[0] == "make":
            assert words[1] in targets, f"no target {words[1]!r}"
        else:
            assert (ROOT / words[0]).stat().st_mode & 0o111, f"{words[0]} is not executable"


def test_the_readme_shows_its_two_commands() -> None:
    assert [words[0] for words in commands(README)][:2] == ["./scripts/quickstart", "./scripts/test"]


@pytest.mark.parametrize("page", PROSE, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_file_is_alive(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


def test_every_path_of_the_tree_exists_and_says_what_it_is() -> None:
    paths = tree_paths()
    assert "ds_lightning/nn/" in paths
    assert not [path for path in paths if not (ROOT / path).exists()]
    assert not [
        path for path in paths if path.endswith("/") != ((ROOT / path).is_dir() and not (ROOT / path).is_symlink())
    ]


def test_the_tree_is_complete_for_the_package() -> None:
    there = {path.name for path in (ROOT / "ds_lightning").iterdir()} - {"__init__.py", "__pycache__", "py.typed"}
    assert {Path(path).name for path in tree_paths() if re.fullmatch(r"ds_lightning/[^/]+/?", path)} == there


def test_the_reported_costs_add_up() -> None:
    rows = re.findall(r"^\| \**([^|*]+?)\** \| \**(\d+)\** \| \**(\d+)\** \|$", README, flags=re.MULTILINE)
    hours = {name: int(value) for name, value, _ in rows}
    assert hours["R1-Zero"] + hours["SFT data"] + hours["R1"] == hours["R1's post-training"] == 147
    assert hours["V3 pretraining"] + hours["V3 context extension"] == hours["V3-Base, not in the 294"]
    assert [2 * int(value) for _, value, _ in rows] == [int(usd) for *_, usd in rows]
    assert {name: int(usd) for name, _, usd in rows}["R1's post-training"] == 294
    assert README.index("294 thousand") < README.index("does **not** cover the base model") < README.index("\n| ")


def generator() -> ModuleType:
    path = str(ROOT / "scripts" / "readme_results.py")
    spec = importlib.util.spec_from_loader(
        "readme_results", importlib.machinery.SourceFileLoader("readme_results", path)
    )
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readmes_results_are_the_measured_ones() -> None:
    script = generator()
    assert script.with_results(README, script.results_tables(script.RESULTS)) == README


def test_results_are_written_between_their_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = generator()
    stage: dict[str, Any] = {
        "parameters": 12_000_000,
        "active_parameters": 3_000_000,
        "tokens": 2_000_000,
        "tokens_per_second": 4321.6,
        "bits_per_byte": {"gzip_9": 1.75, "model": 1.5},
        "device_hours": 0.1,
        "usd": 0.00496,
        "phases": {"train": {"usd": 0.004}, "lost": {"usd": 0.0}},
    }
    base = {"name": "base", "what": "text", "device_hours": 0.1, "usd": 0.005}
    last = {**base, "name": "rl_2", "pass_at_1": 0.5, "pass_at_1_greedy": 0.755}
    between = {"device_hours": 0.01, "usd": 0.0005}
    ledger = {"between": between, "device_hours": 0.21, "usd": 0.0105}
    head = {"date": "2001-02-03", "machine": "2 cores", "command": "scripts/quickstart", "wall_seconds": 361.2}
    readme = tmp_path / "README.md"
    (tmp_path / "pretrain.json").write_text(json.dumps({**head, "stage": stage}))
    readme.write_text(f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n")
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    monkeypatch.setattr(script, "README", readme)
    assert script.main() == 0
    assert "Not measured yet: `docs/results/quickstart.json` is missing." in readme.read_text()
    (tmp_path / "quickstart.json").write_text(
        json.dumps({**head, "report": {"stages": [base, last], "ledger": ledger}})
    )
    assert script.main() == 0
    written = readme.read_text()
    assert "old" not in written
    assert written.startswith("before\n")
    assert written.endswith("after\n")
    for row in (
        "| tokens per second | 4,322 |",
        "| held-out bits per byte, model | 1.500 |",
        "| dollars, train | 0.004000 |",
        "| base | text | 0.1000 | 0.005000 |  |  |",
        "| rl_2 | text | 0.1000 | 0.005000 | 50.0% | 75.5% |",
        "| total | 361 s with set-up | 0.2100 | 0.010500 |  |  |",
    ):
        assert row in written
    assert "lost" not in written


def test_a_script_refuses_an_argument_that_it_does_not_know() -> None:
    done = subprocess.run([ROOT / "scripts" / "setup", "all"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "setup: the argument is 'all', expected nothing, rl or dev\n"


def test_the_quickstart_names_a_word_that_it_does_not_know() -> None:
    done = subprocess.run([ROOT / "scripts" / "quickstart", "fit"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "quickstart: the first argument is 'fit', expected pretrain or an option\n"


def test_an_old_python_is_named(tmp_path: Path) -> None:
    (tmp_path / "python3").write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1\nexit 1\n')
    (tmp_path / "python3").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run([ROOT / "scripts" / "setup"], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr == "setup: python3 is 'Python 3.9.1', expected Python 3.11 or newer first on PATH\n"
