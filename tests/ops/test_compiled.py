"""Oracles: what a library of two lines must return, a directory listing, and hostile surroundings."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds_lightning.ops import compiled as module
from ds_lightning.ops.compiled import compiled
from tests.ops.compiler import needs_compiler

SOURCE = 'extern "C" int twice(int x) { return 2 * x; }\n'


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for function in (compiled, module._compiler):
        function.cache_clear()
    yield tmp_path / "cache" / "ds_lightning"
    for function in (compiled, module._compiler):
        function.cache_clear()


def source(folder: Path, text: str = SOURCE) -> Path:
    path = folder / "an_operation" / "cpu.cpp"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


@needs_compiler
def test_a_file_becomes_a_library_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = compiled(source(tmp_path))
    assert library is not None
    assert library.twice(21) == 42
    [file] = cache.iterdir()
    assert file.name.startswith("an_operation-")
    assert file.suffix == ".so"
    assert cache.stat().st_mode & 0o777 == 0o700
    compiled.cache_clear()
    monkeypatch.setattr(module, "_compile", None)
    assert compiled(source(tmp_path)) is not None


@needs_compiler
@pytest.mark.parametrize("changed", ["source", "header", "flags"])
def test_a_change_makes_another_library(
    changed: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compiled(source(tmp_path)) is not None
    if changed == "header":
        (tmp_path / "products.h").write_text("\n")
        monkeypatch.setattr(module, "HEADER", tmp_path / "products.h")
    if changed == "flags":
        monkeypatch.setattr(module, "FLAGS", [*module.FLAGS, "-DNEW"])
    compiled.cache_clear()
    library = compiled(source(tmp_path, SOURCE.replace("2 * x", "3 * x") if changed == "source" else SOURCE))
    assert library is not None
    assert library.twice(5) == (15 if changed == "source" else 10)
    assert len(list(cache.iterdir())) == 2


def test_without_a_compiler_one_line_says_what_it_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert compiled(source(tmp_path)) is None
        assert compiled(source(tmp_path).with_name("another.cpp")) is None
    assert caplog.messages == ["no C++ compiler on PATH (c++, g++, clang++): the CPU takes up to twice as long"]


@needs_compiler
@pytest.mark.parametrize("broken", ["source", "cache"])
def test_what_cannot_be_compiled_is_named_with_the_reason(
    broken: str, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if broken == "cache":
        cache.parent.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert compiled(source(tmp_path, "int main( {" if broken == "source" else SOURCE)) is None
    [message] = caplog.messages
    assert "cannot compile an_operation/cpu.cpp: the CPU takes longer: " in message
    assert ("error: " if broken == "source" else "not a directory") in message.lower()
    assert not cache.is_dir() or not list(cache.iterdir()), "nothing half made is left"


@needs_compiler
def test_processes_that_compile_at_once_end_with_one_whole_library(tmp_path: Path, cache: Path) -> None:
    code = "import sys, pathlib; from ds_lightning.ops.compiled import compiled; "
    code += "print(compiled(pathlib.Path(sys.argv[1])).twice(4))"
    command = [sys.executable, "-c", code, str(source(tmp_path))]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
    assert [process.communicate()[0] for process in processes] == [b"8\n"] * 3
    assert len(list(cache.iterdir())) == 1


@needs_compiler
def test_all_kernels_are_compiled_ahead(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FLAGS", [*module.FLAGS, "-O0"])  # the last one counts
    module.compile_all()
    names = sorted(path.name.rpartition("-")[0] for path in cache.iterdir())
    assert names == ["experts", "generation", "rms_norm", "rotary_attention"]
