"The one table over all published ablations says what their files say."
import math

import pandas as pd
import pytest

from prx_nb.lab import ablations, docs, overview, report, results


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    made = report.write_report(results.pretend_runs(folder)).folder
    to = folder / "published" / "prediction_target"
    to.parent.mkdir()
    made.rename(to)
    return folder / "published"


def test_effects_are_shares_of_the_baseline_with_their_interval(published):
    rows = pd.read_csv(published / "prediction_target" / "table.csv")
    base = rows[(rows.variant == "v") & (rows.metric == "FD[invented]")].iloc[0]
    mine = rows[(rows.variant == "x") & (rows.metric == "FD[invented]")].iloc[0]
    said = overview.overview(published, ["prediction_target"]).iloc[0]
    wanted = overview.percent(*(getattr(mine, k) / base["mean"] for k in ("difference", "difference_low", "difference_high")))
    assert said["FD, ours"] == f"{wanted} ({mine.verdict})" and "[" in wanted and wanted.startswith("-")
    assert said["published"] == "FID -7.7%, CMMD +32%, DINO-MMD +26%", "16.80 / 18.20, 0.54 / 0.41, 0.49 / 0.39"
    assert said["agreement"] == "; ".join(dict.fromkeys(results.published_table(rows, ablations.get("prediction_target")).agreement))


def test_cost_is_a_multiple_of_the_baselines(published):
    spent = pd.read_csv(published / "prediction_target" / "cost.csv").set_index("variant")
    said = overview.overview(published, ["prediction_target"]).set_index("variant").cost["eps against v"]
    time, flops = spent.loc["eps"] / spent.loc["v"], spent.flops_step["eps"] / spent.flops_step["v"]
    assert said == f"time x{time.step_seconds:.2f}, FLOPs x{flops:.2f}" and not math.isclose(flops, 1)


def test_seeds_needed_stand_where_nothing_is_distinguishable(published, tmp_path):
    rows = pd.read_csv(published / "prediction_target" / "table.csv")
    rows.loc[rows.metric == "MMD[x]", "metric"] = "other"
    rows.loc[(rows.variant == "eps") & (rows.metric == "FD[invented]"), ["verdict", "seeds_needed"]] = "not distinguishable", 11
    (tmp_path / "prediction_target").mkdir()
    rows.to_csv(tmp_path / "prediction_target" / "table.csv", index=False)
    said = overview.overview(tmp_path, ["prediction_target"]).set_index("variant")
    assert said.needed["eps against v"] == "FD 11" and "(not distinguishable)" in said["FD, ours"]["eps against v"]
    assert said.cost["eps against v"] == "", "no cost is known: nothing is said of it"


def test_what_is_not_published_is_named(published):
    said = docs.compared(["prediction_target", "caption_length"], published).data
    assert "Not published yet: `caption_length`" in said and said.count("\n| [prediction target](") == 2
    assert docs.compared(["caption_length"], published).data.startswith("Not published yet")


@pytest.mark.parametrize("change,says", [(0.5, "+50%"), (-0.004, "-0.4%"), (math.nan, "")])
def test_percent(change, says):
    assert overview.percent(change) == says
