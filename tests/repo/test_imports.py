"""What an import loads. The oracle is a fresh interpreter and its ``sys.modules``."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def loaded_by(statement: str) -> set[str]:
    """Return the top-level packages that a fresh interpreter holds after a statement."""
    program = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_model_needs_torch_only() -> None:
    loaded = loaded_by("import ds_lightning.ops, ds_lightning.nn, ds_lightning.models, ds_lightning.losses")
    assert "torch" in loaded
    assert not loaded & {"lightning", "pytorch_lightning", "deepspeed", "omegaconf", "triton", "transformers"}


def test_the_closed_forms_need_the_standard_library_only() -> None:
    loaded = loaded_by("import ds_lightning.config, ds_lightning.flops")
    assert (
        not {name for name in loaded if not name.startswith("_")}
        - sys.stdlib_module_names
        - {"ds_lightning"}
        - {name for name in loaded_by("pass") if not name.startswith("_")}
    )


def test_money_needs_no_torch() -> None:
    assert not loaded_by("import ds_lightning.cost") & {"torch", "lightning", "numpy"}


def test_the_command_loads_no_torch_before_it_needs_it() -> None:
    assert not loaded_by("import ds_lightning.cli") & {"torch", "lightning", "deepspeed"}


def test_training_loads_no_deepspeed_before_a_run_asks_for_it() -> None:
    assert "deepspeed" not in loaded_by("import ds_lightning.training_cli")


def test_the_callbacks_folder_names_its_import_where_it_is_imported_by_itself() -> None:
    done = subprocess.run([sys.executable, "-c", "import callbacks"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: imported as 'callbacks': write 'from ds_lightning.callbacks import ...'"
    )
