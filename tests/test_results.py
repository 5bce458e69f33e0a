"Results from files: tables against a computation by hand, published numbers beside them, equal time, cost, failures."
import json
import math
import random
import shlex
import shutil

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from prx_nb.lab import ablations, results
from prx_nb.lab.ablations import Ablation, Published
from prx_nb.lab.cli_data import settings

TOY = ablations.get("prediction_target")
COST = {"train_seconds": 10.0, "total_seconds": 20.0, "step_seconds": 0.5}


def write_run(home, variant, seed, metrics, curve=None, status=None, job=None, cost=None, **more):
    folder = home / f"{variant}-s{seed}"
    folder.mkdir(parents=True)
    made = {"status": "done", "ablation": "prediction_target", "variant": variant, "preset": "smoke", "seed": seed, "recipe_key": "k",
            "metrics": metrics, "cost": COST | {"total_seconds": 20.0 + seed} | (cost or {}), "hardware": "h", "versions": {}, "git_commit": None}
    (folder / "record.json").write_text(json.dumps(made | more))
    (folder / "status.json").write_text(json.dumps(status or {"state": "done"}))
    if job:
        (folder / "job.json").write_text(json.dumps(job))
    if curve is not None:
        pd.DataFrame(curve, columns=["step", "name", "value"]).to_parquet(folder / "curves.parquet")
    return folder


def made_table(home):
    return results.table(results.collect(home), TOY)


def contrast(mine, base, other):
    "The classical t test of two of three groups, with the scatter of all three, on logarithms: ratio, p, and the interval's ends."
    logs = [np.log(g) for g in (mine, base, other)]
    df = sum(len(g) - 1 for g in logs)
    error = np.sqrt(sum(g.var(ddof=1) * (len(g) - 1) for g in logs) / df * (1 / len(mine) + 1 / len(base)))
    apart = logs[0].mean() - logs[1].mean()
    ends = lambda level: np.exp(apart + np.array([-1, 1]) * stats.t.ppf((1 + level) / 2, df) * error)
    return np.exp(apart), 2 * stats.t.sf(abs(apart) / error, df), ends


def test_table_by_hand(tmp_path):
    rng = np.random.default_rng(0)
    v, x, e = rng.normal(2, 0.2, 4), rng.normal(1, 0.1, 4), rng.normal(2.1, 0.2, 4)
    for s in range(4):
        for variant, values in zip(("v", "x", "eps"), (v, x, e)):
            write_run(tmp_path, variant, s, {"FD[a]": values[s], "val t 0.0-0.2": values[s] ** 2})
    write_run(tmp_path, "x", 9, {"FD[a]": 1.1})                       # no partner: that is no matter
    rows = made_table(tmp_path).set_index(["metric", "variant"])
    more, ours = np.array([*x, 1.1]), rows.loc[("FD[a]", "x")]
    ratio, p, ends = contrast(more, v, e)
    assert ours["mean"] == pytest.approx(more.mean()) and ours.seeds == 5 and ours.seconds == pytest.approx((20 + 21 + 22 + 23 + 29) / 5)
    assert ours.difference == pytest.approx((ratio - 1) * v.mean()) and ours.p == pytest.approx(p)
    assert (ours.difference_low, ours.difference_high) == pytest.approx(tuple((ends(1 - 0.05 / 2) - 1) * v.mean())), "one of two is called"
    main = [p, contrast(e, v, more)[1]]
    assert list(rows.loc["FD[a]"].p_corrected[1:]) == pytest.approx(stats.false_discovery_control(main)), "corrected over the main metrics alone"
    other = [contrast(x**2, v**2, e**2)[1], contrast(e**2, v**2, x**2)[1]]
    assert list(rows.loc["val t 0.0-0.2"].p_corrected[1:]) == pytest.approx(stats.false_discovery_control(other)), "and the others among themselves"
    assert rows.loc[("FD[a]", "v")].verdict == "baseline" and math.isnan(rows.loc[("FD[a]", "v")].difference)
    for variant in ("x", "eps"):
        row = rows.loc[("FD[a]", variant)]
        assert row.verdict == ("not distinguishable" if row.p_corrected >= 0.05 else "better" if row.difference < 0 else "worse")


