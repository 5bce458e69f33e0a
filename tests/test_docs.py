"README and pages are made from the notebooks, and say what the published files say."
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from prx_nb.lab import docs, report, results

ROOT = Path(__file__).parents[1]


def test_readme_is_the_index():
    made, written = docs.as_markdown(ROOT / "nbs" / "index.ipynb"), (ROOT / "README.md").read_text()
    assert made == written, "out of step: run `make docs`"


def test_readme_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / "README.md").read_text()):
        if not target.startswith(("http", "#")):
            assert (ROOT / target).exists(), target


def test_readme_shows_the_commands_first():
    text = (ROOT / "README.md").read_text()
    assert 0 < text.index("make ablate") < text.index("make test") < text.index("The first ablation") < text.index("Three ways in")


def test_published_result_is_read_from_its_files(tmp_path):
    assert "prx-nb ablate prediction_target" in docs.published("prediction_target", tmp_path).data
    home = results.pretend_runs(tmp_path)
    made = report.write_report(home).folder
    to = tmp_path / "published" / "prediction_target"
    to.mkdir(parents=True)
    rows = pd.read_csv(made / "table.csv")
    rows.drop(columns=list(results.COLUMNS[-5:])).to_csv(to / "table.csv", index=False)        # as older ones are
    (to / "report.md").write_text((made / "report.md").read_text().replace("| better |", "| better, it says |"))
    said = docs.published("prediction_target", tmp_path / "published").data
    assert "| better, it says |" in said and said.count("\n|") > 6 and "seconds a run" not in said, "the table is the report's, row by row"
    assert "](../outputs/published/prediction_target/samples.png)" in said and "FID 18.20 -> 16.80" in said
    rows.to_csv(to / "table.csv", index=False)
    said = docs.published("prediction_target", tmp_path / "published").data
    assert said.count("\n- ") == 2 and "better, it says" not in said and "All other comparisons: [report]" in said, "the declared answers only"


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [v for k, v in attrs if k == "href" and v]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    out = tmp_path_factory.mktemp("docs")
    for path in [ROOT / "nbs" / "index.ipynb", *docs.notebooks(ROOT)]:
        docs.write_page(path, ROOT, out)
    docs.index_page(ROOT, out)
    return out


def test_every_notebook_has_a_page_and_links_between_pages_hold(pages):
    broken = []
    for page in pages.rglob("*.html"):
        links = Links()
        links.feed(page.read_text())
        for target in links.found:
            target = target.split("#")[0]
            if target.endswith(".html") and "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(pages)} -> {target}")
    assert broken == []
    assert len(list(pages.rglob("*.html"))) == len(docs.notebooks(ROOT)) + 2


def test_pages_show_code_and_hide_directives(pages):
    text = (pages / "lab" / "02_ablations.html").read_text()
    assert "from_notebook" in text and "#| export" not in text and "#|" not in re.sub(r"<[^>]+>", "", text)


def test_formulas_are_drawn_without_a_network(pages):
    text = re.sub(r"<script.*?</script>", "", (pages / "core" / "13_flow.html").read_text(), flags=re.DOTALL)
    assert text.count("<math") > 20 and "$$" not in text and "\\alpha_t" not in re.sub(r"<annotation.*?</annotation>", "", text)
    for page in pages.rglob("*.html"):
        assert not re.search(r"<(script|link)[^>]+(src|href)=.https?:", page.read_text()), f"{page.name} loads something"
