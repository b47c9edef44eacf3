"""The page of an inspection: what it says, that nothing in it runs, and how a reader moves about in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from better_attention.lab.analysis.study import AlignmentPicture
from better_attention.lab.inspection import page
from better_attention.lab.inspection.inspection import Inspection, LayerMaps, Sample, entropy
from better_attention.lab.report.style import DARK, LIGHT
from helpers.browser import CHROMIUM, Browser
from helpers.studies import attention_map

NAMES = ("blocks.0.attention", "blocks.1.attention")


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.pieces: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).split())

    def all(self, tag: str, **wanted: str) -> list[dict[str, str]]:
        return [a for t, a in self.tags if t == tag and all(a.get(k) == v for k, v in wanted.items())]


def layer(name: str, heads: int, own: str, **changes: Any) -> LayerMaps:
    """Both scores, with weights that differ."""
    one = attention_map("any", heads, layer=name, **changes)
    weights = one.weights**2 / (one.weights**2).sum(axis=-1, keepdims=True)
    return LayerMaps(name, own, {"softmax": one, "expressive": replace(one, weights=weights)})


def inspection(text: str = "plain words", heads: int = 2, own: str = "softmax", samples: int = 2) -> Inspection:
    """Pictures first, then a text; W_A in one layer."""
    picture = attention_map("any").picture
    views = [
        Sample(f"{text} {k}", [layer(n, heads, own, picture=picture) for n in NAMES], text, picture)
        for k in range(samples)
    ]
    words = {"picture": None, "tokens": [f"{text}-{k}" for k in range(9)]}
    views.append(Sample(f"a text: {text}", [layer(text, heads, own, **words)], text))
    kernel = AlignmentPicture("any", text, np.random.default_rng(2).normal(size=(9, 9)))
    return Inspection(text, {text: text}, views, [kernel])


def test_every_head_of_every_layer_is_there_with_its_entropy_and_both_scores() -> None:
    found = inspection(own="expressive")
    shown = Page(page.render(found))
    assert len(shown.all("input", type="radio")) == (2 + 2 + 1) * 2
    assert sum("checked" in a for a in shown.all("input")) == 3  # one for each sample
    one = found.samples[0].layers[1].maps["expressive"]
    (bits,) = entropy(one.weights[1:])
    label = f"layer 2, head 2, entropy {bits:.1f} bits"
    assert [a["aria-label"] for a in shown.all("input", name="sample-1")][3] == label
    described = [a["aria-label"] for a in shown.all("div", role="img") if "layer 2, head 2, " in a["aria-label"]]
    assert [words.split(":")[0].rpartition(", ")[2] for words in described[:2]] == ["expressive", "softmax"]
    assert f"the greatest {one.weights[1].max():.2g}" in described[0]
    assert "expressive (the model’s)" in shown.text
    assert "softmax (the model’s)" not in shown.text


def test_tokens_carry_what_they_receive_and_queries_their_strongest_key() -> None:
    found = inspection("w")
    shown = Page(page.render(found))
    one = found.samples[-1].layers[0].maps["softmax"]
    received = one.weights[0].mean(axis=0)
    shares = [a["style"] for a in shown.all("mark")][:9]
    assert shares == [f"--share:{share:.2f}" for share in received / received.max()]
    row = one.weights[0][3]
    assert f"w-3 w-{row.argmax()} {row.max():.2f}" in shown.text


def test_the_spread_is_the_mean_over_the_samples() -> None:
    found = inspection(samples=2)
    shown = Page(page.render(found))
    values = [entropy(s.layers[0].maps["softmax"].weights)[1] / np.log2(9) for s in found.samples[:2]]
    cells = [a["style"] for a in shown.all("td") if "spread" in a.get("class", "")]
    assert cells[1] == f"--share:{np.mean(values):.2f}"
    assert len(cells) == (2 + 1) * 2


def test_more_than_there_is_room_for_is_left_out_and_counted() -> None:
    whole = page.render(inspection(heads=8))
    assert "found no room" not in whole
    small = page.render(inspection(heads=8), room=len(whole) // 4)
    assert "heads or kernels found no room" in Page(small).text
    assert len(small) < len(whole) / 1.5


@pytest.mark.parametrize(
    "payload",
    ["<script>document.title='owned'</script>", "<img src=x onerror=alert(1)>", "');}</style><b>", '" onclick="x'],
)
def test_text_never_becomes_markup(payload: str) -> None:
    html = page.render(inspection(payload))
    plain, hostile = Page(page.render(inspection())), Page(html)
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in plain.tags]
    assert [sorted(attributes) for _, attributes in hostile.tags] == [sorted(a) for _, a in plain.tags]
    assert payload in hostile.text
    assert not hostile.all("script")


def test_it_needs_nothing_from_outside() -> None:
    shown = Page(page.render(inspection()))
    addresses = [a[name] for _, a in shown.tags for name in ("src", "href", "srcset") if name in a]
    assert all(address.startswith(("data:", "#")) for address in addresses)
    (policy,) = [a["content"] for a in shown.all("meta") if "http-equiv" in a]
    assert policy.startswith("default-src 'none'")


def test_a_page_of_ours_is_known_and_another_is_not(tmp_path: Path) -> None:
    page.write_page(inspection(), tmp_path / "a.html")
    assert page.is_ours((tmp_path / "a.html").read_bytes())
    assert not page.is_ours(b"<!DOCTYPE html><title>my notes on better-attention inspect</title>")


# ---------------------------------------------------------------------------------------------------------- a browser

BROWSER_MARKS = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed: no page is opened in a browser"),
]


def in_browser(test: Any) -> Any:
    for mark in BROWSER_MARKS:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    one = Browser(tmp_path_factory.mktemp("profile"))
    yield one
    one.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Two pictures and a text in layers of twelve heads, as a large model has, with long names."""
    page.write_page(inspection("encoder.layer.11.attention.self", heads=12), tmp_path / "page.html")
    return tmp_path / "page.html"


