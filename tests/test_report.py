"Reports as files: what a page says, a page over a sweep, the report notebook, publishing."
import json
import math
import re
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from scipy import stats
from test_page import Reader

from prx_nb.lab import ablations, figures, report, results

TOY = ablations.get("prediction_target")


@pytest.fixture
def home(tmp_path):
    return results.pretend_runs(tmp_path)


def change(path, **more):
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def test_pages_hold_all_and_need_nothing_else(home):
    page = report.write_report(home)
    made = home / "report"
    assert page.folder == made and list(pd.read_csv(made / "table.csv").columns) == list(results.COLUMNS)
    assert {"variant", "total_seconds", "flops", "energy_joules"} <= set(pd.read_csv(made / "cost.csv").columns)
    text = (made / "report.html").read_text()
    read = Reader(text)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in read.links), "nothing from elsewhere"
    assert len(read.images) == 11 and all(len(i["alt"]) > 20 for i in read.images) and 'name="viewport"' in text
    words = (made / "report.md").read_text()
    for word in ("FID 18.20 -> 16.80", "prx-nb ablate prediction_target --preset smoke --variants v,x --seeds 3", "retrieval@1[invented]", "](samples.png)",
                 "not measured here", "not calibrated"):
        assert word in words, word
    titles = re.findall(r"^## (.+)$", words, re.M)
    assert titles == ["Verdict", "Samples", "How it was sampled", "Results", "Curves", "Cost", "Runs", "How to make it again"]
    assert words.index("| variant | metric |") < words.index("## Samples") and all(f"{n}.png" in words for n in ("curves", "curves-seconds", "pareto", "metrics"))


def test_the_table_on_the_page_is_the_table_in_the_file(home):
    report.write_report(home)
    rows = pd.read_csv(home / "report" / "table.csv").set_index(["metric", "variant"])
    line = next(line for line in (home / "report" / "report.md").read_text().splitlines() if line.startswith("| eps | FD[invented]"))
    r = rows.loc[("FD[invented]", "eps")]
    assert results.in_words(r.difference, r.difference_low, r.difference_high, "+") in line and f"| {r.verdict} |" in line


def test_a_report_stands_on_whatever_is_left_and_names_failures(home):
    for path in [*home.rglob("samples.safetensors"), *home.rglob("curves.parquet"), *home.rglob("recipe.json"), *home.rglob("job.json")]:
        path.unlink()
    (home / "x-s0" / "samples.safetensors").write_bytes(b"\xff" * 20)
    (home / "x-s0" / "curves.parquet").write_bytes(b"PAR1")
    (home / "v-s2" / "status.json").write_text(json.dumps({"state": "dead kernel", "error": "Kernel <died>", "attempt": 2}))
    change(home / "x-s1" / "status.json", attempt=2, history=[{"state": "host gone", "error": "not heard of"}])
    report.write_report(home)
    text = (home / "report" / "report.html").read_text()
    assert not (home / "report" / "samples.png").exists() and "Kernel &lt;died&gt;" in text and "1 run did not finish" in text
    words = (home / "report" / "report.md").read_text()
    assert "| v-s2 | dead kernel | 2 |" in words and "x-s1 was done at attempt 2, after: host gone, not heard of" in words


def test_baseline_alone_and_one_seed(home):
    for path in home.iterdir():
        if not path.name.endswith("-s0"):
            shutil.rmtree(path)
    report.write_report(home)
    words = (home / "report" / "report.md").read_text()
    assert "One seed says nothing about chance" in words and "one seed, no verdict" in words and "one seed, cannot tell" in words and "nan" not in words.replace("dominant", "")
    for variant in ("x", "eps"):
        shutil.rmtree(home / f"{variant}-s0")
    report.write_report(home)
    words = (home / "report" / "report.md").read_text()
    assert "Only the baseline has been run" in words and "--variants v --seeds 1" in words and "nan" not in words


