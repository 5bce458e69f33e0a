"README and pages are made from the notebooks, and say what the published files say."
import json
import os
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pandas as pd
import pytest

from prx_nb.lab import docs, overview, report, results

ROOT = Path(__file__).parents[1]


def test_readme_is_the_first_part_of_the_index():
    made, written = docs.as_markdown(ROOT / "nbs" / "index.ipynb", docs.EVERYTHING) + docs.MORE, (ROOT / "README.md").read_text()
    assert made == written, "out of step: run `make docs`"
    assert len(re.sub(r"<!--.*?-->", "", written).split()) < 900


@pytest.mark.parametrize("page,least", [("README.md", 11), ("nbs/index.ipynb", 100), ("nbs/results.ipynb", 11), ("nbs/usage.ipynb", 6)])
def test_links_lead_somewhere(page, least):
    text = (ROOT / page).read_text().replace('\\"', '"')
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<img [^>]*src="([^"]+)', text)
    assert len(found) >= least
    for target in found:
        if not target.startswith(("http", "#")):
            assert ((ROOT / page).parent / target.split("#")[0]).exists(), target


def test_readme_explains_a_word_before_it_uses_it_and_names_a_command_for_each_way_in():
    text = (ROOT / "README.md").read_text()
    assert 0 < text.index("The **error** is") < text.index("effect on the error") < text.index("make lab") < text.index("| minutes | what you do there |")
    for command in ("make lab", "make ablate", "from prx_nb.techniques", "--set data.source=folder", "mine/idea.ipynb"):
        assert text.count(command) >= 1, command
    assert not re.search(r"MMD|KID|FD\[", text)


def test_the_minutes_of_the_readme_are_those_of_the_published_runs():
    text, records = (ROOT / "README.md").read_text(), sorted((ROOT / "outputs/published/prediction_target/records").glob("*-s[012].json"))
    costs = [json.loads(path.read_text())["cost"] for path in records]
    two_at_a_time = int(re.search(r"`make ablate`: [^|]+\| (\d+) minutes", text)[1])
    assert two_at_a_time == round(sum(c["total_seconds"] for c in costs) / 60 / 2)
    minutes = {"plain": [], "best": []}
    for path in (ROOT / "outputs/published/best/records").glob("*.json"):
        run = json.loads(path.read_text())
        minutes.get(run["variant"], []).append(run["cost"]["train_seconds"] / 60)
    plain, best = (round(sum(m) / len(m)) for m in minutes.values())
    assert (plain, best) == (2, 4) and "about two minutes of training" in text and "(four minutes)" in text


def test_the_short_table_has_what_is_better_and_a_sentence_names_the_rest():
    text = (ROOT / "README.md").read_text()
    table, _, rest = text[text.index("| technique | effect"):text.index("[All results]")].partition("\n\n")
    rows = table.splitlines()[2:]
    assert rows and all("**better**" in row and row.count("|") == 4 for row in rows)
    paragraphs = dict(line.rstrip(".").split(": ", 1) for line in rest.strip().splitlines() if line)
    variants = {kind: [said for group in line.split("; ") for said in re.split(r", (?![+-])", re.split(r"\.md\) ?", group)[1])]
                for kind, line in paragraphs.items()}
    worse = variants["Worse than its baseline"]
    assert len(worse) > 5 and all(re.search(r"(^| )\+\d[\d.]*% \[\+[\d.]+%, \+[\d.]+%\]$", said) for said in worse), "each with its effect and interval"
    [call] = [c for c in json.loads((ROOT / "nbs/index.ipynb").read_text())["cells"] if re.search(r"\bin_short\(", "".join(c["source"]))]
    names = re.findall(r'"([\w@]+)"', "".join(call["source"]))
    assert len(rows) + sum(map(len, variants.values())) == len(overview.overview(ROOT / "outputs/published", names)), "none is left out"


def test_the_path_has_eight_stops_and_every_notebook_links_on_and_back():
    assert len(docs.stops(ROOT)) == 8
    order = [path for path in docs.way(ROOT) if path.name != "report_template.ipynb"]
    assert order[:8] == docs.stops(ROOT)
    for path in order:
        nb = json.loads(path.read_text())
        assert nb["cells"][-1] == docs.signpost(path, order, ROOT), f"{path.name}: run `make export`"
        assert sum("[The path](" in "".join(cell["source"][-1:]) for cell in nb["cells"]) == 1, f"{path.name} ends twice"
    for before, after in zip(order, order[1:]):
        assert os.path.relpath(after, before.parent) in docs.signpost(before, order, ROOT)["source"][1]