def test_direction_of_better(tmp_path):
    rng = np.random.default_rng(1)
    near = lambda value: value * (1 + 0.02 * rng.normal())
    for s in range(4):
        write_run(tmp_path, "v", s, {"KID[a]": near(1), "retrieval@1[a]": near(0.1)})
        write_run(tmp_path, "eps", s, {"KID[a]": near(1.5), "retrieval@1[a]": near(0.3)})
    rows = made_table(tmp_path)
    verdicts = rows.set_index(["metric", "variant"]).verdict
    assert verdicts[("KID[a]", "eps")] == "worse" and verdicts[("retrieval@1[a]", "eps")] == "better"
    said = results.sentences(rows, TOY)
    assert said[0].startswith("eps is worse than v on KID[a]: +"), "the declared question first"
    assert said[1] == ("Exploratory: eps against v (4 seeds): worse on KID[a]; better on retrieval@1[a].") and "2 comparisons are corrected" in said[2]


def test_one_seed_gives_numbers_but_no_verdict(tmp_path):
    write_run(tmp_path, "v", 0, {"FD[a]": 1.0})
    write_run(tmp_path, "x", 0, {"FD[a]": 0.5})
    rows = made_table(tmp_path)
    words = results.verdicts(rows, TOY).iloc[0]
    assert words["minus v [95%]"] == "-0.5" and words["p, corrected"] == "" and words.verdict == "one seed, no verdict"
    assert words.published == "FID 18.20 -> 16.80, better" and words.agreement == "one seed, cannot tell"
    assert "x against v (1 seed): one seed, no verdict." in results.sentences(rows, TOY)[0]


def test_baseline_only_and_baseline_missing(tmp_path):
    write_run(tmp_path / "a", "v", 0, {"FD[a]": 1.0})
    rows = made_table(tmp_path / "a")
    assert len(results.verdicts(rows, TOY)) == 0 and results.sentences(rows, TOY) == [] and list(results.means(rows).columns) == ["metric", "v"]
    write_run(tmp_path / "b", "x", 0, {"FD[a]": 1.0})
    rows = made_table(tmp_path / "b")
    assert list(rows.verdict) == ["no pair"] and results.verdicts(rows, TOY).agreement[0] == "not measured here"


@pytest.mark.parametrize("ours, seeds, published, expected", [
    ("better", 3, (18.2, 16.8, False), "agrees"), ("worse", 3, (18.2, 16.8, False), "disagrees"),
    ("worse", 3, (18.2, 20.0, False), "agrees"), ("better", 3, (18.2, 20.0, False), "disagrees"),
    ("better", 3, (0.2, 0.3, True), "agrees"), ("better", 3, (0.3, 0.2, True), "disagrees"),
    ("not distinguishable", 3, (18.2, 16.8, False), "not distinguishable here"), ("not distinguishable", 1, (18.2, 16.8, False), "one seed, cannot tell"),
    ("better", 3, (1.0, 1.0, False), "disagrees"), ("not distinguishable", 3, (1.0, 1.0, True), "agrees"), ("no pair", 2, (1.0, 2.0, True), "not measured here"),
    ("equivalent", 3, (18.2, 16.8, False), "equivalent here"), ("undecided", 3, (18.2, 16.8, False), "undecided here"), ("undecided", 1, (18.2, 16.8, False), "one seed, cannot tell"),
    ("equivalent", 3, (1.0, 1.0, False), "agrees"), ("undecided", 3, (1.0, 1.0, False), "undecided here")])
def test_agreement_in_all_cases(ours, seeds, published, expected):
    assert results.agreement(ours, seeds, Published("x", "FID", *published, "somewhere")) == expected
    assert results.agreement(ours, seeds, Published("x", "FID", *published, "somewhere", "other latents")) == "not comparable"


