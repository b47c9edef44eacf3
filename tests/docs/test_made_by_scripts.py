"""Tables and pictures of the pages are what the committed results say: the scripts write the same again."""

from __future__ import annotations

import re

import pytest

from docs import pictures, tables
from helpers import CHECKOUT

PAGES = tables.pages()
pytestmark = pytest.mark.skipif(not tables.BENCHMARKS.is_dir(), reason="a source distribution holds no results")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(CHECKOUT).as_posix())
def test_the_tables_of_a_page_are_up_to_date(page: object) -> None:
    text = page.read_text("utf-8")  # type: ignore[attr-defined]
    assert tables.renewed(text) == text, "python -m docs.tables"
    assert len(tables.PLACE.findall(text)) == text.count("<!-- end of table -->")


def test_the_first_screens_say_what_was_measured() -> None:
    rows, _ = tables.suite("layer")

    def span(who: str, mode: str) -> str:
        ratios = [float(row["ratio_median"]) for row in tables.only(rows, contender=who, mode=mode)]
        return f"{min(ratios):.2f} to {max(ratios):.2f}"

    readme, first = (" ".join((CHECKOUT / name).read_text("utf-8").split()) for name in ("README.md", "docs/index.md"))
    imdb = tables.only(tables.rows(tables.RESULTS / "imdb" / "results.csv"), heads="4", mechanism="efficient")[0]
    gain = f"{float(imdb['test_accuracy_gain']):+.2f} ± {float(imdb['test_accuracy_gain_interval']):.2f} points"
    assert f"runs at {span('efficient', 'inference')} times the speed" in readme
    assert f"inference and {span('efficient', 'training')} times in training" in readme
    assert f"Standard attention gains too, {span('standard', 'inference')} times in inference" in readme
    assert gain in readme
    assert f"inference is {span('efficient', 'inference')} times that" in first


def test_every_table_is_used_and_known() -> None:
    used = [match["name"] for page in PAGES for match in tables.PLACE.finditer(page.read_text("utf-8"))]
    assert set(used) == set(tables.TABLES)


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_picture_is_up_to_date(name: str) -> None:
    assert (pictures.ASSETS / f"{name}.svg").read_text("utf-8") == pictures.draw(name), "python -m docs.pictures"


def test_every_picture_is_made_by_the_script_used_and_described() -> None:
    drawn = {f"{name}.svg" for name in pictures.PICTURES}
    assert {path.name for path in pictures.ASSETS.glob("*.svg")} == drawn
    shown = {}
    for page in PAGES:
        for words, target in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page.read_text("utf-8")):
            path = (page.parent / target).resolve()
            assert path.is_relative_to(pictures.ASSETS), target
            shown[path.name] = words
    assert set(shown) == drawn
    assert all(len(words.split()) >= 8 for words in shown.values()), "say in words what the picture shows"


def test_pictures_follow_the_readers_colour_scheme() -> None:
    for name in pictures.PICTURES:
        text = (pictures.ASSETS / f"{name}.svg").read_text("utf-8")
        assert "prefers-color-scheme:dark" in text
        assert "var(--ink)" in text
        assert not re.search(r"fill: ?(?:#000000|black)|<text[^>]*fill=\"#", text)


def test_a_changed_number_is_noticed() -> None:
    page = next(page for page in PAGES if page.name == "speed.md")
    text = page.read_text("utf-8")
    changed = text.replace("| efficient, inference | 2.27", "| efficient, inference | 9.99")
    assert changed != text
    assert tables.renewed(changed) == text
