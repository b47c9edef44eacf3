"""The report: what it shows, and that nothing that is written into a study becomes more than text."""

from __future__ import annotations

import base64
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from better_attention.lab.analysis.findings import Standing
from better_attention.lab.analysis.paired import Comparison
from better_attention.lab.analysis.study import AlignmentPicture, Study
from better_attention.lab.analysis.summary import COLUMNS, summarise
from better_attention.lab.files import plain
from better_attention.lab.report import gallery
from better_attention.lab.report import html as report
from better_attention.lab.report.charts import Points, Series, learning_curves, over_heads
from better_attention.lab.report.forest import forest
from better_attention.lab.report.html import render, write_report
from better_attention.lab.report.style import DARK, LIGHT, look
from helpers.browser import CHROMIUM, Browser
from helpers.studies import MECHANISMS, attention_map, curve, record, study

VOID = {"meta", "img", "source", "br", "hr", "input", "link"}


class Page(HTMLParser):
    """Tags, attributes and text of a page, as a browser would see them."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.pieces: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data!r}")

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).split())

    def values(self, tag: str, name: str) -> list[str]:
        return [value for t, n, value in self.attributes if (t, n) == (tag, name)]


CURVES: dict[str, bytes] = {}


@pytest.fixture(autouse=True)
def curves_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matplotlib takes most of the time of a page: equal curves are drawn once for all tests here."""

    def draw(runs: Mapping[str, Sequence[Series]], *, dark: bool, falling: bool) -> bytes:
        key = repr(([look(name) for name in runs], list(runs.values()), dark, falling))
        if key not in CURVES:
            CURVES[key] = learning_curves(runs, dark=dark, falling=falling)
        return CURVES[key]

    def draw_heads(runs: Mapping[str, Points], *, dark: bool) -> bytes:
        key = repr(([look(name) for name in runs], list(runs.values()), dark))
        if key not in CURVES:
            CURVES[key] = over_heads(runs, dark=dark)
        return CURVES[key]

    monkeypatch.setattr(gallery, "learning_curves", draw)
    monkeypatch.setattr(gallery, "over_heads", draw_heads)


@pytest.fixture(scope="module")
def benign() -> Page:
    """The page of a study without a payload, which no test changes."""
    return Page(render(study()))


# ---------------------------------------------------------------------------------------------------- payloads

PAYLOADS = (
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg onload=alert(1)>",
    "<svg><script href=https://x.example/a.js></script></svg>",
    '"><script>alert(1)</script>',
    "'><script>alert(1)</script>",
    '" onmouseover="alert(1)',
    "' onfocus='alert(1)' autofocus='",
    "` onload=`alert(1)",
    "javascript:alert(1)",
    "JaVaScRiPt:alert(1)",
    "java\tscript:alert(1)",
    "data:text/html,<script>alert(1)</script>",
    "<a href=javascript:alert(1)>x</a>",
    '<a href="https://x.example">x</a>',
    "<iframe src=https://x.example></iframe>",
    "<iframe srcdoc='<script>alert(1)</script>'>",
    "<object data=https://x.example></object>",
    "<embed src=https://x.example>",
    "<link rel=stylesheet href=https://x.example>",
    "<meta http-equiv=refresh content='0;url=https://x.example'>",
    "<base href=https://x.example>",
    "<style>*{background:url(https://x.example)}</style>",
    "</style><script>alert(1)</script>",
    "</title><script>alert(1)</script>",
    "</textarea></table></section><h1>x</h1>",
    "<form action=https://x.example><input></form>",
    "<!-- x",
    "--><script>alert(1)</script>",
    "<![CDATA[<script>alert(1)</script>]]>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "&#60;script&#62;alert(1)&#60;/script&#62;",
    "&#x3c;script&#x3e;",
    "{{7*7}}",
    "{% for x in ().__class__.__bases__ %}{% endfor %}{{ config }}",
    "${7*7} #{7*7} <%= 7*7 %>",
    "\u2028\u2029</script>\u202egnp.exe",
    "<scr\x00ipt>alert(1)</scr\x00ipt>",
    "\ud800<b>lone</b>\x1b[31m",
    "＜script＞alert(1)＜/script＞",
    "+ADw-script+AD4-alert(1)+ADw-/script+AD4-",
    "$\\frac{1}{0$ \\input{/etc/passwd}",
    "; background: url(https://x.example)",
)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_payload_in_every_field_is_text(benign: Page, payload: str) -> None:
    page = Page(render(study(payload, mechanism=payload)))
    assert page.tags == benign.tags
    assert Counter((t, n) for t, n, _ in page.attributes) == Counter((t, n) for t, n, _ in benign.attributes)
    assert_harmless(page)
    assert " ".join(plain(payload).split()) in page.text