def test_published_numbers_find_metrics_of_their_kind():
    ours = ["KID[a]", "FD[b]", "MMD[c]", "val"]
    assert [results.kin(name, ours) for name in ("FID", "CMMD", "DINO-MMD", "KID", "GenEval")] == ["FD[b]", "MMD[c]", "MMD[c]", "KID[a]", None]
    assert results.kin("FID", ["FD[b]", "FID[inception]"]) == "FID[inception]", "the very same comes first"


def test_published_variants_that_were_not_run_are_said(tmp_path):
    for s in range(2):
        write_run(tmp_path, "v", s, {"FD[a]": 1.0 + s})
        write_run(tmp_path, "eps", s, {"FD[a]": 1.5 + s})
    assert set(results.published_table(made_table(tmp_path), TOY).agreement) == {"not measured here"}


def test_only_whole_finished_records_count(tmp_path):
    write_run(tmp_path, "v", 0, {"val": 1.0})
    write_run(tmp_path, "v", 1, {"val": 1.0}, **{"status": {"state": "timeout", "error": "longer than the 5 s it may\nmore", "attempt": 1}})
    (tmp_path / "v-s1" / "record.json").write_text('{"status": "running"}')
    (write_run(tmp_path, "v", 2, {"val": 1.0}) / "record.json").write_text('{"status": "done", "abl')
    shutil.copytree(tmp_path / "v-s0", tmp_path / ".replaced" / "v-s0")
    shutil.copytree(tmp_path / "v-s1", tmp_path / ".aside")
    write_run(tmp_path, "v", 4, {"val": 1.0}).rename(tmp_path / ".other")
    assert list(results.collect(tmp_path).seed) == [0]
    assert results.unfinished(tmp_path).values.tolist() == [["v-s1", "timeout", 1, "longer than the 5 s it may", ""]]


def test_failures_are_listed_with_cell_attempts_and_log(tmp_path):
    history = [{"state": "dead kernel", "error": "Kernel died"}]
    folder = write_run(tmp_path, "v", 0, {}, status={"state": "cell error", "attempt": 2, "error": "ValueError: no", "cell": 7, "source": "x = 1", "history": history})
    (folder / "log.txt").write_text("words")
    write_run(tmp_path, "x", 0, {}, status={"state": "done", "attempt": 2, "history": history})
    assert results.unfinished(tmp_path).values.tolist() == [["v-s0", "cell error", 2, "ValueError: no (cell 7: x = 1)", "v-s0/log.txt"]]
    assert results.retried(results.collect(tmp_path))[-1] == "x-s0 was done at attempt 2, after: dead kernel, Kernel died"


def test_what_cannot_be_reported_on(tmp_path):
    with pytest.raises(results.ReportError, match="no finished run in .*prx-nb ablate"):
        results.collect(tmp_path)
    write_run(tmp_path, "v", 0, {})
    write_run(tmp_path, "x", 0, {}, preset="gpu")
    with pytest.raises(results.ReportError, match="mixes runs of"):
        results.collect(tmp_path)


def test_runs_unlike_the_others_are_named(tmp_path):
    for seed in range(3):
        write_run(tmp_path, "v", seed, {}, versions={"torch": "2.0"}, job={"overrides": {"train.steps": 5}})
    write_run(tmp_path, "x", 0, {}, versions={"torch": "2.1"}, git_commit="abc", job={"overrides": {}})
    said = results.odd_runs(results.collect(tmp_path))
    assert sorted(said) == ["commit is abc for x-s0, unknown for the other 3", "setting train.steps is none for x-s0, 5 for the other 3",
                            "version of torch is 2.1 for x-s0, 2.0 for the other 3"]


def curve(rate, values, clock=True):
    "Validation at steps 10, 20, ...; `rate` seconds a step."
    rows = [(10 * (i + 1), "val", v) for i, v in enumerate(values)]
    return rows + ([(10 * (i + 1), "seconds", 10 * (i + 1) * rate) for i in range(len(values))] if clock else [])


