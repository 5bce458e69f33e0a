"Damaged, copied and senseless files of runs: each is mended or named, and takes nothing from the other runs."
import json
import shutil

import pytest

from prx_nb.core import recipe
from prx_nb.core.files import read_json
from prx_nb.core.train import train
from prx_nb.lab import report, results, watch

SMOKE = recipe.preset("smoke")


@pytest.mark.parametrize("content", [b"", b"PAR1 half", None])
def test_a_run_goes_on_beside_a_damaged_curve(whole, prepared, tmp_path, content, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole.dir, folder)
    max(folder.glob("checkpoint/step-*.safetensors")).unlink()
    (folder / "curves.parquet").unlink()
    if content is not None:
        (folder / "curves.parquet").write_bytes(content)
    again = train(SMOKE, folder, prepared=prepared, progress=False, device="cpu")
    assert "curves.parquet" in capsys.readouterr().out and again.curves.step.min() > 1
    kept = read_json(folder / "record.json")
    assert kept["status"] == "done" and "begins at step" in kept["curve_lost"]
    assert content is None or (folder / "curves.parquet.broken").read_bytes() == content
    assert all((a == b).all() for a, b in zip(again.model.state_dict().values(), whole.model.state_dict().values())), "the weights are the same to the bit"


@pytest.mark.parametrize("content", [b"{", b"\xff\x00\x01", b"[1]", b"", b"[" * 100_000])
def test_a_run_goes_on_beside_a_damaged_record(whole, prepared, tmp_path, content, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole.dir, folder)
    max(folder.glob("checkpoint/step-*.safetensors")).unlink()
    (folder / "record.json").write_bytes(content)
    again = train(SMOKE, folder, prepared=prepared, progress=False, device="cpu")
    assert "record.json" in capsys.readouterr().out and len(again.curves) == len(whole.curves)
    kept = read_json(folder / "record.json")
    assert kept["status"] == "done" and kept["broken_record"] == "record.json.broken" and (folder / "record.json.broken").read_bytes() == content
    assert kept["metrics"] == whole.record["metrics"]


BAD = {"a metric null": ("record.json", lambda r: r | {"metrics": r["metrics"] | {"val": None}}),
       "all metrics words": ("record.json", lambda r: r | {"metrics": {"val": "low"}}),
       "metrics a list": ("record.json", lambda r: r | {"metrics": [1]}),
       "a seed that is none": ("record.json", lambda r: r | {"seed": "x"}),
       "no variant": ("record.json", lambda r: {k: v for k, v in r.items() if k != "variant"}),
       "costs of words": ("record.json", lambda r: r | {"cost": {k: "much" for k in r["cost"]}, "versions": 3, "hardware": 7, "git_commit": ["x"]}),
       "no record": ("record.json", lambda r: "half"),
       "a recipe that is none": ("recipe.json", lambda r: {"train": {"steps": "many"}}),
       "a job that is none": ("job.json", lambda r: [1]),
       "a status that is none": ("status.json", lambda r: {"state": "done", "history": [1], "attempt": "x"}),
       "samples that are none": ("samples.safetensors", None), "a curve that is none": ("curves.parquet", None)}


@pytest.mark.parametrize("what", [*BAD, "a copy"])
def test_one_bad_run_breaks_no_report(tmp_path, what):
    group = results.pretend_runs(tmp_path, 3)
    run = group / "eps-s1"
    if what == "a copy":
        shutil.copytree(run, group / "eps-s1.bak")
        shutil.copytree(run, group / "a copy of it")
    else:
        name, change = BAD[what]
        (run / name).write_text(json.dumps(change(read_json(run / name)))) if change else (run / name).write_bytes(b"half")
    page = report.write_report(group)
    found = results.collect(group)
    assert len(found) in (8, 9) and len(found[found.variant == "x"]) == 3 and not found[["variant", "seed"]].duplicated().any()
    out = results.unfinished(group).set_index("run")
    if len(found) == 8 and what != "no record":
        text = (page.folder / "report.md").read_text()
        assert out.state["eps-s1"] == "left out" and "left out" in text and "its record.json" in text
    if what == "a copy":
        assert set(out.index) == {"eps-s1.bak", "a copy of it"} and (out.cause == "a copy of eps-s1, by its record.json").all()
    assert len(watch.survey(group)) == 9 + 2 * (what == "a copy")