def test_a_payload_as_mechanism_is_text_wherever_it_stands(benign: Page) -> None:
    name = "super<b>&\"'+per-head"
    page = Page(render(study(mechanism=name)))
    assert page.tags == benign.tags
    labels = [value for value in page.values("svg", "aria-label") if name in value]
    assert len(labels) == 4  # two metrics at two numbers of heads
    alternatives = [value for value in page.values("img", "alt") if name in value]
    assert len(alternatives) == 4  # curves, and results over heads, each for day and for night
    # findings, origin, results, forest, tests, ranks, legends, curves, maps, kernels, gaps
    assert page.text.count(name) > 15
    assert "b" not in page.tags - benign.tags


@pytest.mark.parametrize("payload", PAYLOADS)
def test_not_even_a_verdict_is_trusted(benign: Page, payload: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Comparison, "verdict", property(lambda self: payload))
    template = report._template()
    column = next(c for c in COLUMNS if c.key == "test_accuracy")
    rows = summarise(study().records)
    drawn = forest(rows, column)
    html = template.environment.get_template("differences.html").render(
        rows=rows, compared=[column], rank_columns=[column], forests=[drawn], fewest=2,
        standings=[Standing(payload, {"test_accuracy": 1.0}, 1.0, 2)], ranked_heads=[1, 4], more_seeds=None,
    )  # fmt: skip
    page = Page(html)
    assert_harmless(page)
    assert set(page.tags) <= set(benign.tags)
    assert len(page.values("svg", "aria-label")) == 4
    assert " ".join(plain(payload).split()) in page.text