def test_disagreement_comes_with_the_reason(home):
    for seed in range(3):
        path = home / f"x-s{seed}" / "record.json"
        found = json.loads(path.read_text())
        change(path, metrics=found["metrics"] | {"FD[invented]": 500.0 + seed})
    report.write_report(home)
    words = (home / "report" / "report.md").read_text()
    assert re.search(r"\*\*Disagrees\*\*: x was better in FID there, and is not in FD\[invented\] here\.", words) and "Why that may be: The published runs" in words
    assert words.count(TOY.caveat[:40]) == 1


def test_a_number_that_is_no_test_of_ours_does_not_disagree(home):
    "As above, but the published setting is declared to be another: no warning, and the reason."
    for seed in range(3):
        path = home / f"x-s{seed}" / "record.json"
        found = json.loads(path.read_text())
        change(path, metrics=found["metrics"] | {"FD[invented]": 500.0 + seed})
    apart = replace(TOY, published=tuple(replace(p, differs="latents, ours pixels") for p in TOY.published))
    report.write_report(home, apart)
    words = (home / "report" / "report.md").read_text()
    assert "Disagrees" not in words and words.count("(not comparable: latents, ours pixels)") == len(TOY.published)
    assert "| not comparable (latents, ours pixels) |" in words


def test_differing_hardware_is_said(home):
    change(home / "x-s0" / "record.json", hardware="another")
    report.write_report(home)
    words = (home / "report" / "report.md").read_text()
    assert "Not all runs were made alike" in words and "hardware is another for x-s0" in words


def test_a_null_check_has_its_own_part(tmp_path):
    name = next((a.name for a in ablations.known().values() if getattr(a, "seed_shift", None)), None)
    if name is None:
        pytest.skip("no null check is declared")
    home = results.pretend_runs(tmp_path, 6, name)
    report.write_report(home)
    words = (home / "report" / "report.md").read_text()
    assert "How often chance decides" in words and "](chance.png)" in words and "KID[invented] | " in words.split("How often chance decides")[1]


def test_bands_are_the_intervals_of_the_mean():
    values = pd.DataFrame(np.random.default_rng(0).normal(size=(6, 4)))
    values.iloc[2, 1:3] = np.nan
    band = figures.band(values)
    for i, row in values.iterrows():
        seen = row.dropna()
        low, high = stats.t.interval(0.95, len(seen) - 1, seen.mean(), stats.sem(seen))
        assert band.loc[i].tolist() == pytest.approx([seen.mean(), low, high])
    assert figures.band(values[[0]]).low.isna().all()


def test_every_variant_has_its_own_look_and_the_baseline_comes_first():
    many = ablations.Ablation("a", "?", "v3", {f"v{i}": {} for i in range(20)})
    looks = figures.look(many)
    assert looks["v3"][0] == figures.COLOURS[0] and len(set(looks.values())) == 20


def test_summary_over_a_sweep(home, tmp_path):
    homes = [home, *(results.pretend_runs(tmp_path, label=f"optimizer.lr={lr}") for lr in (0.002, 0.005)), tmp_path / "prediction_target" / "gpu"]
    report.write_report(homes[1])
    shutil.rmtree(homes[2] / "x-s0")
    (homes[2] / "eps-s0" / "status.json").write_text(json.dumps({"state": "disk full", "error": "no space"}))
    made = report.summary(homes, tmp_path / "sum")
    rows = pd.read_csv(tmp_path / "sum" / "summary.csv")
    assert list(rows.point.fillna("")) == [""] * 2 + ["optimizer.lr=0.002"] * 2 + ["optimizer.lr=0.005"] * 2
    assert list(rows.seeds) == [3, 3, 3, 3, 2, 3] and list(rows["failed runs"]) == [0, 0, 0, 0, 1, 1]
    p = []
    for folder in homes[:3]:
        runs = results.collect(folder)
        base = results.by_seed(runs, "v", "KID[invented]")
        for variant in ("x", "eps"):
            mine = results.by_seed(runs, variant, "KID[invented]")
            p.append(stats.ttest_rel([mine[s] for s in mine], [base[s] for s in mine]).pvalue)
    called = [w in ("better", "worse") for w in rows.verdict]
    assert called == [q < 0.05 for q in stats.false_discovery_control(p)], "corrected over all rows of the page"
    text = made.read_text()
    read = Reader(text)
    links = [link for link in read.links if not link.startswith("data:")]
    assert links == ["../prediction_target/smoke%40optimizer.lr%3D0.002/report/report.html"] * 2 and "no finished run in" in text
    assert len(read.images) == 1 and (tmp_path / "sum" / "summary.png").exists()
    with pytest.raises(report.ReportError, match="nothing to sum up"):
        report.summary([tmp_path / "nowhere"], tmp_path)


