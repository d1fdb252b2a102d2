"""Pages: one file, nothing fetched, nothing executed, every number there."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from sdclr.report import page


class Tags(HTMLParser):
    """Notes every tag with its attributes, and checks that they close in order."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, text: str):
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


RESULT: dict[str, Any] = {
    "verdict": "conclusive", "reasons": [], "reference": {"lr": 2e-5, "steps": 900},
    "gain": {"mean": 0.12, "low": 0.08, "high": 0.16, "agreement": 1.0, "images": 4, "base_loss": 0.2},
    "ceiling": {"lr": 2.3e-4, "bracket": [1e-4, 3.2e-4]}, "best_exposure": {"value": 0.0123, "interval": [0.0101, 0.0156], "lr": 2e-5},
    "recommended": {"policy": "triangular", "base_lr": 0.0, "max_lr": 1.15e-4, "steps": 214, "cycles": 4,
        "config": {"schedule": {"policy": "triangular", "max_lr": 1.15e-4, "cycles": 4}, "train": {"steps": 214}},
    },
    "arms": [{"lr": 1e-4, "steps": 60, "excess": 0.021, "low": -0.01, "high": 0.052, "ragged": 0.03, "verdict": "admissible"},
             {"lr": 1e-2, "steps": 3, "excess": None, "low": None, "high": None, "ragged": None, "verdict": "inadmissible"}],
    "cost": {"train_steps": 1234, "validation_forwards": 5678, "seconds": 90.4},
}  # fmt: skip


def test_a_page_is_well_formed_and_holds_every_part_of_a_section():
    text = page.render(
        "Title",
        "the lead",
        [{"title": "One", "text": "words", "header": ("a", "b"), "rows": [(1, "x")], "code": "k: 1"}],
    )
    tags = Tags(text)
    assert tags.open == []
    assert text.startswith("<!doctype html>")
    for words in ("Title", "the lead", "One", "words", "k: 1"):
        assert words in tags.text
    assert [tag for tag, _ in tags.seen].count("td") == 2
    assert [tag for tag, _ in tags.seen].count("th") == 2


def test_a_picture_is_inside_the_page_bit_for_bit():
    picture = bytes(range(256))
    tags = Tags(page.render("t", "", [{"title": "p", "picture": picture}]))
    (source,) = [attributes["src"] for tag, attributes in tags.seen if tag == "img"]
    assert source is not None
    prefix, _, data = source.partition(",")
    assert prefix == "data:image/png;base64"
    assert base64.b64decode(data, validate=True) == picture


def test_nothing_is_fetched_and_nothing_is_executed():
    text = page.range_test("run", RESULT, b"png")
    tags = Tags(text)
    assert not {tag for tag, _ in tags.seen} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert not re.search(r"https?://|url\(|@import|javascript:", text)
    assert all(not name.startswith("on") for _, attributes in tags.seen for name in attributes)


@pytest.mark.parametrize(
    "hostile", ["<script>alert(1)</script>", '"><img src=x onerror=y>', "a & b < c", "</pre>{{ 7 * 7 }}"]
)
def test_text_of_users_stays_text_wherever_it_stands(hostile):
    section = {
        "title": hostile,
        "text": hostile,
        "header": (hostile,),
        "rows": [(hostile,)],
        "code": hostile,
        "picture": b"x",
    }
    tags = Tags(page.render(hostile, hostile, [section]))
    assert tags.text.count(hostile) == 8
    assert {tag for tag, _ in tags.seen} == {
        "html", "head", "meta", "title", "style", "body", "h1", "p", "h2", "img", "div", "table", "tr", "th", "td", "pre",
    }  # fmt: skip
    assert all(attributes.get("src", "data:").startswith("data:") for _, attributes in tags.seen)


def test_the_range_tests_page_says_the_answer_each_arm_and_the_cost():
    text = Tags(page.range_test("mochi", RESULT, b"png")).text
    for words in (
        "Range test of mochi", "about 0.00023 (between 0.0001 and 0.00032)", "an exposure of 0.012 (0.01 to 0.016)",
        "policy: triangular", "max_lr: 0.000115", "cycles: 4", "steps: 214", "1.00e-04", "+2.1%", "-1.0% … +5.2%", "inadmissible", "1234 train steps",
        "5678 validation forwards", "90 seconds",
    ):  # fmt: skip
        assert words in text


def test_an_inconclusive_page_gives_every_reason_with_its_remedy_and_no_recommendation():
    reasons = [{"text": "no gain was seen", "remedy": "more images"}, {"text": "too short", "remedy": "max_steps"}]
    none = {"ceiling": None, "best_exposure": None, "recommended": None, "arms": []}
    text = Tags(page.range_test("mochi", RESULT | none | {"verdict": "inconclusive", "reasons": reasons}, b"png")).text
    assert "Inconclusive: no gain was seen; too short." in text
    for words in ("Why it cannot say", "more images", "max_steps"):
        assert words in text
    assert "What follows" not in text