def assert_harmless(page: Page) -> None:
    assert not {"script", "iframe", "object", "embed", "link", "base", "form"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if (tag, name) == ("a", "href"):
            # a section of the page, the folder of a run below it, or a paper: nothing that a study names
            assert re.fullmatch(r"#[a-z]+|[A-Za-z0-9_][\w.-]*/|https://arxiv\.org/abs/\d{4}\.\d{5}(v\d)?", value), value
        elif name in ("src", "srcset", "href", "action", "data", "xlink:href"):
            assert re.fullmatch(r"data:image/(png|svg\+xml);base64,[A-Za-z0-9+/=]+", value), (tag, name, value[:80])
        if name == "style":
            place, colours = r"(--(x|y|to):-?\d{1,3}\.\d\d;?)", r"--light:#[0-9a-f]{6};--dark:#[0-9a-f]{6}"
            assert re.fullmatch(rf"{place}*({colours})?|--share:[01]\.\d\d", value), value


def test_the_check_itself_sees_what_is_wrong() -> None:
    for wrong in (
        "<script>alert(1)</script>",
        "<p onclick=x>",
        "<img src=https://x.example/a.png>",
        "<img src=javascript:x>",
        "<a href=https://x.example>x</a>",
        "<a href=javascript:x>x</a>",
        "<a href=../../x/>x</a>",
        "<p style='background:url(https://x.example)'>",
    ):
        with pytest.raises(AssertionError):
            assert_harmless(Page(wrong.replace("<p ", "<img ")))


def test_the_policy_comes_first_and_forbids_everything_but_our_pictures(benign: Page) -> None:
    html = render(study())
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert benign.values("meta", "content")[0] == policy
    assert html.index("Content-Security-Policy") < html.index("<title>")


def test_no_address_outside_the_page() -> None:
    html = re.sub(r"data:image/[a-z+]+;base64,[A-Za-z0-9+/=]+", "", render(study()))
    assert "://" not in html.replace('<a href="https://arxiv.org/abs/', "")  # followed by a reader, never loaded
    assert "@import" not in html
    assert "url(" not in html


@pytest.mark.parametrize("field", ["title", "command", "note", "mechanism", "label", "token"])
def test_a_megabyte_is_cut(field: str) -> None:
    long = "<" + "x" * 999_999
    one = study(mechanism=long if field == "mechanism" else "super")
    changes: dict[str, object] = {
        "title": {"task": {**one.task, "title": long}},
        "command": {"command": long},
        "note": {"notes": [long]},
        "mechanism": {},
        "label": {"maps": [attention_map("super-h4-s0", label=long)]},
        "token": {"maps": [attention_map("super-h4-s0", picture=None, tokens=[long] * 9)]},
    }[field]  # type: ignore[assignment]
    html = render(replace(one, **changes))  # type: ignore[arg-type]
    assert len(html) < 500_000
    assert "xxx… (1,000,000 characters)" in html


# ------------------------------------------------------------------------------------------------------ what it shows


def whole(task: str = "mnist", seeds: int = 3, scale: str = "paper") -> Study:
    """Five mechanisms at one and four heads, every kind of curve."""
    keys = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy")
    names = [(name, h, s) for name in MECHANISMS for h in (1, 4) for s in range(seeds)]
    return replace(
        study(task=task, mechanism="super"),
        records=[record(name, s, h, task=task, scale=scale) for name, h, s in names],
        curves={f"{name}-h{h}-s{s}": curve(keys=keys) for name, h, s in names if (h, s) == (4, 0)},
    )


def test_the_tables_hold_the_numbers() -> None:
    page = Page(render(whole()))
    # 4 heads: accuracies 97.5, 98.5, 99.5; t(0.975, 2) = 4.303, so ± 2.48
    assert "super 4 heads 98.50 ± 2.48 0.00 ± 0.00 0.100 ± 0.025 3 4,224 30,000 1.35 ± 0.25" in page.text
    assert "super 4 heads 99.00 ± 0.00 0.030 ± 0.000" in page.text  # training, in a table of its own
    assert "super 4 heads 0.00 ± 0.00 (p 1.00) no difference shown" in page.text  # against standard, seed by seed
    assert "super 4 3 0.00 ± 0.00 1.00 1.00 1.00 0.00 no difference shown" in page.text
    assert "super 1.00 1.00 1.00 4" in page.text  # all equal: the first rank in every block
    assert "super 4 98.50 98.62 −0.12 0.100 0.051 +0.049 4,224 37,184 −32,960 99.00 96.96 +2.04" in page.text


def test_the_page_begins_with_which_mechanism_to_use_and_how_sure_that_is() -> None:
    runs = [record("standard", s, test_accuracy=90.0 + s, attention_params=4000) for s in (0, 1, 2)]
    noise = [record("super", s, test_accuracy=(91.5, 90.1, 92.9)[s], attention_params=2000) for s in (0, 1, 2)]
    html = render(replace(study(), records=runs + noise))
    text = Page(html).text
    start = text[text.index("</nav>") if "</nav>" in text else 0 :]
    assert (
        "Which mechanism should I use here? With 4 heads, no mechanism is shown to be better than standard. Super"
        in start
    )
    # A line a mechanism: difference, verdict, seeds that would decide, result, parameters, speed.
    line = re.search(
        r"super without W K and W V ; W A mixes .*? \+0\.50 ± 3\.10 no difference shown (\d+) 91\.50", text
    )
    assert line
    assert line.end() < text.index("Learning speed Lines")
    assert 3 < int(line[1]) < 1000
    assert "91.50 ± 3.48 2,000 (50 %)" in text
    assert "at the level 0.05 shows a true difference" in text
    points = [v for t, n, v in Page(html).attributes if (t, n) == ("i", "aria-label")]
    assert points == ["standard: 4,000 parameters, 91.00 ± 2.48", "super: 2,000 parameters, 91.50 ± 3.48"]


def test_the_speed_of_learning_in_words_and_in_numbers() -> None:
    text = Page(render(study("by a rule"))).text
    assert "Epochs until the validation accuracy reached 90.0 %: by a rule." in text
    # standard 3, 4, 5; the other one more than twice that: differences 1, 2 with 1 head, 1, 2, 3 with 4
    assert "custom(q+align) 4 heads 6.0 ± 5.0 1.5 ± 0.0 +2.0 ± 2.5 0.30 no difference shown 3 of 3 runs 4, 6, 8" in text
    assert "expressive is the first" not in text
    assert "With 4 heads, standard is the first to reach 90.0 % validation accuracy, after 4.0 epochs" in text


def test_contents_name_every_section_and_lead_there(benign: Page) -> None:
    inside = [href for tag, name, href in benign.attributes if (tag, name) == ("a", "href") and href.startswith("#")]
    ids = [value for tag, name, value in benign.attributes if (tag, name) == ("section", "id")]
    assert inside == [f"#{one}" for one in ids]
    assert benign.tags["section"] == len(ids) == benign.tags["h2"]
    assert ids[:3] == ["which", "speed", "results"]


def test_runs_lead_to_their_folders_and_nowhere_else() -> None:
    page = Page(render(study()))
    links = [href for href in page.values("a", "href") if href.endswith("/")]
    assert set(links) == {"standard-h4-s0/"}  # "plain words" and "../plain words" are no folders of runs
    assert len(links) == 2  # its epochs to the threshold, and its line among all runs
    assert "17 runs, each with its folder" in page.text
    assert "each with its folder" not in Page(render(replace(study(), folders={}))).text


def test_papers_are_linked(benign: Page) -> None:
    assert "https://arxiv.org/abs/2403.01643" in benign.values("a", "href")
    assert "https://arxiv.org/abs/2407.18601" in benign.values("a", "href")


def test_maps_are_folded_and_say_what_was_predicted() -> None:
    one = attention_map("super-h4-s0", label="test sample 3, class 7", predicted="1 (87 %)")
    page = Page(render(replace(study(), maps=[one, replace(one, run="standard-h4-s0", predicted="7 (99 %)")])))
    assert "super, 4 heads, seed 0 test sample 3, class 7; predicted: 1 (87 %) 9 positions layer 1" in page.text
    assert "standard, 4 heads, seed 0 test sample 3, class 7; predicted: 7 (99 %)" in page.text
    assert "blocks.0" not in page.text
    assert ("details", "open") not in {(tag, name) for tag, name, _ in page.attributes}  # closed until somebody asks


def test_what_training_changed_in_a_kernel_is_shown(benign: Page) -> None:
    assert "all heads, after training, ±" in benign.text
    assert "all heads, change, ±" in benign.text


def test_the_papers_table_is_there_where_the_paper_has_the_task() -> None:
    assert "Beside the paper" not in render(whole("digits"))
    text = Page(render(whole("mnist"))).text
    assert "Beside the paper" in text
    assert "table 5" in text
    assert "not the paper’s setting" not in text
    text = Page(render(whole("mnist", scale="small"))).text
    assert "Ours at scale “small”, which is not the paper’s setting" in text


def test_the_first_sentence_says_who_is_best_and_how_surely() -> None:
    runs = [record("standard", s, test_accuracy=90.0 + s) for s in (0, 1, 2)]
    clear = [record("super", s, test_accuracy=92.0 + s + s / 100) for s in (0, 1, 2)]
    page = Page(render(replace(study(), records=runs + clear)))
    assert (
        "With 4 heads, super has the highest test accuracy, 93.01 ± 2.51 % (3 seeds): +2.01 ± 0.02 points against "
        "standard, higher (p < 0.001, the only comparison)." in page.text.replace("\N{NO-BREAK SPACE}", " ")
    )
    noise = [record("super", s, test_accuracy=(91.5, 90.1, 92.9)[s]) for s in (0, 1, 2)]
    page = Page(render(replace(study(), records=runs + noise)))
    assert "no difference shown (p 0.56, the only comparison)" in page.text


def test_the_page_says_what_is_the_papers_and_what_is_ours() -> None:
    (found,) = re.findall(r'<p class="quiet" id="origin">(.*?)</p>', render(whole("mnist")))
    line = Page(found).text
    assert line.startswith("The task is that of arXiv 2403.01643 (table 5), what it leaves open is our choice;")
    assert line.endswith("Seeds, intervals, tests, speeds and pictures are ours.")
    assert "Its definition" not in line
    assert "its definition and its setting are our own" in Page(render(whole("recurrence"))).text


@pytest.mark.parametrize(("seeds", "least"), [(2, "0.5"), (3, "0.25"), (5, "0.0625")])
def test_the_reader_is_told_what_few_seeds_cannot_show(seeds: int, least: float) -> None:
    assert f"With {seeds} pairs Wilcoxon’s p cannot be below {least}" in Page(render(whole(seeds=seeds))).text


def test_notes_of_the_data_and_gaps_of_the_runs() -> None:
    page = Page(render(study("a note of the data")))
    assert "Notes a note of the data a second note custom(q+align) with 1 head lacks seed 2: its means" in page.text


@pytest.mark.parametrize(("share", "kind"), [(0.012, "fine"), (0.05, "flag")])
def test_waiting_for_data_is_shown_and_flagged(share: float, kind: str) -> None:
    html = render(replace(study(), records=[record(waiting_share=share)]))
    (found,) = re.findall(r'<dt>waiting for data</dt><dd class="(\w+)">at most ([\d.]+) % of a step', html)
    assert found == (kind, f"{100 * share:.1f}")
    assert "waiting for data" not in render(replace(study(), records=[record()]))


def test_what_is_drawn_of_many_heads(benign: Page) -> None:
    assert "8 of 12 heads are shown." in benign.text
    assert "8 of 12 kernels are shown." in benign.text


def test_sections_come_where_there_is_something_to_show() -> None:
    full = Page(render(study())).text
    for title in ("Differences to standard", "Ranks", "Number of heads", "Two scores over the angle", "Tests"):
        assert title in full
    alone = Page(render(replace(study(), records=[record("super", s) for s in (0, 1)]))).text
    for title in ("Differences to standard", "Ranks", "Number of heads", "Two scores over the angle", "Tests"):
        assert title not in alone


def test_the_forest_in_words_and_in_numbers() -> None:
    page = Page(render(whole()))
    labels = page.values("svg", "aria-label")
    assert len(labels) == 2 * 2 * 4  # metrics, numbers of heads, mechanisms beside standard
    assert labels[0] == "optimised, 1 head: 0.00 ± 0.00 (p 1.00), no difference shown"
    assert set(page.values("svg", "role")) == {"img"}
    dots = [value for tag, name, value in page.attributes if (tag, name) == ("line", "x1")]
    assert "50.0" in dots


@pytest.mark.parametrize(
    ("command", "again"),
    [
        ("better-attention compare mnist", "better-attention compare mnist --seeds 3"),
        ("better-attention compare mnist --seeds 1 --out x", "better-attention compare mnist --out x --seeds 3"),
        ("better-attention compare mnist --seeds=1", "better-attention compare mnist --seeds 3"),
    ],
)
def test_a_page_of_single_seeds_has_no_dashes_and_says_how_to_get_more(command: str, again: str) -> None:
    html = render(replace(whole("digits", seeds=1), command=command))
    page = Page(html)
    assert "± –" not in html
    assert "p –" not in html
    # Standard against itself: with 1 and with 4 heads, at a glance and in the table of differences.
    assert len(re.findall(r"<td[^>]*>–</td>", html)) == 2 * 2
    assert "Tests" not in page.text
    assert "super 4 heads 97.50 0.00" in page.text
    assert "Every mechanism has a single seed" in page.text
    assert f"Run again with 3 seeds: {again}" in page.text
    assert "higher in" not in page.text
    assert "single seed" not in Page(render(whole())).text


@pytest.mark.parametrize(("epochs", "drawn"), [(1, False), (2, True)])
def test_curves_of_one_epoch_are_left_out(epochs: int, drawn: bool) -> None:
    page = Page(render(replace(whole("digits"), curves={"super-h4-s0": curve(epochs)})))
    assert ("Learning curves" in page.text) is drawn


def test_the_best_are_marked_and_carry_no_rank() -> None:
    records = [record("standard"), record("super", test_accuracy=99.0)]
    html = render(replace(study(), records=records))
    assert '<td class="best">99.00</td>' in html
    assert '<td class="other">97.50</td>' in html
    assert "<small>(1)" not in html


def test_command_commit_setting_and_versions() -> None:
    one = replace(whole(), command="better-attention compare mnist --seeds 3", commit="f00dface")
    text = Page(render(one)).text
    for part in ("better-attention compare mnist --seeds 3", "f00dface", "torch 2.13.0", "train 1293", "lr 0.003"):
        assert part in text


def test_pictures_are_pictures_with_words_in_both_themes(benign: Page) -> None:
    assert all(benign.values("img", "alt"))
    assert len(benign.values("img", "alt")) == benign.tags["img"]
    addresses = benign.values("img", "src")
    kinds = Counter(address.partition(";")[0] for address in addresses)
    # a panel of curves, one over heads, two over the angle, each light and dark
    assert kinds["data:image/svg+xml"] == 8
    for address in addresses:
        content = base64.b64decode(address.partition(",")[2])
        if address.startswith("data:image/png"):
            Image.open(io.BytesIO(content)).verify()
        else:
            assert content.startswith(b"<?xml")
            assert b"<script" not in content
    assert [benign.values("img", "class").count(kind) for kind in ("day", "night")] == [4, 4]


def test_what_keeps_it_readable_by_everybody(benign: Page) -> None:
    assert benign.values("html", "lang") == ["en"]
    assert "width=device-width" in benign.values("meta", "content")[1]
    assert benign.tags["h1"] == 1
    assert set(benign.values("th", "scope")) <= {"col", "row", "colgroup"}
    scrolling = [v for v in benign.values("div", "class") if v == "scroll"]
    assert len(scrolling) == benign.tags["table"] == benign.values("div", "role").count("region")
    assert benign.values("div", "tabindex") == ["0"] * len(scrolling)  # can be scrolled by keyboard
    described = benign.values("table", "aria-describedby")
    assert set(described) <= set(benign.values("p", "id"))
    html = render(study())
    assert "prefers-color-scheme: dark" in html
    assert "color-scheme: light dark" in html


def test_runs_that_differ_in_length_or_diverged_are_shown() -> None:
    bad = [{"epoch": 1, "train_loss": float("nan")}, {"epoch": 2, "train_loss": float("inf")}]
    records = [record("standard"), record("super", test_accuracy=float("nan"), test_loss=float("inf"))]
    html = render(replace(study(), records=records, curves={"super-h4-s0": bad, "standard-h4-s0": curve(1)}))
    assert html.count(">diverged<") >= 2
    assert "nan" not in html.replace("nance", "")


def test_an_empty_study_is_a_page() -> None:
    page = Page(render(Study(task={}, records=(), curves={}, maps=(), alignments=(), command="", commit="unknown")))
    assert "No run has finished." in page.text
    assert "img" not in page.tags


def test_pages_stay_small_and_say_what_was_left_out(rng: np.random.Generator) -> None:
    noise = rng.random((16, 128, 128))
    maps = [attention_map("super-h16-s0", label=str(k), weights=noise, picture=None) for k in range(3)]
    alignments = [AlignmentPicture("super-h16-s0", "a", noise[0])]
    html = render(replace(study(), maps=maps, alignments=alignments), picture_room=400_000)
    assert len(html) < 470_000
    assert re.search(r"\d+ more pictures were left out to keep the page small", html)
    assert re.search(r"[1-7] of 16 heads are shown", html)
    assert 'class="matrix"' in html


def test_the_room_for_pictures_leaves_a_page_below_three_megabytes() -> None:
    assert report.PICTURE_ROOM < 3_000_000 - 500_000


def test_it_is_written_whole(tmp_path: Path) -> None:
    write_report(study(), tmp_path / "out" / "report.html")
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert html.startswith("<!DOCTYPE html>")
    assert html.rstrip().endswith("</html>")
    assert Page(html).open == []  # every tag is closed
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]