def test_equal_time_by_hand(tmp_path):
    write_run(tmp_path, "v", 0, {"val": 2.0}, curve(1.0, [8.0, 4.0, 2.0]))           # through after 30 s: that is the moment
    write_run(tmp_path, "x", 0, {"val": 1.0}, curve(2.0, [7.0, 3.0, 1.0]))           # at 30 s in the middle between steps 10 and 20
    write_run(tmp_path, "eps", 0, {"val": 3.0}, curve(None, [9.0, 5.0, 3.0, 1.0], clock=False), cost={"step_seconds": 4.0})   # no clock: by its seconds a step
    lines = results.curves(results.collect(tmp_path))
    moment, found = results.at_moment(lines)
    assert moment == 30 and {r.variant: (r.step, r.value, r.last) for r in found.itertuples()} == {
        "v": (30, 2.0, 2.0), "x": (15, 5.0, 1.0), "eps": (10, 9.0, 1.0)}, "before its first validation a run has that one's error"
    moment, words = results.equal_time(lines, TOY)
    assert list(words.variant) == ["v", "x", "eps"] and list(words["error, equal time"]) == ["2", "5", "9"] and list(words["error, equal steps"]) == ["2", "1", "1"]
    assert list(words["verdict, equal time"]) == ["baseline", "one seed, no verdict", "one seed, no verdict"]


def test_the_verdict_at_equal_time_may_be_another_one(tmp_path):
    rng = np.random.default_rng(2)
    for s in range(5):
        luck, small = rng.normal(), lambda: 0.001 * rng.normal()
        write_run(tmp_path, "v", s, {"val": 1.0}, curve(1.0, [8 + luck, 6 + luck, 4 + luck + small()]))
        write_run(tmp_path, "x", s, {"val": 1.0}, curve(2.0, [8 + luck, 6 + luck + small(), 2 + luck + small()]))
    row = results.equal_time(results.curves(results.collect(tmp_path)), TOY)[1].set_index("variant").loc["x"]
    assert row["verdict, equal steps"] == "better" and row["verdict, equal time"] == "worse" and row["steps by then"] == "15"


def test_damaged_and_missing_curves_cost_only_themselves(tmp_path):
    write_run(tmp_path, "v", 0, {"val": 1.0}, curve(1.0, [1.0, 2.0]))
    (write_run(tmp_path, "v", 1, {"val": 1.0}) / "curves.parquet").write_bytes(b"PAR1 nothing")
    write_run(tmp_path, "v", 2, {"val": 1.0})
    assert set(results.curves(results.collect(tmp_path)).seed) == {0}
    shutil.rmtree(tmp_path / "v-s0")
    lines = results.curves(results.collect(tmp_path))
    assert len(lines) == 0 and len(results.equal_time(lines, TOY)[1]) == 0


def test_seconds_between_and_after_validations(tmp_path):
    rows = [(s, "loss", 1.0) for s in (1, 10, 15, 20, 25)] + [(10, "seconds", 5.0), (20, "seconds", 25.0), (20, "val", 1.0)]
    write_run(tmp_path, "v", 0, {}, rows)
    lines = results.curves(results.collect(tmp_path))
    assert list(lines[lines.name == "loss"].seconds) == pytest.approx([0.5, 5, 15, 25, 31.25])


@pytest.mark.parametrize("higher", [True, False])
def test_pareto_against_brute_force(higher):
    rng = random.Random(3)
    for n in (1, 2, 5, 12):
        for _ in range(50):
            cost, quality = [rng.randrange(6) for _ in range(n)], [rng.randrange(6) for _ in range(n)]
            expected = []
            for i in range(n):
                beaten = False
                for j in range(n):
                    no_worse = cost[j] <= cost[i] and (quality[j] >= quality[i] if higher else quality[j] <= quality[i])
                    beaten |= no_worse and (cost[j] < cost[i] or quality[j] != quality[i])
                expected.append(not beaten)
            assert results.pareto(cost, quality, higher) == expected
    assert results.pareto([1, math.nan], [1, 0], higher) == [True, False]


