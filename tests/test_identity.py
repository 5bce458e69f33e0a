"What decides a run is told part by part: comments change nothing, constants change what uses them."
import os
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from PIL import Image

from prx_nb.core import data
from prx_nb.core import recipe as recipes
from prx_nb.core.batch import data_key, prepare
from prx_nb.core.checkpoint import CheckpointError, read_checkpoint
from prx_nb.core.files import read_json, write_json
from prx_nb.core.recipe import preset
from prx_nb.core.technique import Technique
from prx_nb.core.train import train
from prx_nb.lab import ablations, batch, cli, identity, plan, report, results

PACKAGE = Path(recipes.__file__).parents[1]
SMOKE = preset("smoke")
TREAD = SMOKE.replace("techniques.tread.rate", 0.5)


@pytest.fixture
def keys(tmp_path, monkeypatch):
    "Keys of runs by a copy of the package that may be edited."
    copy = tmp_path / "prx_nb"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    notebook = Path(ablations.get("prediction_target").notebook)

    def of(recipe):
        identity._reached.cache_clear()
        return identity.key(identity.parts(notebook, {"variant": "v"}, recipe, copy))
    return copy, of


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_a_comment_or_a_docstring_changes_no_key(keys):
    copy, of = keys
    first = of(SMOKE), of(TREAD)
    for path in copy.rglob("*.py"):
        path.write_text("# a comment\n" + path.read_text() + "\n\n# another\n")
    edit(copy / "core/flow.py", '    "Move times towards noise', '    "Pull times towards noise')
    assert (of(SMOKE), of(TREAD)) == first


def test_a_constant_in_flow_changes_all_and_one_in_tread_only_those_that_use_it(keys):
    copy, of = keys
    first = of(SMOKE), of(TREAD)
    edit(copy / "techniques/tread.py", "rate: float = 0.5", "rate: float = 0.6")
    assert of(SMOKE) == first[0] and of(TREAD) != first[1]
    edit(copy / "core/flow.py", "MIN_TIME = 1e-3", "MIN_TIME = 2e-3")
    assert of(SMOKE) != first[0]


def test_what_only_reports_is_in_no_key(keys):
    copy, of = keys
    first = of(SMOKE)
    for name in ("report", "figures", "batch", "slurm", "cli", "docs"):
        (copy / "lab" / f"{name}.py").write_text("changed = True")
    assert of(SMOKE) == first