def test_equal_studies_are_equal_pages() -> None:
    assert render(study()) == render(study())


# ---------------------------------------------------------------------------------------------------------- a browser

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium is installed: no report is opened in a browser"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    one = Browser(tmp_path_factory.mktemp("profile"))
    yield one
    one.close()


@pytest.fixture
def page_file(tmp_path: Path) -> Path:
    """A report of five mechanisms at two numbers of heads, with maps, kernels and long names."""
    one = whole(seeds=2)
    long = "super+expressive+per-head+identity"
    records = [record(long, s, h, task="mnist", test_accuracy=98.0 + s * s) for s in (0, 1) for h in (1, 4)]
    write_report(replace(one, records=[*one.records, *records], notes=["x" * 300]), tmp_path / "report.html")
    return tmp_path / "report.html"


def seen(browser: Browser, selector: str) -> bool:
    """Whether an element is there, has a size, and lies within the width of the window."""
    box = browser.ask(
        f"(e => e && (b => [b.left, b.right, b.width, b.height, innerWidth])(e.getBoundingClientRect()))"
        f"(document.querySelector({selector!r}))"
    )
    return box is not None and box[0] >= 0 and box[1] <= box[4] and box[2] > 40 and box[3] > 10


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_shows_it_without_complaint(browser: Browser, page_file: Path, width: int, dark: bool) -> None:
    browser.open(page_file, width, dark=dark, mobile=width < 500)
    assert browser.ask("document.documentElement.scrollWidth") <= browser.ask("innerWidth") == width
    images, loaded = browser.ask("[document.images.length, [...document.images].filter(i => i.naturalWidth).length]")
    assert images == loaded > 10
    assert browser.complaints() == []  # where a policy's refusals and errors go
    assert browser.requests() == [page_file.as_uri()]
    for selector in (
        ".forest",
        ".forest svg",
        "[aria-label=Ranks]",
        "[aria-label=Ranks] td",
        "#origin",
        f".panels .{'night' if dark else 'day'}",
    ):
        assert seen(browser, selector), selector
    ground = browser.ask("getComputedStyle(document.documentElement).backgroundColor")
    assert ground == "rgb({}, {}, {})".format(*bytes.fromhex((DARK if dark else LIGHT).ground[1:]))
    shown = browser.ask(
        "[...document.querySelectorAll('.panels img')].filter(e => e.checkVisibility()).map(e => e.className)"
    )
    assert set(shown) == {"night" if dark else "day"}
    stroke = browser.ask("getComputedStyle(document.querySelector('.forest .dot')).stroke")
    assert stroke == "rgb({}, {}, {})".format(*bytes.fromhex(look("optimised").colour(dark=dark)[1:]))


