"""Oracle: the page read back by an HTML parser, and the figures of the runs that were put in."""

from html.parser import HTMLParser
from pathlib import Path

import pytest

from ds_lightning.report import read_run_data, write_gallery, write_run_page
from ds_lightning.report.page import MARK
from tests.report.small_runs import HOSTILE, book, write_figures, write_plan, write_recipe, write_run

SHOWN = HOSTILE.replace("\u202e", "\ufffd").replace("\x00", "\ufffd")


class Page(HTMLParser):
    """A page's tags with their attributes, and its text outside the style."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._hidden = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._hidden = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        if not self._hidden and data.strip():
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(self.text)


def page(run: Path) -> Page:
    return Page(write_run_page(run))


def test_the_page_of_a_run_shows_result_bill_plan_curves_experts_samples_and_config(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    write_plan(folder, {"startup": 10, "train": 50})
    shown = page(folder)
    for words in (
        "bits per byte of held-out text",
        "$1.00",  # the bill
        "Bits per byte of held-out text against dollars",
        "$0.60",  # planned, of 60 seconds
        "1.67\u00d7",
        "it rests on this: the device is the same",
        "planned 1.00 GB of tensors alone, actual 1.10 GB (1.10\u00d7)",
        "40.0%",  # bought no gradient
        "mine at $36.00 an hour",
        "Load of the experts after run",
        "early",
        "seed_everything: 7",
    ):
        assert words in shown.words, words
    assert [tag for tag, _ in shown.tags].count("svg") == 5  # three charts, the bar and the heatmap


def test_the_page_of_a_recipe_shows_stages_points_and_ten_answers(tmp_path: Path) -> None:
    shown = page(write_recipe(tmp_path / "r1"))
    for words in ("Held-out problems solved", "+20.0", "$0.0500", "between stages", "Response length", "25.0% in zero"):
        assert words in shown.words, words
    assert sum(tag == "li" and "class" not in at for tag, at in shown.tags) >= 10
    assert shown.text.count(SHOWN) == 20  # ten before, ten after, of twelve
    assert shown.text.count("right") == 2  # the first and the last stage each solve one


@pytest.mark.parametrize("kind", ["run", "recipe", "gallery"])
def test_nothing_a_model_wrote_becomes_markup_and_nothing_is_fetched(kind: str, tmp_path: Path) -> None:
    folder = write_recipe(tmp_path / "r1") if kind == "recipe" else write_run(tmp_path / "<i>r")
    path = write_gallery([read_run_data(folder)]) if kind == "gallery" else write_run_page(folder)
    shown = Page(path)
    assert not {"script", "img", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in shown.tags}
    for tag, attributes in shown.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset", "style")] or (
            set(attributes) == {"style"} and tag == "i"
        )
        link = attributes.get("href")
        assert link is None or link == "data:," or link.endswith("report.html")
    text = path.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert "http" not in text.replace("http-equiv", "")
    assert "url(" not in text
    if kind != "gallery":
        assert SHOWN in shown.words


def test_a_run_that_is_not_finished_has_a_page_with_its_bill(tmp_path: Path) -> None:
    book(tmp_path / "run", {"startup": 5, "train": 5})
    shown = page(tmp_path / "run")
    assert "not finished" in shown.words
    assert "$0.100" in shown.words
    assert "no plan was stored at the start" in shown.words


def test_a_run_that_was_free_has_a_page(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    book(folder, {})
    write_figures(folder)
    assert "Config" not in page(folder).words


def test_a_recipe_with_a_stage_that_runs_has_a_page(tmp_path: Path) -> None:
    folder = write_recipe(tmp_path / "r1")
    (folder / "sft" / "report.json").unlink()
    shown = page(folder)
    assert "not finished" in shown.words
    assert "30.0%" in shown.words  # the last stage that has a result


def test_why_stages_were_not_planned_is_said_once(tmp_path: Path) -> None:
    folder = write_recipe(tmp_path / "r1")
    for name in ("zero", "sft"):
        write_plan(folder / name, {}, plan=None, reason="it is no pretraining")
    words = page(folder).words
    assert "base: no plan was stored at the start." in words
    assert "zero, sft: not planned, since it is no pretraining." in words


def test_a_gallery_ranks_runs_and_links_their_pages(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "runs" / "b&w", bits_per_byte={"model": 3.0}), write_recipe(tmp_path / "runs" / "r1")]
    path = write_gallery([read_run_data(run) for run in runs])
    assert path == tmp_path / "runs" / "gallery.html"
    shown = Page(path)
    links = [attributes["href"] for tag, attributes in shown.tags if tag == "a"]
    assert links == ["r1/report.html", "b%26w/report.html"]
    assert "2 runs for $4.10" in " ".join(shown.words.split())
    elsewhere = write_gallery([read_run_data(run) for run in runs], tmp_path / "all.html")
    assert "runs/r1/report.html" in elsewhere.read_text()


def test_only_our_own_page_is_written_over(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    path = write_run_page(folder)
    assert MARK in path.read_text()
    assert write_run_page(folder) == path
    path.write_text("<p>mine</p>")
    with pytest.raises(
        ValueError, match=r"run/report.html was not written by ds-lightning report, expected no file th"
    ):
        write_run_page(folder)
    assert path.read_text() == "<p>mine</p>"
    with pytest.raises(ValueError, match="was not written by ds-lightning report"):
        write_run_page(folder, tmp_path)


def test_a_full_disk_leaves_the_earlier_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    before = write_run_page(folder).read_bytes()
    (folder / "report.html.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        write_run_page(folder)
    assert (folder / "report.html").read_bytes() == before
