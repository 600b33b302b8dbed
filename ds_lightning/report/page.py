"""A run's page: one HTML file that needs nothing else."""

from __future__ import annotations

from pathlib import Path

from ds_lightning.report import sections
from ds_lightning.report.graphs import graphs
from ds_lightning.report.run_data import RunData
from ds_lightning.report.text import safe
from ds_lightning.whole_file import write_whole

MARK = '<meta name="generator" content="ds-lightning report">'
"""How a page is known to be ours."""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Whatever a model wrote, no browser runs a script of it or asks another machine for anything."""

STYLE = Path(__file__).with_name("style.css")


def run_page(run: RunData) -> str:
    """Return the page of a run."""
    shown = (
        sections.headline,
        sections.stages,
        graphs,
        sections.comparison,
        sections.gradients,
        sections.bill,
        sections.experts,
        sections.samples,
        sections.config,
    )
    return document(f"{run.name}: what it brought and what it cost", "".join(part(run) for part in shown))


def document(title: str, body: str) -> str:
    """Return a whole HTML document, with its style and without any link."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{MARK}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{safe(title)}</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n"
        "<footer>ds-lightning: every second of the allocation is booked. Sums are those of the run's ledger."
        "</footer>\n</body>\n</html>\n"
    )


def write_page(path: Path, page: str) -> Path:
    """Write a page in one piece, over an earlier one of ours and nothing else.

    Raises:
        ValueError: If the file is there and is not one of our pages.
        OSError: If it cannot be written; an earlier page is then as it was.
    """
    check_ours(path)
    return write_whole(path, page)


def check_ours(path: Path) -> None:
    """Refuse to write over what is not a page of ours.

    Raises:
        ValueError: If the file is there and is not one of our pages.
    """
    if path.is_file():
        with path.open("rb") as file:
            if MARK.encode() in file.read(1000):
                return
    if path.exists():
        raise ValueError(f"{path} was not written by ds-lightning report, expected no file there: move it away")