@pytest.mark.slow
@needs_chromium
def test_a_browser_draws_the_forest_where_the_numbers_are(browser: Browser, tmp_path: Path) -> None:
    runs = [record("standard", s, test_accuracy=90.0 + s) for s in (0, 1, 2)]
    runs += [record("super", s, test_accuracy=92.0 + s + s / 10) for s in (0, 1, 2)]
    write_report(replace(study(), records=runs), tmp_path / "report.html")
    browser.open(tmp_path / "report.html", 1200)
    left, right, low, high, dot = browser.ask(
        "(s => { const b = s.getBoundingClientRect(), p = n => s.querySelector(n),"
        " x = (n, k) => b.left + b.width * p(n)[k].baseVal.value / 100;"
        " return [b.left, b.right, x('.line', 'x1'), x('.line', 'x2'), x('.dot', 'x1')] })"
        "(document.querySelector('.forest svg'))"
    )
    middle = (left + right) / 2
    assert middle < low < dot < high <= right  # 2.1 ± 0.25: right of zero
    assert dot == pytest.approx((low + high) / 2, abs=0.5)


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize(
    "payload", ["<script>document.title='owned'</script>", "<img src=x onerror=document.title='owned'>"]
)
def test_a_browser_runs_nothing(browser: Browser, tmp_path: Path, payload: str) -> None:
    write_report(study(payload, mechanism=payload), tmp_path / "report.html")
    browser.open(tmp_path / "report.html", 800)
    assert "owned" not in browser.ask("document.title").split("'")[0]
    assert browser.ask("document.scripts.length") == 0
    assert browser.complaints() == []
    assert browser.requests() == [(tmp_path / "report.html").as_uri()]


