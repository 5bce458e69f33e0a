"The one table over all published ablations says what their files say."
import json
import math
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from prx_nb.lab import ablations, docs, efficiency, overview, report, results


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
    base = rows[(rows.variant == "v") & (rows.metric == "joint[invented]")].iloc[0]
    mine = rows[(rows.variant == "x") & (rows.metric == "joint[invented]")].iloc[0]
    said = overview.overview(published, ["prediction_target"]).iloc[0]
    wanted = overview.percent(*(getattr(mine, k) - 1 for k in ("ratio", "ratio_low", "ratio_high")))
    assert said["joint, ours"] == f"{wanted} ({mine.decision})" and "[" in wanted and wanted.startswith("-"), "the declared question"
    rows.drop(columns=list(results.DECIDED)).to_csv(published / "prediction_target" / "table.csv", index=False)
    older = overview.overview(published, ["prediction_target"]).iloc[0]["joint, ours"]
    rows.to_csv(published / "prediction_target" / "table.csv", index=False)
    wanted = overview.percent(*(getattr(mine, k) / base["mean"] for k in ("difference", "difference_low", "difference_high")))
    assert older == f"{wanted} ({mine.verdict})", "a table from before, without records"
    assert said["published"] == "FID -7.7%, CMMD +32%, DINO-MMD +26%", "16.80 / 18.20, 0.54 / 0.41, 0.49 / 0.39"
    assert said["agreement"] == ", ".join(dict.fromkeys(results.published_table(rows, ablations.get("prediction_target")).agreement))


def test_cost_is_a_multiple_of_the_baselines(published):
    spent = pd.read_csv(published / "prediction_target" / "cost.csv").set_index("variant")
    said = overview.overview(published, ["prediction_target"]).set_index("variant").cost["eps against v"]
    time, flops = spent.loc["eps"] / spent.loc["v"], spent.flops_step["eps"] / spent.flops_step["v"]
    assert said == f"time x{time.step_seconds:.2f}, FLOPs x{flops:.2f}" and not math.isclose(flops, 1)


def test_a_table_without_costs_has_none(published, tmp_path):
    rows = pd.read_csv(published / "prediction_target" / "table.csv")
    rows.loc[(rows.variant == "eps") & (rows.metric == "joint[invented]"), ["verdict", "decision"]] = "not distinguishable", ""
    (tmp_path / "prediction_target").mkdir()
    rows.to_csv(tmp_path / "prediction_target" / "table.csv", index=False)
    said = overview.overview(tmp_path, ["prediction_target"]).set_index("variant")
    assert "(not distinguishable)" in said["joint, ours"]["eps against v"]
    assert said.cost["eps against v"] == "", "no cost is known: nothing is said of it"


def test_what_is_not_published_is_named(published):
    said = docs.compared(["prediction_target", "caption_length"], published).data
    assert "Not published yet: `caption_length`" in said and said.count("\n| [prediction target](") == 2
    assert docs.compared(["caption_length"], published).data.startswith("Not published yet")


def test_sources_that_differ_are_named_by_what_they_differ_in():
    both = [("P, Flux latents, 256 px", "FID +19%"), ("P, Flux latents, 256 px", "CMMD +34%"), ("P, pixels, 1024 px", "FID -19%")]
    assert overview.by_source(both) == "256 px: FID +19%, CMMD +34%; 1024 px: FID -19%"
    assert overview.by_source([(source, "agrees") for source, _ in both]) == "agrees" and overview.by_source([]) == ""
    assert overview.by_source(both[:2]) == "FID +19%, CMMD +34%"


def test_no_variant_is_shown_by_an_encoder_it_learnt_from(tmp_path):
    "The EffNet loss is seen by the ViT, the ViT's by EffNet; a variant without a foreign judge has no number."
    line = "perceptual,{v},cpu,,3,{m},{mean},,,{d},{d},{d},0.01,0.01,{word},9,one"
    rows = [line.format(v=v, m=m, mean=mean, d="" if v == "plain" else d, word="baseline" if v == "plain" else "better")
            for v in ("plain", "effnet", "vit") for m, mean, d in (("joint[effnet-lite0]", 100, -10), ("joint[vit-s14]", 10, -2), ("MMD[vit-s14]", 4, -1))]
    (tmp_path / "perceptual").mkdir()
    (tmp_path / "perceptual" / "table.csv").write_text("\n".join([",".join(results.COLUMNS), *rows]))
    said = overview.overview(tmp_path, ["perceptual"]).set_index("variant")
    assert said["joint, ours"].to_dict() == {"effnet against plain": "-20% [-20%, -20%] (better, by another encoder)", "vit against plain": "-10% [-10%, -10%] (better, by another encoder)"}
    assert said["MMD, ours"].to_dict() == {"effnet against plain": "-25% [-25%, -25%] (better)", "vit against plain": ""}, "nothing was left out of effnet's MMD"


@pytest.mark.parametrize("change,says", [(0.5, "+50%"), (-0.004, "-0.4%"), (math.nan, "")])
def test_percent(change, says):
    assert overview.percent(change) == says


@pytest.fixture
def kept(published, tmp_path):
    "A copy of the published folder, with records that know their commit."
    home = tmp_path / "kept" / "prediction_target"
    shutil.copytree(published / "prediction_target", home)
    (home / "records").mkdir()
    for path in results.pretend_runs(tmp_path).glob("*/record.json"):
        (home / "records" / f"{path.parent.name}.json").write_text(json.dumps(json.loads(path.read_text()) | {"git_commit": "0123abc"}))
    return home.parent


