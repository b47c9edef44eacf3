"""The committed reports are of today's kind: the answer first, and no link that leads nowhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from helpers import CHECKOUT

REPORTS = sorted((CHECKOUT / "results").glob("*/report.html"))


@pytest.mark.skipif(not REPORTS, reason="the sdist has no results")
def test_every_study_has_a_report() -> None:
    studies = {path.parent for path in (CHECKOUT / "results").glob("*/results.json")}
    assert {path.parent for path in REPORTS} == studies


@pytest.mark.parametrize("page", REPORTS, ids=lambda path: path.parent.name)
def test_a_report_begins_with_the_answer_and_its_links_lead_somewhere(page: Path) -> None:
    text = page.read_text("utf-8")
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert titles[:3] == ["Which mechanism should I use here?", "Learning speed", "Results"], (
        f"python results/reports.py {page.parent.name}"
    )
    places = set(re.findall(r'id="([^"]+)"', text))
    links = [link for link in re.findall(r'<a href="([^"]+)"', text) if not link.startswith("https://arxiv.org/")]
    assert links
    assert [link for link in links if link.removeprefix("#") not in places] == []
