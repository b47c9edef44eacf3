"""The built site: strict, every page reachable, no dead link, nothing from elsewhere, every public name documented."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import griffe
import pytest
import yaml
from docs.docstrings import DOCUMENTED
from filelock import FileLock

import better_attention as ba
from helpers import CHECKOUT, pages
from helpers.browser import CHROMIUM, Browser

DOCS = CHECKOUT / "docs"
LAZY = {"distil", "load_run"}
"""Public names that a star import leaves out, because they need an extra."""
OUTSIDE = re.compile(r"^(?:https?:)?//", re.IGNORECASE)
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src"}
"""Elements that load what an attribute names; of ``link`` those that are style sheets, fonts, icons."""
QUOTING = {"code", "pre", "script", "style"}
"""Elements whose text is not the page's prose."""


class Page(HTMLParser):
    """What a page links to, what it loads, and the places in it that a link may name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.prose = ""
        self._quoting = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self._quoting += tag in QUOTING
        self.anchors |= {values[key] for key in ("id", "name") if key in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in LOADS and LOADS[tag] in values:
            self.loaded.append(values[LOADS[tag]])
        if tag == "link" and not {"canonical", "next", "prev"} & set(values.get("rel", "").split()):
            self.loaded.append(values["href"])

    def handle_endtag(self, tag: str) -> None:
        self._quoting -= tag in QUOTING

    def handle_data(self, data: str) -> None:
        if not self._quoting:
            self.prose += data


def project(folder: Path) -> Path:
    """The configuration and pages, copied, so that what a build leaves behind lies beside them."""
    shutil.copy(CHECKOUT / "mkdocs.yml", folder)
    shutil.copytree(DOCS, folder / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "src").symlink_to(CHECKOUT / "src")
    return folder


def build(builder: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Build the project in ``folder`` strictly."""
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "NO_COLOR": "1"}
    command = [sys.executable, "-m", builder, "build", "--strict", "--config-file", "mkdocs.yml"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as Zensical builds it; once for all processes of a test run."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "documentation"
    with FileLock(str(shared / "documentation.lock")):
        if not folder.exists():
            folder.mkdir()
            result = build("zensical", project(folder))
            (folder / "log.txt").write_text(result.stdout + result.stderr, "utf-8")
    assert (folder / "site" / "index.html").exists(), (folder / "log.txt").read_text("utf-8")
    log = (folder / "log.txt").read_text("utf-8")
    assert "No issues found" in log, log
    assert "griffe:" not in log, log  # docstrings that do not fit their signatures
    return folder / "site"


@cache
def html(site: Path) -> dict[Path, Page]:
    """Every page of the site."""
    return {path: Page(path.read_text("utf-8")) for path in sorted(site.rglob("*.html"))}


def dead(site: Path) -> Iterator[str]:
    """The links within the site that lead nowhere: to no file, or to no place in it."""
    found = html(site)
    for path, page in found.items():
        if path.name == "404.html":  # served for any address, so that its links are absolute
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            place = unquote(parts.fragment)
            if not target.exists() or (place and target in found and place not in found[target].anchors):
                yield f"{path.name}: {link}"


def test_no_link_is_dead(site: Path) -> None:
    assert list(dead(site)) == []


def test_every_page_can_be_reached_from_the_first(site: Path) -> None:
    found = html(site)
    reached, waiting = set(), [site / "index.html"]
    while waiting:
        path = waiting.pop()
        if path in reached or path not in found:
            continue
        reached.add(path)
        links = (urlsplit(link) for link in found[path].links)
        waiting += [(path.parent / unquote(link.path)).resolve() for link in links if link.path and not link.scheme]
    assert set(found) - reached == {site / "404.html"}


def test_every_page_is_in_the_navigation() -> None:
    configuration = yaml.safe_load((CHECKOUT / "mkdocs.yml").read_text("utf-8"))

    def named(entry: object) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for inside in entry.values() if isinstance(entry, dict) else entry:  # type: ignore[attr-defined]
                yield from named(inside)

    listed = list(named(configuration["nav"]))
    assert len(listed) == len(set(listed))
    assert set(listed) == {path.relative_to(DOCS).as_posix() for path in pages.files(DOCS)}, (
        "add the page to mkdocs.yml"
    )


def test_nothing_comes_from_elsewhere(site: Path) -> None:
    foreign = [f"{path.name}: {url}" for path, page in html(site).items() for url in page.loaded if OUTSIDE.match(url)]
    for sheet in site.rglob("*.css"):
        text = sheet.read_text("utf-8")
        foreign += [f"{sheet.name}: {url}" for url in re.findall(r"url\(['\"]?((?:https?:)?//[^)'\"]+)", text)]
        foreign += [f"{sheet.name}: {url}" for url in re.findall(r"@import\s+['\"](https?:[^'\"]+)", text)]
    for picture in site.rglob("*.svg"):
        text = picture.read_text("utf-8")
        foreign += [f"{picture.name}: {url}" for url in re.findall(r"href=['\"](https?:[^'\"]+)", text)]
    assert foreign == []


def test_every_formula_became_one(site: Path) -> None:
    left = {path.name: re.findall(r"\$[^$\s][^$]*\$", page.prose) for path, page in html(site).items()}
    assert {name: texts for name, texts in left.items() if texts} == {}
    assert "<msqrt>" in (site / "picture.html").read_text("utf-8")  # 1/\sqrt{d_k}: a formula may begin with a digit


def test_the_site_can_be_searched_where_it_is_opened_from_a_folder(site: Path) -> None:
    """A browser does not let a page read ``search.json`` there, but loads a script."""
    assert "ALiBi" in (site / "search.js").read_text("utf-8")


def test_a_function_is_shown_once_and_its_result_is_one_item(site: Path) -> None:
    page = (site / "api" / "function.html").read_text("utf-8")
    first = page[page.index('id="better_attention.attention"') : page.index('id="better_attention.explain"')]
    assert first.count("doc-signature") == 1
    returned = first[first.index("Returns:") : first.index("Raises:")]
    assert returned.count("<li") == 1


def test_the_first_page_names_every_extra_for_users() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = set(project["optional-dependencies"]) - {"docs", "bench", "hosts", "dev"}
    table = re.findall(r"^\|((?: `[a-z]+`,?)+) \|", (DOCS / "start.md").read_text("utf-8"), re.MULTILINE)
    assert set(re.findall(r"[a-z]+", " ".join(table))) == wanted


def test_what_the_checks_of_the_site_look_for_is_found(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(
        '<link rel="stylesheet" href="https://fonts.googleapis.com/css"><h1 id="a">A</h1><a href="b.html#there">b</a>'
        '<a href="c.html">c</a><a href="#nowhere">d</a><a href="#a">e</a><img src="//cdn/x.png"><code>$x$</code>$y$'
    )
    (tmp_path / "b.html").write_text('<p id="here"></p>')
    assert list(dead(tmp_path)) == ["index.html: b.html#there", "index.html: c.html", "index.html: #nowhere"]
    page = Page((tmp_path / "index.html").read_text())
    assert [bool(OUTSIDE.match(url)) for url in page.loaded] == [True, True]
    assert page.prose.endswith("e$y$")


def test_every_public_name_is_documented(site: Path) -> None:
    public, shown = {*ba.__all__, *LAZY}, documented(site)
    assert public == DOCUMENTED
    assert {name for name in public if f"better_attention.{name}" not in shown} == set()


def documented(site: Path) -> set[str]:
    """The names that have a place in the pages of the API."""
    return set().union(*(page.anchors for path, page in html(site).items() if path.parent.name == "api"))


def callables() -> Iterator[tuple[str, griffe.Function]]:
    """Every public function and method, with the class's own signature for its constructor."""
    package = griffe.load("better_attention", search_paths=[str(CHECKOUT / "src")], docstring_parser="google")
    for name in sorted({*ba.__all__, *LAZY}):
        thing = package[name]
        thing = thing.final_target if thing.is_alias else thing
        if thing.is_function:
            yield name, thing
        elif thing.is_class:
            if "__init__" in thing.members:
                yield name, thing.members["__init__"]
            for key, member in thing.members.items():
                if member.is_function and not key.startswith("_"):
                    yield f"{name}.{key}", member


def test_every_argument_of_a_public_function_is_documented_by_itself(site: Path) -> None:
    faults, seen, shown = [], 0, documented(site)
    for name, function in callables():
        if f"better_attention.{name}" not in shown:  # methods that layer and cache have for each other
            continue
        owner = function.parent if function.name == "__init__" else function
        text = owner.docstring
        assert text is not None, name
        given = {
            item.name
            for section in text.parse("google", warnings=False)
            if section.kind is griffe.DocstringSectionKind.parameters
            for item in section.value
        }
        wanted = {p.name.lstrip("*") for p in function.parameters} - {"self", "cls"}
        seen += len(wanted)
        faults += [f"{name}: {argument}" for argument in sorted(wanted ^ {item.lstrip("*") for item in given})]
    assert seen > 100
    assert faults == []


@pytest.mark.slow
def test_material_for_mkdocs_builds_the_same_pages(site: Path, tmp_path: Path) -> None:
    result = build("mkdocs", project(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    theirs = {path.relative_to(site) for path in site.rglob("*.html")}
    assert {path.relative_to(tmp_path / "site") for path in (tmp_path / "site").rglob("*.html")} == theirs
    assert list(dead((tmp_path / "site").resolve())) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", ["[nowhere](nowhere.md)", "[nowhere](start.md#nowhere)", "[`x`][better_attention.nowhere]"]
)
def test_a_dead_link_fails_the_build(fault: str, tmp_path: Path) -> None:
    folder = project(tmp_path)
    page = folder / "docs" / "faq.md"
    page.write_text(f"{page.read_text('utf-8')}\n{fault}\n", "utf-8")
    assert build("zensical", folder).returncode != 0


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed: no page is opened in a browser")


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    one = Browser(tmp_path / "profile")
    yield one
    one.close()


@pytest.mark.slow
@needs_chromium
def test_a_page_follows_the_colours_that_the_system_prefers_now(site: Path, browser: Browser) -> None:
    """As its pictures do: what the theme stores at the first visit must not decide the next one."""
    for dark in (False, True, False):
        browser.open(site / "picture.html", 1200, dark=dark)
        assert browser.ask("document.body.dataset.mdColorScheme") == ("slate" if dark else "default")


@pytest.mark.slow
@needs_chromium
def test_every_page_fits_a_telephone(site: Path, browser: Browser) -> None:
    """Nothing is wider than the screen; wide tables, pictures and formulas scroll by themselves."""
    wide = {}
    for path in html(site):
        if path.name == "404.html":  # its links begin at the root of a server
            continue
        browser.open(path, 390, mobile=True)
        wide[path.name] = browser.ask("document.documentElement.scrollWidth") - 390
    assert {name: pixels for name, pixels in wide.items() if pixels > 0} == {}


@pytest.mark.slow
@needs_chromium
def test_a_wide_table_keeps_its_first_column_in_sight(site: Path, browser: Browser) -> None:
    browser.open(site / "mechanisms.html", 390, mobile=True)
    left = browser.ask(
        "(t => { t.closest('.md-typeset__scrollwrap').scrollLeft = 170;"
        " return [t.rows[1].cells[0].getBoundingClientRect().left, t.rows[1].cells[1].getBoundingClientRect().left] })"
        "([...document.querySelectorAll('article table')].find(t => t.textContent.includes('Tiny-ImageNet')))"
    )
    assert left[0] == pytest.approx(0, abs=1)
    assert left[1] < 110


def test_no_line_ends_within_an_option(site: Path) -> None:
    page = (site / "your-data.html").read_text("utf-8")
    assert '<code><span class="whole">--seeds</span> 3</code>' in page
    assert "<code>-" not in page
    assert ".whole { white-space: nowrap; }" in (site / "assets" / "site.css").read_text("utf-8")