def details(browser: Browser) -> list[str]:
    """The headings of what is open, sample by sample."""
    found: list[str] = browser.ask(
        "[...document.querySelectorAll('.detail')].filter(d => d.getClientRects().length)"
        ".map(d => d.querySelector('h4').innerText)"
    )
    return found


def centre(browser: Browser, selector: str) -> tuple[float, float]:
    """The middle of an element, scrolled into view."""
    x, y = browser.ask(
        f"(e => {{ e.scrollIntoView({{block: 'center'}}); const b = e.getBoundingClientRect();"
        f" return [b.x + b.width / 2, b.y + b.height / 2] }})(document.querySelector({selector!r}))"
    )
    return x, y


def press(browser: Browser, key: str) -> None:
    for kind in ("rawKeyDown", "keyUp"):
        code = {"Tab": 9, "ArrowRight": 39, "ArrowLeft": 37}[key]
        browser.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)


def nth(layer: int, head: int, sample: int = 1) -> str:
    return f".explorer:nth-of-type({2 * sample}) .layer:nth-child({layer}) .cell:nth-child({head + 1}) label"


@in_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_it_without_complaint(browser: Browser, file: Path, width: int, dark: bool) -> None:
    browser.open(file, width, dark=dark, mobile=width < 500)
    assert browser.ask("document.documentElement.scrollWidth") <= browser.ask("innerWidth") == width
    assert browser.complaints() == []
    assert browser.requests() == [file.as_uri()]
    ground = browser.ask("getComputedStyle(document.documentElement).backgroundColor")
    assert ground == "rgb({}, {}, {})".format(*bytes.fromhex((DARK if dark else LIGHT).ground[1:]))
    drawn = browser.ask(
        "[...document.querySelectorAll('.map')].filter(e => e.getClientRects().length)"
        ".map(e => [getComputedStyle(e).backgroundImage.split('base64')[0], e.getBoundingClientRect().width])"
    )
    assert {address for address, _ in drawn} == {'url("data:image/png;'}
    assert min(wide for _, wide in drawn) >= 24  # a finger, a pointer: WCAG 2.5.8
    assert len(details(browser)) == 3


@in_browser
def test_a_click_opens_a_head_beside_the_others_of_its_sample(browser: Browser, file: Path) -> None:
    browser.open(file, 1200)
    before = details(browser)
    x, y = centre(browser, nth(2, 5))
    for kind in ("mousePressed", "mouseReleased"):
        browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
    assert details(browser) == ["layer 2, head 5", *before[1:]]
    thumb, opened = browser.ask(
        f"[document.querySelector({nth(2, 5)!r}), document.querySelector({nth(2, 5)!r}).nextElementSibling]"
        ".map(e => (b => [b.left, b.right, b.top])(e.getBoundingClientRect()))"
    )
    assert opened[0] >= thumb[1]  # on the right of it
    assert opened[1] <= 1200
    own, other = browser.ask(
        f"[...document.querySelector({nth(2, 5)!r}).nextElementSibling.querySelectorAll('figure')]"
        ".map(f => [f.querySelector('b').innerText, getComputedStyle(f.querySelector('.map')).backgroundImage])"
    )
    assert (own[0], other[0]) == ("softmax", "expressive")
    assert own[1] != other[1]


@in_browser
def test_the_keyboard_walks_over_the_heads(browser: Browser, file: Path) -> None:
    browser.open(file, 1200)
    browser.ask("document.querySelector('#maps').setAttribute('tabindex', -1); document.querySelector('#maps').focus()")
    press(browser, "Tab")
    assert browser.ask("document.activeElement.type") == "radio"
    outline = browser.ask("getComputedStyle(document.querySelector('label:has(:focus-visible) .map')).outlineStyle")
    assert outline == "solid"
    for _ in range(13):
        press(browser, "ArrowRight")
    assert details(browser)[0] == "layer 2, head 2"  # from the last head of a layer to the first of the next
    press(browser, "ArrowLeft")
    assert details(browser)[0] == "layer 2, head 1"
    press(browser, "Tab")
    assert browser.ask("document.activeElement.name") == "sample-2"


@in_browser
def test_a_tap_on_a_phone_opens_a_head_below_its_layer(browser: Browser, file: Path) -> None:
    browser.open(file, 390, mobile=True)
    browser.call("Emulation.setTouchEmulationEnabled", enabled=True)
    x, y = centre(browser, nth(1, 11))
    browser.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
    browser.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    browser.call("Emulation.setTouchEmulationEnabled", enabled=False)
    assert details(browser)[0] == "layer 1, head 11"
    boxes = browser.ask(
        f"(d => [document.querySelector({nth(1, 12)!r}), d, document.querySelector({nth(2, 1)!r})]"
        ".map(e => (b => [b.top, b.bottom])(e.getBoundingClientRect())))"
        f"(document.querySelector({nth(1, 11)!r}).nextElementSibling)"
    )
    (_, last_head), (top, bottom), (next_layer, _) = boxes
    figures = browser.ask("[...document.querySelectorAll('figure')].map(f => f.getBoundingClientRect().right)")
    assert last_head <= top < bottom <= next_layer
    assert max(figures) <= 390
    assert browser.ask("document.documentElement.scrollWidth") <= 390
