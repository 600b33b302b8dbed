"""Oracle: headless Chromium at the width of a desk and of a phone: what it draws, asks for and complains about."""

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ds_lightning.report import read_run_data, write_gallery, write_run_page
from tests.report.small_runs import write_plan, write_recipe, write_run

ACCENTS = {"light": (0x2F, 0x5F, 0xD0), "dark": (0x7F, 0xA2, 0xFF)}
WIDTHS = (1280, 390)

FRAME = """<!doctype html><link rel="icon" href="data:,">
<iframe id="page" style="border:0" src="{page}"></iframe>
<script>
const frame = document.getElementById("page");
frame.style.width = "{width}px"; frame.style.height = "3000px";
frame.onload = () => {{
  const inside = frame.contentDocument, root = inside.documentElement;
  const heights = tags => tags.map(tag => tag.getBoundingClientRect().height);
  const svgs = [...inside.querySelectorAll("svg")].filter(svg => svg.getBoundingClientRect().height > 0);
  document.body.dataset.seen = JSON.stringify({{
    width: root.clientWidth, needed: root.scrollWidth, svgs: svgs.length, title: inside.title,
    text: Math.min(...svgs.flatMap(svg => heights([...svg.querySelectorAll("text")]))),
    tables: Math.max(0, ...[...inside.querySelectorAll(".scroll")].map(box => box.scrollWidth - box.clientWidth)),
  }});
}};
</script>"""
"""Shows a page at a width, and writes down what a script outside of it can measure: inside none may run."""

pytestmark = pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")


@dataclass
class Site:
    """A folder served on the loopback, and what was asked of it."""

    folder: Path
    address: str
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A run, a recipe and a gallery of both."""
    run, recipe = write_run(tmp_path / "site" / "run"), write_recipe(tmp_path / "site" / "r1")
    write_plan(run, {"startup": 10, "data": 10, "train": 50, "validate": 10, "checkpoint": 1, "export": 1, "idle": 1})
    write_run_page(run)
    write_run_page(recipe)
    write_gallery([read_run_data(run), read_run_data(recipe)], tmp_path / "site" / "gallery.html")
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "site")))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Site(tmp_path / "site", f"http://127.0.0.1:{server.server_port}", asked)
    server.shutdown()
    thread.join()
    server.server_close()


def chromium(folder: Path, url: str, *options: str) -> tuple[str, str]:
    """Open a page, and return what Chromium printed and what its console said."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--hide-scrollbars", "--enable-logging=stderr", "--virtual-time-budget=5000"]
    command += [f"--user-data-dir={folder / 'profile'}", *options, url]
    done = subprocess.run(command, check=True, timeout=120, capture_output=True, text=True, errors="replace")
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["run/report.html", "r1/report.html", "gallery.html"])
def test_a_page_fits_its_window_and_asks_for_nothing(name: str, width: int, site: Site, tmp_path: Path) -> None:
    (site.folder / "frame.html").write_text(FRAME.format(page=name, width=width))
    dom, console = chromium(tmp_path, f"{site.address}/frame.html", "--dump-dom", "--window-size=1400,3200")
    found = re.search(r'data-seen="([^"]*)"', dom)
    assert found, dom[-2000:]
    seen = json.loads(found[1].replace("&quot;", '"'))
    assert console == ""
    assert site.asked == ["/frame.html", f"/{name}"]
    assert seen["width"] == width
    assert seen["needed"] <= width, "the page scrolls sideways"
    assert seen["tables"] <= 0, "a table scrolls sideways"
    assert seen["svgs"] >= 2
    assert "owned" not in seen["title"]
    assert name == "gallery.html" or seen["text"] >= 8, "labels are too small to read"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_curves_are_drawn_in_the_colours_of_the_scheme(scheme: str, site: Site, tmp_path: Path) -> None:
    picture = tmp_path / f"report_{scheme}.png"
    preferred = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    options = (preferred, "--window-size=1280,1800", f"--screenshot={picture}")
    _, console = chromium(tmp_path, f"{site.address}/run/report.html", *options)
    assert console == ""
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert (pixels[5, 5].mean() < 60) == (scheme == "dark")
    accent = np.abs(pixels - ACCENTS[scheme]).max(axis=2) < 12
    columns = np.flatnonzero(accent[420:700, 110:640].any(axis=0))  # the first chart: bits per byte fall
    assert columns.size > 200, f"no curve: see {picture}"
    heights = [np.flatnonzero(accent[420:700, 110 + column]).mean() for column in (columns[0], columns[-1])]
    assert heights[1] - heights[0] > 60, f"the curve does not fall: see {picture}"