def test_what_was_found_says_what_the_files_say(kept):
    said = overview.found("prediction_target", kept).data
    rows = pd.read_csv(kept / "prediction_target" / "table.csv")
    for line in results.declared(rows, ablations.get("prediction_target")):
        assert f"- {line}" in said, "the declared answer of each variant"
    one = overview.overview(kept, ["prediction_target"]).set_index("variant").loc["eps against v"]
    assert one.cost in said and "3 seeds" in said and "commit 0123abc." in said and "6,400 images seen" in said
    assert "](../../outputs/published/prediction_target/report.md)" in said


def test_what_was_found_follows_its_numbers(kept):
    "Another number in the files is another sentence: nothing is written by hand."
    before = overview.found("prediction_target", kept).data
    path = kept / "prediction_target" / "table.csv"
    rows = pd.read_csv(path)
    mine = (rows.variant == "eps") & (rows.metric == "joint[invented]")
    rows.loc[mine, ["decision", "ratio", "ratio_low", "ratio_high"]] = "better", 0.5, 0.4, 0.6
    rows.to_csv(path, index=False)
    after = overview.found("prediction_target", kept).data
    assert "eps is worse than v" in before and "eps is better than v on joint[invented]: -50.0% [-60.0%, -40.0%]" in after
    assert "-50% [-60%, -40%] (better)" in after


def test_what_was_found_of_nothing(tmp_path):
    assert "Not published yet" in overview.found("immiscible", tmp_path).data and "--publish" in overview.found("immiscible", tmp_path).data


def test_a_number_that_is_no_test_of_ours_says_why_and_not_agrees(tmp_path):
    line = "tread,{v},cpu,,3,{m},{mean},,,{d},{d},{d},0.01,0.01,{word},9,one"
    rows = [line.format(v=v, m=m, mean=100, d=d, word=word) for v, d, word in (("dense", "", "baseline"), ("tread", 10, "worse")) for m in ("joint[a]", "FD[a]", "MMD[a]")]
    (tmp_path / "tread").mkdir()
    (tmp_path / "tread" / "table.csv").write_text("\n".join([",".join(results.COLUMNS[:-len(results.DECIDED)]), *rows]))
    said = overview.overview(tmp_path, ["tread"]).agreement[0]
    assert said == "256 px: agrees; 1024 px: not comparable (1024 tokens, ours 64 at preset cpu)"
    assert said in overview.found("tread", tmp_path).data


ROOT = Path(__file__).parents[1]


def found_cells():
    "(notebook, ablation, stored Markdown) of every cell that says what was found."
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        for cell in json.loads(path.read_text())["cells"] if ".ipynb_checkpoints" not in path.parts else ():
            asked = re.search(r'^found\("(\w+)"\)$', "".join(cell["source"]), re.M)
            if asked:
                shown = [o["data"]["text/markdown"] for o in cell["outputs"] if "text/markdown" in o.get("data", {})]
                yield path.stem, asked[1], "".join(shown[0]) if shown else ""


@pytest.mark.parametrize("notebook,name,stored", found_cells(), ids=lambda value: value if len(value) < 20 else "")
def test_what_a_notebook_says_was_found_is_what_the_files_say_now(notebook, name, stored):
    assert stored == overview.found(name).data, f"{notebook} says what its runs said once; execute it again"


def test_every_technique_says_what_was_found():
    told = {notebook for notebook, _, _ in found_cells()}
    techniques = {path.stem for path in (ROOT / "nbs/techniques").glob("[0-9]*.ipynb")}
    assert techniques <= told and {"18_optimizers", "19_precision", "20_average"} <= told


def test_no_number_of_a_run_stands_in_the_prose_about_it():
    "Below `What we found` numbers come from cells."
    for path in sorted((ROOT / "nbs/techniques").glob("[0-9]*.ipynb")):
        cells, on = json.loads(path.read_text())["cells"], False
        for cell in cells:
            text = "".join(cell["source"])
            on = on or text.startswith("## What we found")
            if on and cell["cell_type"] == "markdown":
                assert not re.search(r"\d+(\.\d+)? ?%|\d\.\d{2}", text), f"{path.name}: {text[:80]}"


EFFICIENT = [path for a in ablations.known().values() if a.efficient for path in sorted((ROOT / "outputs/published" / a.name).rglob("report.md"))]


@pytest.mark.parametrize("path", EFFICIENT, ids=lambda p: p.parent.relative_to(ROOT / "outputs/published").as_posix())
def test_a_report_says_of_time_what_the_pages_say(path):
    "Steps are measured in turns after the runs; `make docs` says the sentence again."
    published, home = ROOT / "outputs/published", path.parent
    ablation = ablations.get(home.relative_to(published).parts[0])
    found = efficiency.efficiencies(results.from_records(home / "records"), ablation, published, results.said(home, ablation))
    assert found and all(f"**{efficiency.headline(f)}**" in path.read_text() for f in found.values()), "run `make docs`"


def test_a_published_word_stands_when_other_questions_scatter_more(kept):
    "What is borrowed grows with each question that is published; what was said is read, with the effect it was said of."
    home, asked = kept / "prediction_target", ablations.get("prediction_target")
    rows = pd.read_csv(home / "table.csv")
    mine = (rows.variant == "x") & (rows.metric == "joint[invented]")
    before = results.said(home, asked)["x"]
    rows.loc[mine, ["decision", "error"]] = "undecided", 0.5
    rows.to_csv(home / "table.csv", index=False)
    after = results.said(home, asked)["x"]
    assert before.word != after.word == "undecided" and after.effect.error == 0.5 and after.ratio == before.ratio
    assert overview.overview(kept, ["prediction_target"]).set_index("variant")["joint, ours"]["x against v"].endswith("(undecided)")
