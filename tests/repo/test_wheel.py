"""What a wheel ships, built from an sdist as a package index would get it. The oracle is the checkout itself.

Packers handle the links ``ds_lightning/callbacks`` and ``ds_lightning/configs`` in different ways; this holds the one
that is wanted: real files under the import name, and nothing beside ``ds_lightning``.
"""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOT_SOURCE = {"runs", "data", "build", "dist"}


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Paths in the wheel."""
    source = tmp_path_factory.mktemp("source")
    for path in ROOT.iterdir():
        if path.name.startswith(".") or path.name in NOT_SOURCE or path.suffix == ".egg-info":
            continue
        if path.is_dir():
            shutil.copytree(path, source / path.name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_a_wheel_holds_the_package_and_nothing_beside_it(shipped: set[str]) -> None:
    top = {path.partition("/")[0] for path in shipped}
    assert {name for name in top if not name.endswith(".dist-info")} == {"ds_lightning"}


def test_every_module_is_shipped_under_its_import_name(shipped: set[str]) -> None:
    modules = {
        f"ds_lightning/{path.relative_to(ROOT / 'ds_lightning')}" for path in (ROOT / "ds_lightning").rglob("*.py")
    }
    callbacks = {f"ds_lightning/{path.relative_to(ROOT)}" for path in (ROOT / "callbacks").rglob("*.py")}
    assert callbacks
    assert {path for path in shipped if path.endswith(".py")} == modules | callbacks


def test_every_config_is_shipped(shipped: set[str]) -> None:
    configs = {f"ds_lightning/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert configs
    assert {path for path in shipped if path.endswith(".yaml")} == configs


def test_types_chat_template_and_licence_are_shipped(shipped: set[str]) -> None:
    assert {"ds_lightning/py.typed", "ds_lightning/data/chat_template.jinja"} <= shipped
    assert any(path.endswith("licenses/LICENSE") for path in shipped)
