"""Pages for people: what a run brought, what it cost, and what it was planned to cost. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ds_lightning.report.gallery import GALLERY, gallery_page, ranked, report_table, run_row
from ds_lightning.report.page import check_ours, run_page, write_page
from ds_lightning.report.run_data import PAGE, RunData, read_run_data

__all__ = [
    "PAGE",
    "RunData",
    "check_ours",
    "ranked",
    "read_run_data",
    "report_table",
    "run_row",
    "write_gallery",
    "write_run_page",
]


def write_run_page(run: str | Path | RunData, out: str | Path | None = None) -> Path:
    """Write the page of a run.

    Args:
        run: Its folder, or what was read from there.
        out: File to write; none: ``report.html`` in the run's folder.

    Returns:
        The page's path.

    Raises:
        ValueError: If the folder has no sound ledger, or the file is there and not ours.
        OSError: If the file cannot be written.
    """
    data = run if isinstance(run, RunData) else read_run_data(run)
    return write_page(data.folder / PAGE if out is None else Path(out), run_page(data))


def write_gallery(runs: Sequence[RunData], out: str | Path | None = None) -> Path:
    """Write the page over many runs, and a page for each of them.

    Args:
        runs: What was read of them.
        out: File to write; none: ``gallery.html`` in the folder that holds them all.

    Raises:
        ValueError: If a file is there and not ours.
        OSError: If a file cannot be written.
    """
    common = Path(os.path.commonpath([run.folder.resolve() for run in runs]))
    here = Path.cwd()
    default = (common.relative_to(here) if common.is_relative_to(here) else common) / GALLERY
    path = default if out is None else Path(out)
    for run in runs:
        write_run_page(run)
    return write_page(path, gallery_page(runs, path.resolve()))