def test_a_sweep_is_corrected_as_a_whole(tmp_path):
    homes, rng, p = [], np.random.default_rng(5), []
    for i in range(12):                                   # one home with a true difference that alone would just be called
        home = results.pretend_runs(tmp_path, 3, "null_check", f"seed.of={i}")
        for s in range(3):
            for variant in "ab":
                change(home / f"{variant}-s{s}" / "record.json", metrics={"KID[a]": rng.normal() + s / 10})
        if i == 0:
            for s in range(3):
                change(home / f"a-s{s}" / "record.json", metrics={"KID[a]": 1.0 + s / 10})
                change(home / f"b-s{s}" / "record.json", metrics={"KID[a]": (1.5, 1.75, 1.6)[s]})
        runs = results.collect(home)
        a, b = results.by_seed(runs, "a", "KID[a]"), results.by_seed(runs, "b", "KID[a]")
        p.append(stats.ttest_rel([b[s] for s in range(3)], [a[s] for s in range(3)]).pvalue)
        homes.append(home)
    assert 0.005 < p[0] < 0.05 < min(stats.false_discovery_control(p)), "the case is what it should be"
    report.summary(homes, tmp_path / "sum")
    rows = pd.read_csv(tmp_path / "sum" / "summary.csv")
    assert set(rows.verdict) == {"not distinguishable"} and list(rows["p, corrected"].astype(float)) == pytest.approx(list(stats.false_discovery_control(p)), rel=0.1)


def with_notice(path, notice):
    with safe_open(path, "numpy") as f:
        tensors, words = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()
    save_file(tensors, path, words | {"notice": notice})


def test_publishing_copies_what_is_small_and_keeps_the_notice(home, tmp_path):
    with pytest.raises(report.ReportError, match="no report in"):
        report.publish(home)
    with_notice(home / "v-s0" / "samples.safetensors", "Patterns by <nobody>, CC0")
    report.write_report(home)
    assert "Patterns by &lt;nobody>, CC0" in (home / "report" / "report.md").read_text()
    notice = tmp_path / "published" / "NOTICE"
    notice.parent.mkdir()
    notice.write_text("Drawings by somebody.\n")
    (home / "report" / "samples-s7.png").write_bytes(b"of an earlier report")
    to = report.publish(home)
    assert not (to / "samples-s7.png").exists(), "this report does not show it"
    assert to == tmp_path / "published" / "prediction_target" / "smoke"
    names = {p.relative_to(to).as_posix() for p in to.rglob("*") if p.is_file()}
    assert {"table.csv", "cost.csv", "report.md", "samples.png", "curves.png", "metrics.png", "records/v-s0.json"} <= names
    assert not any("parquet" in n or "safetensors" in n for n in names)
    page, held = (to / "report.html").read_text(), (home / "report" / "report.html").read_text()
    pictures = re.findall(r'<img [^>]*src="([^"]+)"', page)
    assert len(pictures) == held.count("data:image/png") > 5 and all((to / name).is_file() for name in pictures)
    assert len(page) < 150_000 and page.partition("<h1>")[2].count("<table") == held.count("<table"), "its figures lie beside it"
    report.publish(home)
    assert notice.read_text() == "Drawings by somebody.\n\nPatterns by <nobody>, CC0\n", "kept, and added once"
    for picture in re.findall(r"\]\(([^)]+\.png)\)", (to / "report.md").read_text()):
        assert (to / picture).exists(), picture
    cpu = home.rename(home.with_name("cpu"))
    assert report.publish(cpu, tmp_path / "elsewhere") == tmp_path / "elsewhere" / "published" / "prediction_target"