def test_costs(tmp_path):
    for seed, flops in ((0, 1e9), (1, 3e9)):
        folder = write_run(tmp_path, "v", seed, {}, cost={"flops_step": flops, "energy_joules": 100.0, "energy_source": "meter", "peak_memory_mb": None})
        (folder / "recipe.json").write_text(json.dumps({"train": {"steps": 10}}))
    write_run(tmp_path, "x", 0, {}, cost={"flops_step": 1e9, "energy_joules": None})
    spent = results.costs(results.collect(tmp_path), TOY).set_index("variant")
    assert spent.flops["v"] == 2e10 and math.isnan(spent.flops["x"]) and spent.total_seconds["v"] == 20.5 and spent.energy_joules["v"] == 100
    words = results.cost_words(spent.reset_index()).set_index("variant")
    assert words.loc["v", "FLOPs in all"] == "20 GFLOP" and words.loc["v", "energy (meter)"] == "100 J" and words.loc["v", "step"] == "500 ms"
    assert words.loc["x", "energy (meter)"] == words.loc["v", "peak memory"] == words.loc["x", "images seen"] == "not measured here"


def test_flags_stand_beside_their_metric(tmp_path):
    for s in range(2):
        write_run(tmp_path, "v", s, {"FD[a]": 1.0 + s, "KID[a]": 1.0, "val": 1.0})
        write_run(tmp_path, "x", s, {"FD[a]": 1.5 + s, "KID[a]": 1.0, "val": 1.0})
    grades = pd.DataFrame([("FD[a]", "blur", "notices"), ("FD[a]", "noise", "does not notice"), ("FD[a]", "mode drop", "does not notice"),
                           ("FD[a]", "inverted colours", "not monotonic"), ("KID[a]", "blur", "notices")], columns=["metric", "damage", "verdict"])
    said = results.flags(grades)
    assert said == {"FD[a]": "does not notice noise and mode drop; is not monotonic in inverted colours", "KID[a]": ""}
    rows = made_table(tmp_path)
    assert "does not notice noise" in results.verdicts(rows, TOY, said).set_index("variant").metric.iloc[0]
    assert list(results.means(rows, None, said).calibration) == [said["FD[a]"], "notices all damage", ""]
    assert "calibration" not in results.means(rows, None, {})


def test_a_null_check_counts_how_often_chance_decides(tmp_path):
    toy = Ablation("prediction_target", "?", "v", {"v": {}, "again": {}})
    object.__setattr__(toy, "seed_shift", {"again": 1000})
    rng = np.random.default_rng(4)
    for s in range(12):
        for variant in ("v", "again"):
            write_run(tmp_path, variant, s, {"FD[a]": rng.normal(), "val": rng.normal() + (5 if variant == "again" else 0), "val t 0.0-0.2": 0.0})
    rates = results.chance(results.collect(tmp_path), toy).set_index("metric")
    assert set(rates.index) == {"FD[a]", "val"} and set(rates.seeds) == {12}
    assert rates.rate["FD[a]"] < 0.3 and rates.rate["val"] > 0.6 and (rates.low <= rates.rate).all() and (rates.rate <= rates.high).all()
    for s in range(2, 12):
        shutil.rmtree(tmp_path / f"again-s{s}")
    assert len(results.chance(results.collect(tmp_path), toy)) == 0


def test_commands_name_variants_seeds_and_settings(tmp_path):
    for seed in (3, 5):
        for variant in ("v", "x"):
            write_run(tmp_path, variant, seed, {}, job={"overrides": {"optimizer.lr": 0.002, "data.path": "my images", "captions.kind": "short", "a.b": None, "c.d": "5"}})
    runs = results.collect(tmp_path)
    line = results.command(runs, TOY, "x")
    assert line == ("prx-nb ablate prediction_target --preset smoke --variants v,x --seeds 3,5 "
                    """--set optimizer.lr=0.002 --set 'data.path=my images' --set captions.kind=short --set a.b=null --set 'c.d="5"'""")
    pairs = [word for word, before in zip(shlex.split(line)[1:], shlex.split(line)) if before == "--set"]
    assert settings(pairs) == runs.overrides[0], "the command reads what the report writes"
    write_run(tmp_path, "eps", 7, {})
    assert results.command(results.collect(tmp_path), TOY, "eps").endswith("--variants v,eps --seeds 7,"), "one seed is a list, not a number of seeds"
