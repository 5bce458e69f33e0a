"Pages: one list of parts as Markdown and as HTML that needs nothing else, whatever words come in."
import base64
import io
import re
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from PIL import Image

from prx_nb.lab.page import Link, Page, as_html, markdown, show

HOSTILE = '<script>alert("1")</script> "quoted" \'single\' & | pipe ` tick ``` **b** ![x](http://evil.example/a.png) </details>'
VOID = ("img", "meta", "br")


class Reader(HTMLParser):
    "Tags in balance, images, links, text by tag."

    def __init__(self, text):
        super().__init__()
        self.images, self.links, self.open, self.tags, self.words = [], [], [], [], {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        assert not any(name.startswith("on") or (name == "style") for name in attrs), attrs
        if tag == "img":
            self.images.append(attrs)
        self.links += [v for k, v in attrs.items() if k in ("href", "src", "srcset", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.words.setdefault(self.open[-1], []).append(data)


@pytest.fixture
def page(tmp_path):
    made = Page(tmp_path, HOSTILE)
    made.text(HOSTILE)
    for kind in ("h2", "h3", "li", "li", "code", "small", "warn"):
        made.text(HOSTILE + ("\n```\n<script>" if kind == "code" else ""), kind)
    made.frame(pd.DataFrame({HOSTILE: [HOSTILE, "a\nb"], "verdict": ["better", HOSTILE], "n": [1, None]}, dtype=object), HOSTILE, cards=True)
    fig = plt.figure(figsize=(2, 1))
    made.figures((fig, "figure", HOSTILE))
    with made.folded(HOSTILE):
        made.text(HOSTILE, "li")
    return made


def test_hostile_words_stay_words_in_html(page):
    text = as_html(page)
    read = Reader(text)
    assert "script" not in read.tags and read.tags.count("details") == 1 and all(link.startswith(("#", "data:image/png;base64,")) for link in read.links)
    shown = "".join(w for words in read.words.values() for w in words)
    assert shown.count('<script>alert("1")</script>') >= 12
    assert read.images[0]["alt"] == HOSTILE and read.tags.count("ul") == 2 and read.tags.count("li") == 3
    assert not re.search(r"@import|url\(|<link|<iframe|<object", text)


def test_hostile_words_stay_words_in_markdown(page):
    text = markdown(page)
    outside = re.sub(r"```.*?\n```|`[^`\n]*`", "", text, flags=re.DOTALL)
    assert "<script" not in outside and outside.count("<details>") == outside.count("</details>") == 1
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4 and {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {4} and "a<br>b" in rows[3]
    fences = [line for line in text.splitlines() if line.startswith("```")]
    assert fences == ["```", "```"]


def test_the_same_parts_in_both(tmp_path):
    page = Page(tmp_path, "T")
    page.text("Some `code` and **strong**.")
    page.frame(pd.DataFrame({"a": ["x"], "b": [Link("see", "my runs/a=1,b@2/report.html")]}, dtype=object), "about")
    page.frame(pd.DataFrame({"a": []}), "nothing in it")
    text, read = markdown(page), Reader(as_html(page))
    assert "<code>code</code> and <strong>strong</strong>" in as_html(page) and "`code` and **strong**" in text
    assert "[see](my%20runs/a%3D1%2Cb%402/report.html)" in text and read.links == ["my%20runs/a%3D1%2Cb%402/report.html"]
    assert read.tags.count("table") == 1 and read.words["caption"] == ["about"]


def test_verdicts_are_words_and_headings_can_be_reached(tmp_path):
    page = Page(tmp_path, "T")
    page.text("Runs & more", "h2")
    page.frame(pd.DataFrame({"variant": ["x", "eps"], "metric": ["m", "m"], "verdict": ["better", "not distinguishable"]}), "all", cards=True)
    text = as_html(page)
    assert '<a href="#runs-more">' in text and '<h2 id="runs-more">' in text
    assert 'class="better">better</td>' in text and 'data-name="verdict">not distinguishable</td>' in text
    assert text.count('scope="col"') == 3 and text.count('scope="row"') == 2 and text.count("class=next") == 1


def test_figures_are_small_and_left_out_when_there_is_none(tmp_path):
    page = Page(tmp_path, "T")
    fig, ax = plt.subplots(figsize=(4, 3))
    ax.plot([1, 2, 3])
    page.figures((fig, "a", "A line"), (None, "b", "nothing"))
    page.figures((None, "c", "nothing"))
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"] and len(page.parts) == 1 and not plt.fignum_exists(fig.number)
    read = Reader(as_html(page))
    picture = Image.open(io.BytesIO(base64.b64decode(read.images[0]["src"].partition(",")[2])))
    assert picture.size == (520, 390) and picture.mode == "P" and (tmp_path / "a.png").stat().st_size < 20_000


def test_an_empty_fold_leaves_nothing_and_sections_are_found(tmp_path):
    page = Page(tmp_path, "T")
    page.text("One", "h2")
    page.text("first")
    with page.folded("empty"):
        page.frame(pd.DataFrame({"a": []}), "nothing")
    page.text("Two", "h2")
    page.text("second")
    assert "details" not in as_html(page).split("<main>")[1] and page.section("One").parts == [("p", "first")]
    assert page.section("Two").parts == [("p", "second")] and page.section("Three").parts == []


def test_a_notebook_shows_words_and_pictures_but_not_what_is_folded(tmp_path, monkeypatch):
    import IPython.display as ipython
    shown = []
    monkeypatch.setattr(ipython, "display", shown.append)
    page = Page(tmp_path, "T")
    page.text("before")
    page.figures((plt.figure(figsize=(20, 2)), "a", "wide"))
    with page.folded("more"):
        page.text("hidden")
        page.figures((plt.figure(figsize=(2, 2)), "b", "hidden"))
    page.text("after")
    show(page)
    assert [type(s).__name__ for s in shown] == ["Markdown", "Image", "Markdown"] and Image.open(io.BytesIO(shown[1].data)).width == 420
    assert "before" in shown[0].data and "after" in shown[2].data and "hidden" not in shown[2].data
