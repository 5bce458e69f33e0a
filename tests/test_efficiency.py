"Efficiency techniques are headed by equal time and equivalent steps, in the report and in the table over all."
import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest

from prx_nb.lab import ablations, efficiency, overview, report, results
from prx_nb.lab.page import Page


def lengths(folder, a=0.5, level=120.0, images=6400, seeds=4):
    "Published runs of a baseline whose FD falls as steps^-a; a seed's own level, and a wobble that has no slope."
    for seed in range(seeds):
        for share, wobble in ((0.5, 1), (0.75, -1), (0.9, -1), (1.0, 1)):
            fd = level * share ** -a * (1 + seed / 50) * (1 + 0.001 * wobble)
            made = {"variant": f"of{share}", "seed": seed, "preset": "smoke", "metrics": {"joint[invented]": fd},
                    "cost": {"images_seen": round(images * share)}}
            path = folder / "published" / "training_length" / "smoke" / "records" / f"of{share}-s{seed}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(made))


def in_turns(folder, **ratios):
    path = folder / "published" / "cost_ratios" / "smoke" / "muon.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"ratios": {v: {"log": math.log(r), "error": 0.005, "df": 19, "flops": 1.0} for v, r in ratios.items()}}))


def opening(group):
    "The first part of a report, in Markdown."
    f = report.read(group)
    page = Page(group / "report", "toy")
    report._opening(page, f)
    return report.markdown(page)


@pytest.fixture
def group(tmp_path):
    return results.pretend_runs(tmp_path, seeds=4, ablation="muon")


def test_the_report_of_an_efficiency_technique_opens_with_steps_and_time(group, tmp_path):
    in_turns(tmp_path, muon=1.21)
    assert "the steps of adamw" not in opening(group), "no runs of several lengths: nothing is said"
    lengths(tmp_path)
    said = opening(group)
    lines = [line for line in said.splitlines() if "the steps of adamw" in line]
    assert len(lines) == 3 and "time of a step x1.21 [1.20, 1.22]; at equal time" in lines[0]
    assert all("(not measured in turns)" in line for line in lines[1:])
    question, declared = ablations.get("muon").question, results.declared(results.table(results.collect(group), ablations.get("muon")), ablations.get("muon"))
    assert said.index(question) < said.index(lines[0]) < said.index(lines[2]) < said.index(declared[0][:20]), "it comes first"


def test_a_question_that_is_not_about_efficiency_has_no_such_line(group, tmp_path):
    lengths(tmp_path)
    runs, muon = results.collect(group), ablations.get("muon")
    assert efficiency.efficiencies(runs, muon, tmp_path) and efficiency.efficiencies(runs, replace(muon, efficient=False), tmp_path) == {}
    assert {a.name for a in ablations.known().values() if a.efficient} == {"tread", "sprint", "repa", "irepa", "muon", "bf16_weights", "thrifty"}


def test_numbers_are_those_of_the_formulas(group, tmp_path):
    lengths(tmp_path)
    in_turns(tmp_path, muon=1.5)
    runs, muon = results.collect(group), ablations.get("muon")
    found = efficiency.efficiencies(runs, muon, tmp_path)["muon"]
    ratio = results.decisions(runs, muon, "joint[invented]")["muon"].ratio
    assert found.steps.times == pytest.approx(ratio ** (-1 / 0.5), rel=1e-3) and found.steps.low < found.steps.times < found.steps.high
    assert found.then.ratio == pytest.approx(ratio * 1.5 ** 0.5, rel=1e-3)
    assert found.then.word == "worse" and found.steps.times < 1 and not found.beyond


def test_a_law_of_much_longer_runs_is_not_used(group, tmp_path):
    lengths(tmp_path, images=64000)
    assert efficiency.efficiencies(results.collect(group), ablations.get("muon"), tmp_path) == {}


def test_runs_that_are_not_published_come_first(group, tmp_path):
    lengths(tmp_path, a=0.5)
    for i, (share, seed) in enumerate((s, k) for s in (0.5, 0.7, 1.0) for k in range(3)):
        run = tmp_path / "training_length" / "smoke" / f"v{i}-s{seed}"
        run.mkdir(parents=True)
        made = {"status": "done", "ablation": "training_length", "variant": f"v{i}", "seed": seed, "preset": "smoke",
                "metrics": {"joint[invented]": 100 * share ** -0.2 * (1 + seed / 99 + i % 2 / 999)}, "cost": {"images_seen": round(6400 * share)}}
        (run / "record.json").write_text(json.dumps(made))
    power = efficiency.power_of(efficiency.length_runs(tmp_path, "smoke"), "joint[invented]", 6400)
    assert power.a == pytest.approx(0.2, abs=0.01)


def test_the_table_over_all_says_equal_time_in_place_of_cost(group, tmp_path):
    runs, muon = results.collect(group), ablations.get("muon")
    home = tmp_path / "published" / "muon" / "smoke"
    home.mkdir(parents=True)
    results.table(runs, muon).to_csv(home / "table.csv", index=False)
    results.costs(runs, muon).to_csv(home / "cost.csv", index=False)
    (home / "records").mkdir()
    for run in group.glob("*/record.json"):
        (home / "records" / f"{run.parent.name}.json").write_text(run.read_text())
    said = lambda: overview.overview(tmp_path / "published", ["muon"], "smoke").set_index("variant").cost["muon against adamw"]
    assert said().startswith("time x0.") and "[" not in said()
    in_turns(tmp_path, muon=1.21)
    assert said() == "time x1.21 [1.20, 1.22], FLOPs x1.00"
    lengths(tmp_path)
    assert said().startswith("at equal time ") and "time of a step x1.21 [1.20, 1.22]" in said()


def test_a_file_that_is_no_measurement_is_one_error(group, tmp_path):
    lengths(tmp_path)
    in_turns(tmp_path, muon=1.21)
    (tmp_path / "published" / "cost_ratios" / "smoke" / "muon.json").write_text("[]")
    with pytest.raises(efficiency.EfficiencyError, match=r"muon.json is no measurement of cost"):
        opening(group)


def test_reading_takes_no_torch():
    script = "import sys, prx_nb.lab.efficiency; assert 'torch' not in sys.modules, 'torch'"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