@pytest.mark.slow
@needs_chromium
def test_the_browser_itself_hears_complaints_and_requests(browser: Browser, tmp_path: Path) -> None:
    policy = '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'">'
    (tmp_path / "bad.html").write_text(f"{policy}<script>1</script>")
    browser.open(tmp_path / "bad.html", 800)
    assert browser.complaints()
    (tmp_path / "bad.html").write_text("<img src=other.png><p style='width:2000px'>x")
    browser.open(tmp_path / "bad.html", 800)
    assert [url.rpartition("/")[2] for url in browser.requests()] == ["bad.html", "other.png"]
    assert browser.ask("document.documentElement.scrollWidth") > 800


@pytest.mark.slow
@needs_chromium
def test_on_paper_it_is_complete_and_in_the_colours_of_day(browser: Browser, page_file: Path) -> None:
    browser.open(page_file, 1200, dark=True)
    browser.call(
        "Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}]
    )
    ink = browser.ask("getComputedStyle(document.documentElement).color")
    assert ink == "rgb({}, {}, {})".format(*bytes.fromhex(LIGHT.ink[1:]))
    assert [seen(browser, f".panels .{kind}") for kind in ("day", "night")] == [True, False]
    # Browsers leave out grounds on paper unless they are told that they mean something.
    assert browser.ask("getComputedStyle(document.querySelector('.point')).printColorAdjust") == "exact"
    heights = browser.ask(
        "[...document.querySelectorAll('details.paper table')].map(e => e.checkVisibility() && e.offsetHeight)"
    )
    assert len(heights) == 2
    assert all(height > 50 for height in heights)
    assert browser.ask("document.querySelectorAll('details[open]').length") == 0
    browser.call("Emulation.setEmulatedMedia", media="")


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize(
    ("width", "whole_table"), [(390, False), (1200, True), (1440, True)], ids=["390", "1200", "1440"]
)
def test_what_a_reader_came_for_is_seen_without_scrolling(
    browser: Browser, tmp_path: Path, width: int, whole_table: bool
) -> None:
    one = whole("digits")
    more = [record("super+expressive+per-head+identity", s, h, scale="paper") for s in range(3) for h in (1, 4)]
    runs = [{**run, "epoch_ratio": 0.9 + 0.1 * int(str(run["seed"])), "test_top5": 99.0} for run in one.records]
    one = replace(one, records=[*runs, *more])
    write_report(one, tmp_path / "report.html")
    browser.open(tmp_path / "report.html", width, mobile=width < 500)
    right, room, titles = browser.ask(
        "(h => [h[2].getBoundingClientRect().right, innerWidth, h.map(e => e.textContent)])"
        "([...document.querySelectorAll('[aria-label=Results] thead th')])"
    )
    assert titles[:3] == ["Mechanism", "Test acc. %", "− standard"]
    assert right <= room
    hidden = browser.ask(
        "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth)"
        ".map(e => e.getAttribute('aria-label'))"
    )
    assert not whole_table or hidden == []
    assert set(hidden) <= {"Results", "Training results", "Beside the paper"}  # Tests and Ranks are stacked
    browser.ask("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert browser.ask("document.documentElement.scrollWidth") <= room