@pytest.mark.slow
def test_the_report_notebook_runs_and_says_why_it_fails(home, monkeypatch):
    told = []
    made = report.make_report(home, say=told.append)
    assert (made / "report.ipynb").exists() and (made / "report.html").stat().st_size > 10_000 and "report.html" in told[0]
    outputs = [o for c in json.loads((made / "report.ipynb").read_text())["cells"] for o in c.get("outputs", [])]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 8
    runs = results.collect(home)
    for run in home.glob("*-s*"):
        (run / "record.json").unlink()
    with pytest.raises(report.ReportError, match="no finished run"):
        report.make_report(home)
    monkeypatch.setattr(report, "collect", lambda folder: runs)
    with pytest.raises(report.ReportError, match="the report notebook failed: .*no finished run"):
        report.make_report(home)


def test_numbers_that_are_missing_are_not_invented():
    assert results.in_words(math.nan) == "" and results.in_words(1.0) == "1" and results.in_words(-1234.5, -2000, 10.0, "+") == "-1234 [-2000, +10]"


def test_calibration_stands_beside_its_metric(home, tmp_path):
    place = tmp_path / "published" / "calibration"
    place.mkdir(parents=True)
    lines = ["metric,damage,verdict", "KID[invented],blur,notices", "KID[invented],inverted colours,does not notice", "FD[invented],blur,notices"]
    (place / "calibration.csv").write_text("\n".join(lines) + "\n")
    report.write_report(home)
    words = (home / "report" / "report.md").read_text()
    assert "| x | KID[invented]<br>lower is better; does not notice inverted colours |" in words and "not calibrated here" not in words
    means = {line.split("<br>")[0][2:]: line.split(" | ")[-1][:-2] for line in words.splitlines() if line.startswith("| ") and "calibrat" in line or "all damage" in line}
    assert means["FD[invented]"] == "notices all damage" and means["retrieval@1[invented]"] == "not calibrated"


def test_a_readers_own_data_is_in_the_report(home):
    "As the record has it, once for runs that say the same; text stays text; what cannot be read is passed by."
    from dataclasses import asdict

    from prx_nb.core.batch import DataSummary
    mine = DataSummary("folder", "my/<b>mugs</b>", 16, 30, 24, 6, 0, 33, {"hidden": [2, [".a.png"]]}, left_out=[1, ["x.png"]])
    folders = sorted(home.glob("*-s*"))
    for n, run in enumerate(folders):
        told = {"data_summary": ["no", {"source": "emoji"}, {"source": "folder", "else": 1}][n] if n < 3 else asdict(mine)}
        change(run / "record.json", **told)
    (names, rows), = report.own_data(results.collect(home))
    assert len(folders) - 3 == names.count("-s") <= 6
    said = list(rows.data)
    assert said[0].startswith("30 images of 16 x 16 px from folder") and "passed over: 2 (.a.png, ...): hidden" in " ".join(said)
    report.write_report(home)
    words, text = (home / "report" / "report.md").read_text(), (home / "report" / "report.html").read_text()
    assert words.count("found 33, used 30") == text.count("found 33, used 30") == 1 and "without a caption and left out: 1" in words
    assert "learned from</caption>" in text and "&lt;b&gt;mugs" in text
    assert "<b>mugs" not in text


def test_the_packages_own_drawings_have_no_table(home):
    from prx_nb.core.batch import DataSummary
    for run in home.glob("*-s*"):
        change(run / "record.json", data_summary=DataSummary("emoji", None, 16, 9, 5, 2, 2, 9).__dict__)
    assert report.own_data(results.collect(home)) == []