def test_a_recipe_that_uses_a_file_has_its_meaning_in_the_key(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("answer = 42")
    notebook = Path(ablations.get("prediction_target").notebook)
    of = lambda: identity.key(identity.parts(notebook, {}, SMOKE.replace("uses", [str(mine)])))
    first = of()
    mine.write_text("answer = 42  # the same")
    assert of() == first
    mine.write_text("answer = 43")
    assert of() != first


def test_finished_runs_that_no_longer_count_are_named_before_they_are_trained_again(tmp_path, monkeypatch):
    toy = plan.pretend_ablation(tmp_path, "ok", "other")
    first, said = plan.plan(toy, seeds=2, out=tmp_path), []
    batch.run(first, prepare=None, say=said.append)
    assert not batch.outdated(first) and not any("no longer" in line for line in said)
    now = identity.libraries()
    monkeypatch.setattr(identity, "libraries", lambda: now | {"torch": "0.1"})
    [line] = batch.outdated(plan.plan(toy, seeds=2, out=tmp_path))
    assert line.startswith("4 finished runs no longer count and will be trained again") and "library torch was 2" in line and "is 0.1" in line


def test_a_run_on_other_data_does_not_go_on(prepared, tmp_path):
    from dataclasses import replace
    recipe = SMOKE.replace({"train.steps": 4, "train.checkpoint_every": 2})
    run = train(recipe, tmp_path, prepared=prepared, progress=False)
    assert run.record["data_key"] == data_key(prepared)
    pixels = prepared.images.pixels.copy()
    pixels[0, 0, 0, 0] ^= 1
    other = replace(prepared, images=replace(prepared.images, pixels=pixels))
    with pytest.raises(CheckpointError, match=f"{data_key(prepared)}.*{data_key(other)}"):
        train(recipe, tmp_path, prepared=other, progress=False)


def pictures(folder, count=24):
    "Small images, each with a caption beside it."
    folder.mkdir(parents=True)
    for n in range(count):
        Image.new("RGB", (12, 9), (10 * n, 255 - 10 * n, 99)).save(folder / f"i{n:02d}.png")
        (folder / f"i{n:02d}.txt").write_text(f"colour number {n}")
    return folder


def small(folder, **more):
    return preset("smoke").replace({"data.source": "folder", "data.path": str(folder), "data.limit": None,
                                           "data.holdout_concepts": 0.3, "train.steps": 4, "train.checkpoint_every": 2,
                                           "train.validate_every": 4} | more)


def both_keys(folder):
    asked = small(folder)
    return data.source_key(asked.data), data_key(prepare(asked, progress=False))


def test_the_data_key_is_of_what_is_in_the_files_and_not_of_the_files(tmp_path):
    home = pictures(tmp_path / "set")
    first = both_keys(home)
    os.utime(home / "i03.png")
    os.utime(home / "i04.txt", (1, 1))
    (home / "notes.pdf").write_text("not an image")
    assert both_keys(home) == first, "touched"
    assert both_keys(shutil.copytree(home, tmp_path / "elsewhere")) == first, "copied"
    (home / "i03.txt").write_text("colour number three")
    caption = both_keys(home)
    with Image.open(home / "i03.png") as image:
        image.putpixel((5, 5), (0, 0, 0))
        image.save(home / "i03.png")
    pixel = both_keys(home)
    assert len({first[0], caption[0], pixel[0]}) == 3 and len({first[1], caption[1], pixel[1]}) == 3


def test_the_same_pixels_in_another_file_are_other_files_but_the_same_data(tmp_path):
    home = pictures(tmp_path / "set")
    files, key = both_keys(home)
    with Image.open(home / "i03.png") as image:
        image.save(home / "i03.png", compress_level=0)
    assert both_keys(home) == (data.source_key(small(home).data), key) and data.source_key(small(home).data) != files


def test_a_source_is_read_again_only_when_its_files_look_different(tmp_path, monkeypatch):
    home = pictures(tmp_path / "set")
    read, real = [], data._hash_files
    monkeypatch.setattr(data, "_hash_files", lambda *a: read.append(1) or real(*a))
    asked = small(home).data
    with data.looked_at_once():
        first = data.source_key(asked)
        (home / "i03.txt").write_text("another")
        assert data.source_key(asked) == first and len(read) == 1, "a plan looks once"
    assert data.source_key(asked) == data.source_key(asked) != first and len(read) == 2


class Stop(Technique):
    "Interrupts a training."
    observes = True

    def needs(self, batch, step):
        if step == 3:
            raise KeyboardInterrupt
        return super().needs(batch, step)


def test_a_run_goes_on_only_with_the_data_it_began_with(tmp_path):
    home, out = pictures(tmp_path / "set"), tmp_path / "run"
    asked = small(home)
    with pytest.raises(KeyboardInterrupt):
        train(asked, out, progress=False, techniques=[Stop()], device="cpu")
    there = read_json(out / "record.json")["data_key"]
    assert read_checkpoint(out / "checkpoint" / "step-0000002.safetensors")[1]["data"] == there
    text = (home / "i03.txt").read_text()
    (home / "i03.txt").write_text("quite another thing")
    here = data_key(prepare(asked, progress=False))
    with pytest.raises(CheckpointError) as error:
        train(asked, out, progress=False, device="cpu")
    assert there != here and there in str(error.value) and here in str(error.value) and "choose another" in str(error.value)
    (home / "i03.txt").write_text(text)
    assert train(asked, out, progress=False, device="cpu").record["status"] == "done", "put back, it goes on"


def test_a_markdown_cell_changes_no_key_and_code_does(tmp_path):
    toy = plan.pretend_ablation(tmp_path, "ok")
    key = lambda: plan.plan(toy, out=tmp_path)[0].key
    path, first = Path(toy.notebook), key()
    nb = read_json(path)
    nb["cells"].append({"cell_type": "markdown", "id": "words", "metadata": {}, "source": ["Words."]})
    nb["cells"][2]["source"] = ["# what follows\n", *nb["cells"][2]["source"]]
    write_json(path, nb)
    assert key() == first
    nb["cells"][2]["source"] += ["\nmore = 1"]
    write_json(path, nb)
    assert key() != first


def test_a_plan_of_local_images_notices_what_changed_in_them(tmp_path):
    home, toy = pictures(tmp_path / "set"), plan.pretend_ablation(tmp_path, "ok")
    where = {"data.source": "folder", "data.path": str(home)}
    made = lambda: plan.plan(toy, overrides=where, out=tmp_path)[0]
    first = made()
    os.utime(home / "i03.png", (1, 1))
    assert made().key == first.key
    (home / "i03.txt").write_text("another thing")
    [line] = identity.differences(first.parts, made().parts)
    assert line == f"what is in data.path {home} changed"
    shutil.rmtree(home)
    assert made().key != first.key, "a folder that is not there is for the run to refuse"


def test_what_a_file_of_ones_own_imports_is_in_the_key(keys, tmp_path):
    copy, _ = keys
    mine, notebook = tmp_path / "mine.py", tmp_path / "plain.ipynb"
    mine.write_text("from prx_nb.core import flow")
    write_json(notebook, {"cells": []})
    found = identity.parts(notebook, {}, SMOKE.replace("uses", [str(mine)]), copy)
    assert "module prx_nb.core.flow" in found and "module prx_nb.core.flow" not in identity.parts(notebook, {}, SMOKE, copy)


def test_a_technique_may_be_a_folder(keys):
    copy, of = keys
    (copy / "techniques" / "tread").mkdir()
    (copy / "techniques" / "tread.py").rename(copy / "techniques" / "tread" / "__init__.py")
    first = of(SMOKE), of(TREAD)
    edit(copy / "techniques/tread/__init__.py", "rate: float = 0.5", "rate: float = 0.6")
    assert of(SMOKE) == first[0] and of(TREAD) != first[1]


def test_a_thousand_keys_are_quick():
    notebook, begin = Path(ablations.get("prediction_target").notebook), time.perf_counter()
    for n in range(1000):
        identity.key(identity.parts(notebook, {"variant": str(n)}, TREAD))
    assert time.perf_counter() - begin < 2


def test_the_line_before_retraining_names_the_module_and_the_time_and_nothing_is_moved_by_it(tmp_path):
    toy = plan.pretend_ablation(tmp_path, "ok", "other")
    jobs = plan.plan(toy, out=tmp_path)
    for job, seconds in zip(jobs, (300, 420)):
        older = replace(job, key="older", training="older", parts=job.parts | {"module prx_nb.core.flow": "older"})
        put_done(older, seconds)
    newer = [replace(job, parts=job.parts | {"module prx_nb.core.flow": "newer"}) for job in jobs]
    [line] = batch.outdated(newer)
    assert line == "2 finished runs no longer count and will be trained again: module prx_nb.core.flow changed (estimated 12 min)"
    assert line in cli.plan_in_words(newer, 1)
    for job in jobs:
        put_done(replace(job, key="older", parts=job.parts | {"module prx_nb.core.metrics": "older"}), 300)
    [line] = batch.outdated([replace(job, parts=job.parts | {"module prx_nb.core.metrics": "newer"}) for job in jobs])
    assert line.startswith("2 finished runs no longer count and will be judged again, with the trainings kept: module prx_nb.core.metrics")
    put_done(replace(jobs[0], key="older", parts={}), 30)
    assert "before" in batch.outdated(newer[:1])[0] and "(estimated 30 s)" in batch.outdated(newer[:1])[0]
    assert sorted(p.name for p in jobs[0].group.iterdir()) == ["ok-s0", "other-s0"], "only said"


def put_done(job, seconds):
    write_json(Path(job.out) / "job.json", asdict(job))
    write_json(Path(job.out) / "status.json", {"state": "done", "key": job.key, "seconds": seconds})
    write_json(Path(job.out) / "record.json", {"status": "done", "metrics": {}})


def test_the_report_names_runs_that_asked_for_the_same_data_and_had_other(tmp_path):
    home = results.pretend_runs(tmp_path)
    folders = sorted(path.parent for path in home.glob("*/record.json"))
    for n, folder in enumerate(folders):
        write_json(folder / "record.json", read_json(folder / "record.json") | {"data_key": "bbbb" if n == 0 else "aaaa"})
    [line] = results.odd_runs(results.collect(home))
    assert line.startswith(f"data_key is bbbb for {folders[0].name}, aaaa for the other {len(folders) - 1}")
    report.write_report(home, ablations.get("prediction_target"))
    assert f"Not alike**: {line}" in (home / "report" / "report.md").read_text().replace("\\_", "_")
    job = read_json(folders[0] / "job.json") if (folders[0] / "job.json").exists() else {}
    write_json(folders[0] / "job.json", job | {"recipe": {"captions": {"kind": "short"}}})
    assert results.odd_runs(results.collect(home)) == [], "one that asks for other captions may have them"


def test_what_stands_beside_a_declaration_counts_and_the_declaration_does_not(tmp_path):
    toy = plan.pretend_ablation(tmp_path, "ok")
    key = lambda: plan.plan(toy, out=tmp_path)[0].key
    path, first, nb = Path(toy.notebook), key(), read_json(toy.notebook)
    [cell] = [c for c in nb["cells"] if "ablation" in c["metadata"].get("tags", [])]
    text = "".join(cell["source"])
    cell["source"] = [text.replace("Does it run?", "Does it walk?")]
    write_json(path, nb)
    assert key() == first
    cell["source"] = [text + "\nhelper = 3"]
    write_json(path, nb)
    assert key() != first
