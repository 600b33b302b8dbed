"""The mark of tests that need what kernels need: with a compiler, one that fails to compile fails its tests."""

import shutil

import pytest

from ds_lightning.ops import compiled

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, compiled.COMPILERS)), reason="no C++ compiler on PATH: the kernels are not used either"
)
