"Reports from files: tables against a computation by hand, damaged and missing files, pages, publishing."
import json
import math
import shutil
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from prx_nb.lab import ablations, report, results

TOY = ablations.get("prediction_target")


def write_run(home, variant, seed, metrics, **more):
    folder = home / f"{variant}-s{seed}"
    folder.mkdir(parents=True)
    record = {"status": "done", "ablation": "prediction_target", "variant": variant, "preset": "smoke", "seed": seed, "recipe_key": "k",
              "metrics": metrics, "cost": {"train_seconds": 10.0, "total_seconds": 20.0 + seed}, "hardware": "h", "versions": {}, "git_commit": None}
    (folder / "record.json").write_text(json.dumps(record | more))
    (folder / "status.json").write_text(json.dumps({"state": "done"}))
    return folder


@pytest.fixture
def home(tmp_path):
    return results.pretend_runs(tmp_path)


def test_table_by_hand(tmp_path):
    rng = np.random.default_rng(0)
    v, x = rng.normal(2, 0.5, 4), rng.normal(1, 0.5, 4)
    for s in range(4):
        write_run(tmp_path, "v", s, {"FD[a]": v[s], "val": 1.0})
        write_run(tmp_path, "x", s, {"FD[a]": x[s], "val": 1.0})
    write_run(tmp_path, "x", 9, {"FD[a]": 3.0})                       # no partner: counts for the mean, not for the difference
    rows = results.table(results.collect(tmp_path), TOY).set_index(["metric", "variant"])
    ours, low_high = rows.loc[("FD[a]", "x")], stats.ttest_rel(x, v).confidence_interval()
    assert ours["mean"] == pytest.approx(np.mean([*x, 3.0])) and ours.seeds == 5 and ours.seconds == pytest.approx((20 + 21 + 22 + 23 + 29) / 5)
    assert ours.difference == pytest.approx((x - v).mean())
    assert (ours.difference_low, ours.difference_high) == pytest.approx((low_high.low, low_high.high))
    assert ours.verdict == ("better" if low_high.high < 0 else "worse" if low_high.low > 0 else "not distinguishable")
    assert rows.loc[("FD[a]", "v")].verdict == "baseline" and math.isnan(rows.loc[("FD[a]", "v")].difference)
    assert rows.loc[("val", "x")].verdict == "not distinguishable"


def test_direction_of_better(tmp_path):
    for s in range(3):
        write_run(tmp_path, "v", s, {"KID[a]": 1.0 + s, "retrieval@1[a]": 0.1 + s / 10})
        write_run(tmp_path, "eps", s, {"KID[a]": 1.5 + s + s / 100, "retrieval@1[a]": 0.3 + s / 10 + s / 1000})
    rows = results.table(results.collect(tmp_path), TOY).set_index(["metric", "variant"]).verdict
    assert rows[("KID[a]", "eps")] == "worse" and rows[("retrieval@1[a]", "eps")] == "better"
    said = results.sentences(results.table(results.collect(tmp_path), TOY), TOY)
    assert said == ["eps against v (3 seeds): worse on KID[a]; better on retrieval@1[a].",
                    "2 comparisons were made, each at 95%: about 0.1 would look like a difference by chance alone."]


def test_only_whole_finished_records_count(tmp_path):
    write_run(tmp_path, "v", 0, {"val": 1.0})
    write_run(tmp_path, "v", 1, {"val": 1.0}, status="running")
    (write_run(tmp_path, "v", 2, {"val": 1.0}) / "record.json").write_text('{"status": "done", "abl')
    shutil.copytree(tmp_path / "v-s0", tmp_path / ".replaced" / "v-s0")
    (tmp_path / "v-s1" / "status.json").write_text(json.dumps({"state": "timeout", "error": "stopped by the driver"}))
    assert list(results.collect(tmp_path).seed) == [0]
    assert results.unfinished(tmp_path) == [("v-s1", "timeout", "stopped by the driver")]


def test_what_cannot_be_reported_on(tmp_path):
    with pytest.raises(results.ReportError, match="no finished run in .*prx-nb ablate"):
        results.collect(tmp_path)
    write_run(tmp_path, "v", 0, {})
    write_run(tmp_path, "x", 0, {}, preset="gpu")
    with pytest.raises(results.ReportError, match="mixes runs of"):
        results.collect(tmp_path)


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.images, self.outside, self.open = [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "img":
            self.images.append(attrs)
        self.outside += [v for k, v in attrs.items() if k in ("src", "href") and not v.startswith("data:")]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_pages_hold_all_and_need_nothing_else(home):
    made = report.write_report(home, TOY)
    assert list(pd.read_csv(made / "table.csv").columns) == list(report.COLUMNS)
    page = Page()
    page.feed((made / "report.html").read_text())
    assert page.open == [] and page.outside == [] and len(page.images) == 3 and all(i["alt"] for i in page.images)
    text = (made / "report.md").read_text()
    for word in ("FID 18.20 -> 16.80", "prx-nb ablate prediction_target --preset smoke --seeds 3", "retrieval@1[invented]", "](samples.png)"):
        assert word in text
    assert all((made / f"{n}.png").stat().st_size > 5000 for n in ("samples", "metrics", "curves"))


def test_a_report_stands_without_samples_and_curves_and_names_failures(home):
    for path in [*home.rglob("samples.safetensors"), *home.rglob("curves.parquet")]:
        path.unlink()
    (home / "v-s2" / "status.json").write_text(json.dumps({"state": "dead kernel", "error": "Kernel <died>"}))
    made = report.write_report(home, TOY)
    assert not (made / "samples.png").exists() and "dead kernel. Kernel &lt;died&gt;" in (made / "report.html").read_text()


def test_differing_hardware_is_said(tmp_path):
    write_run(tmp_path, "v", 0, {"val": 1.0})
    write_run(tmp_path, "x", 0, {"val": 1.0}, hardware="another")
    assert "hardware differs between runs" in (report.write_report(tmp_path, TOY) / "report.md").read_text()


def test_publishing_copies_what_is_small_and_keeps_the_notice(home, tmp_path):
    with pytest.raises(results.ReportError, match="no report in"):
        report.publish("prediction_target", "smoke", tmp_path)
    report.write_report(home, TOY)
    notice = tmp_path / "published" / "NOTICE"
    notice.parent.mkdir()
    notice.write_text("Drawings by somebody.\n")
    to = report.publish("prediction_target", "smoke", tmp_path)
    names = {p.relative_to(to).as_posix() for p in to.rglob("*") if p.is_file()}
    assert {"table.csv", "report.md", "samples.png", "curves.png", "metrics.png", "records/v-s0.json"} <= names
    assert not any("parquet" in n or "safetensors" in n for n in names)
    assert notice.read_text().startswith("Drawings by somebody.")


@pytest.mark.slow
def test_the_report_notebook_runs_and_says_why_it_fails(home, tmp_path, monkeypatch):
    made = report.make_report("prediction_target", "smoke", tmp_path)
    assert (made / "report.ipynb").exists() and (made / "report.html").stat().st_size > 10_000
    monkeypatch.setattr(report, "collect", lambda folder: None)
    (home / "v-s0" / "record.json").write_text("{")
    for run in home.glob("*-s*"):
        (run / "record.json").unlink()
    with pytest.raises(results.ReportError, match="the report notebook failed: .*no finished run"):
        report.make_report("prediction_target", "smoke", tmp_path)