def test_ablations_lead_to_what_published_runs_drew_and_techniques_show_it():
    published = [path for path in (ROOT / "nbs/ablations").glob("*.ipynb") if [*(ROOT / "outputs/published" / path.stem).rglob("report.md")]]
    for path in (ROOT / "nbs/ablations").glob("*.ipynb"):
        line = json.loads(path.read_text())["cells"][-2]
        assert line == docs.published_line(path, ROOT), f"{path.name}: run `make export`"
        links = re.findall(r"\]\(([^)]+)\)", line["source"][0])
        assert bool(links) == (path in published) and all((path.parent / link).is_file() for link in links)
    assert len(published) > 10
    alone = {path.stem for path in (ROOT / "nbs/ablations").glob("*.ipynb")}         # others are a part of one
    for path in (path for path in (ROOT / "nbs/techniques").glob("*.ipynb") if path.stem[3:] in alone):
        shown = [o["data"]["text/markdown"] for c in json.loads(path.read_text())["cells"] if f'drawn("{path.stem[3:]}")' in "".join(c["source"])
                 for o in c["outputs"]]
        picture = re.search(r'src="([^"]+)"', "".join(shown[0]))
        assert len(shown) == 1 and bool(picture) == (ROOT / "outputs/published" / path.stem[3:] / "samples.png").is_file()
        assert picture is None or (path.parent / picture[1]).is_file()


def test_pictures_of_the_techniques_are_those_of_their_notebooks():
    for path in (ROOT / "nbs" / "techniques").glob("*.ipynb"):
        picture = ROOT / "nbs" / "pictures" / f"{path.stem}.png"
        assert picture.read_bytes() == docs._first_picture(path), f"{path.name}: run `make docs`"


def test_published_result_is_read_from_its_files(tmp_path):
    assert "prx-nb ablate prediction_target" in docs.published("prediction_target", tmp_path).data
    home = results.pretend_runs(tmp_path)
    made = report.write_report(home).folder
    to = tmp_path / "published" / "prediction_target"
    to.mkdir(parents=True)
    rows = pd.read_csv(made / "table.csv")
    rows.drop(columns=list(results.DECIDED)).to_csv(to / "table.csv", index=False)        # as older ones are
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
        self.found, self.pictures = [], []

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.found += [named[k] for k in ("href", "src") if named.get(k)]
        self.pictures += [named] if tag == "img" else []


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    docs.build(ROOT, out / "_docs", out / "work")
    return out / "_docs"


def read(page):
    links = Links()
    links.feed(page.read_text())
    return links


@pytest.mark.slow
def test_every_notebook_and_report_has_a_page_whose_links_and_pictures_are_there(site):
    for path in [*docs.way(ROOT), *(ROOT / "outputs/published").rglob("report.md")]:
        assert (site / path.relative_to(ROOT)).with_suffix(".html").exists(), path
    broken, silent = [], []
    for page in site.rglob("*.html"):
        links = read(page)
        broken += [f"{page.relative_to(site)} -> {t}" for t in links.found
                   if not re.match(r"[a-z]+:|#|//", t) and not (page.parent / unquote(t.split("#")[0].split("?")[0])).exists()]
        silent += [page.relative_to(site) for picture in links.pictures if not picture.get("alt")]
    assert broken == [] and silent == []


@pytest.mark.slow
def test_pages_need_no_network_and_show_formulas_and_no_directives(site):
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert not re.search(r"<(script|link|img)[^>]+(src|href)=.(https?:)?//", text), f"{page.name} loads something"
        assert not re.search(r"In(&nbsp;| )\[[\d ]*\]:|^#\| ", re.sub(r"<[^>]+>", "", text), re.M), page
    flow = (site / "nbs/core/13_flow.html").read_text()
    assert flow.count("<math") > 20 and "$$" not in flow and "\\alpha_t" not in re.sub(r"<annotation.*?</annotation>", "", flow)


@pytest.mark.slow
def test_pages_follow_the_path_and_a_second_build_makes_only_what_changed(site):
    first, second = docs.stops(ROOT)[:2]
    there = lambda path: Path(path.relative_to(ROOT)).with_suffix(".html")
    assert os.path.relpath(there(second), there(first).parent) in read(site / there(first)).found
    before = {p: p.stat().st_mtime_ns for p in (site.parent / "work" / "html").rglob("*.html")}
    begin = time.process_time()
    docs.build(ROOT, site, site.parent / "work")
    again = [p for p, when in before.items() if p.stat().st_mtime_ns != when]
    assert len(again) < 10 and time.process_time() - begin < 60, again


def test_own_notebooks_are_not_looked_at():
    assert not any("mine" in path.relative_to(ROOT).parts for path in docs.way(ROOT))
