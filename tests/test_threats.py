"Nobody's files, nobody's code: what a folder that came from elsewhere may hold, and that nothing of it is deleted, written through, run or loaded."
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from toys import toy

from prx_nb.core import checkpoint, files, recipe
from prx_nb.core.files import write_json
from prx_nb.lab import ablations, batch, plan, report, results, run, slurm, watch
from prx_nb.lab.page import Page, as_html, markdown

RAN = "import pathlib; pathlib.Path({!r}).write_text('ran')\n"
RECORD = "import json, pathlib\n(pathlib.Path(out) / 'record.json').write_text(json.dumps({'status': 'done', 'metrics': {'KID[toy]': 0.5}}))\n"


@pytest.fixture
def thesis(tmp_path):
    "A folder of somebody's own; nothing of it may change."
    folder = tmp_path / "home" / "thesis"
    folder.mkdir(parents=True)
    for name in ("a.tex", "step-0000001.safetensors", "job.json"):
        (folder / name).write_text(f"years of work on {name}")
    yield folder
    assert {p.name: p.read_text() for p in folder.iterdir()} == {n: f"years of work on {n}" for n in ("a.tex", "step-0000001.safetensors", "job.json")}


def prx(*words, cwd, **env):
    "The command in a process of its own, from any folder."
    command = [sys.executable, "-P", "-c", "from prx_nb.lab.cli import main; main()", *map(str, words)]
    root = str(Path(files.__file__).parents[2])
    done = subprocess.run(command, cwd=cwd, env=os.environ | {"PYTHONPATH": root} | env, capture_output=True, text=True, timeout=200)
    return done.returncode, done.stdout + done.stderr


# --- nothing is deleted that this program did not make


def test_a_scratch_folder_named_in_a_status_is_not_believed(tmp_path, thesis):
    [job] = plan.plan(toy(tmp_path, "ok", body=RECORD), out=tmp_path)
    write_json(Path(job.out) / "status.json", {"state": "running", "key": job.key, "host": "colleague-pc", "pid": 1, "born": 0, "scratch": str(thesis)})
    os.utime(Path(job.out) / "status.json", (time.time() - 1000,) * 2)
    assert batch.run([job], prepare=None, say=lambda line: None)[0]["state"] == "done"


@pytest.mark.parametrize("how", ["a name", "a link", "a link above", "below a link"])
def test_clean_leaves_what_is_not_ours(tmp_path, thesis, how):
    group = tmp_path / "out" / "toy" / "smoke"
    (group / "v-s0").mkdir(parents=True)
    for name in ("job", "status"):
        write_json(group / "v-s0" / f"{name}.json", {"state": "cell error"})
    if how == "a name":                                            # folders that are called as ours are
        for name in (".removed/photos", ".replaced/photos", "notes/.replaced/x"):
            (group / name).mkdir(parents=True)
            (group / name / "a.jpg").write_text("precious")
    elif how == "a link":                                          # links in places where ours lie
        for name in (".removed", ".replaced", "report", "other-s0", "v-s0/checkpoint"):
            (group / name).symlink_to(thesis)
    elif how == "a link above":
        write_json(tmp_path / "home" / "status.json", {"state": "cell error"})
        write_json(tmp_path / "home" / "job.json", {})
        (group.parent / "cpu").symlink_to(tmp_path, target_is_directory=True)
    else:
        (group / ".replaced").mkdir()
        (group / ".replaced" / "old-s0").symlink_to(thesis)
        (group / "v-s0" / ".x.1.part").symlink_to(thesis / "a.tex")
    before = {p for p in (tmp_path / "out").rglob("*.jpg")}
    gone, _ = watch.clean(tmp_path / "out", failed=True, checkpoints=True)
    assert [i.path for i in gone] == [group / "v-s0"] and before == {p for p in (tmp_path / "out").rglob("*.jpg")}
    assert not list((tmp_path / "home").rglob(".lock")) and not list(thesis.rglob(".lock"))


def test_clean_names_each_thing_before_it_goes(tmp_path):
    for n in range(3):
        for name in ("job", "status"):
            write_json(tmp_path / "g" / f"v-s{n}" / f"{name}.json", {"state": "cell error"})
    code, said = prx("clean", tmp_path, "--failed", cwd=tmp_path)
    assert code == 0 and [str(tmp_path / "g" / f"v-s{n}") in said for n in range(3)] == [True] * 3
    told = []
    write_json(tmp_path / "g" / "w-s0" / "job.json", {})
    write_json(tmp_path / "g" / "w-s0" / "status.json", {"state": "timeout"})
    watch.clean(tmp_path, failed=True, say=lambda item: told.append(item.path.exists()))
    assert told == [True]


def test_a_folder_that_is_no_runs_is_not_moved_and_what_is_set_aside_is_kept(tmp_path, thesis):
    [job] = plan.plan(toy(tmp_path, "ok", body=RECORD), out=tmp_path)
    Path(job.out).parent.mkdir(parents=True)
    shutil.copytree(thesis, job.out)
    (Path(job.out) / "job.json").unlink()
    with pytest.raises(ablations.AblationError, match="is no run's"):
        batch.run([job], prepare=None, say=lambda line: None)
    assert (Path(job.out) / "a.tex").exists()
    for old in range(3):
        shutil.rmtree(job.out, ignore_errors=True)
        write_json(Path(job.out) / "status.json", {"state": "done", "key": "older", "old": old})
        batch.set_aside(job)
    assert sorted(run.read_status(p)["old"] for p in (Path(job.out).parent / ".replaced").iterdir()) == [0, 1, 2]


def test_checkpoints_that_are_links_stay(tmp_path, thesis):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "step-0000001.safetensors").symlink_to(thesis / "step-0000001.safetensors")
    (folder / "step-mine.safetensors").write_text("mine")
    assert checkpoint.checkpoints(folder) == [] and len(list(folder.iterdir())) == 2


# --- nothing is written through a link


@pytest.mark.parametrize("name", [".lock", "log.txt", ".reserve", "status.json", "job.json", "notebook.ipynb", "record.json", "progress.json"])
def test_a_run_writes_through_no_link(tmp_path, name):
    [job] = plan.plan(toy(tmp_path, "ok", body=RECORD.replace("(pathlib.Path(out) / 'record.json').write_text", "print") if name == "record.json" else RECORD), out=tmp_path)
    mine = tmp_path / "mine"
    mine.write_text("important")
    Path(job.out).mkdir(parents=True)
    (Path(job.out) / name).symlink_to(mine)
    write_json(Path(job.out) / ("recipe.json" if name == "status.json" else "status.json"), {"state": "killed", "key": job.key})
    said = batch.run([job], prepare=None, say=lambda line: None)
    assert mine.read_text() == "important"
    if name in (".lock", "log.txt"):
        assert said[0]["state"] == "not started" and f"{job.out}/{name} is a link" in said[0]["error"]
        (Path(job.out) / name).unlink()                            # as it says; then the same command does it
        assert batch.run([job], prepare=None, say=lambda line: None)[0]["state"] == "done"


@pytest.mark.parametrize("name", [".lock", ".replaced"])
def test_a_batch_writes_through_no_link_in_its_folder(tmp_path, thesis, name):
    [job] = plan.plan(toy(tmp_path, "ok", body=RECORD), out=tmp_path)
    write_json(Path(job.out) / "status.json", {"state": "done", "key": "older"})
    (job.group / name).symlink_to(thesis if name == ".replaced" else thesis / "a.tex")
    with pytest.raises(OSError, match=f"{name} is a link"):
        batch.run([job], prepare=None, say=lambda line: None)


def test_a_report_writes_through_no_link(tmp_path):
    group, mine = results.pretend_runs(tmp_path, 2), tmp_path / "mine"
    mine.write_text("important")
    (group / "report").mkdir()
    for name in ("report.ipynb", "report.md", "report.html", "table.csv", "curves.png"):
        (group / "report" / name).symlink_to(mine)
    report.make_report(group)
    assert mine.read_text() == "important" and "Verdict" in (group / "report" / "report.md").read_text()
    (group / "report" / "log.txt").unlink()
    (group / "report" / "log.txt").symlink_to(mine)
    with pytest.raises(OSError, match="log.txt is a link"):
        report.make_report(group)
    shutil.move(group / "report", tmp_path / "elsewhere")
    (group / "report").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(results.ReportError, match="report is a link"):
        report.make_report(group)
    assert mine.read_text() == "important"


def test_nothing_from_elsewhere_is_published(tmp_path):
    group, secret = results.pretend_runs(tmp_path, 1), tmp_path / "secret"
    secret.write_text("a key")
    report.write_report(group)
    (group / "report" / "extra.csv").symlink_to(secret)
    to = report.publish(group, tmp_path)
    assert (to / "table.csv").exists() and not (to / "extra.csv").exists()


# --- nobody's code is run


@pytest.mark.parametrize("module", ["random", "pandas", "torch", "IPython"])
def test_a_module_in_the_working_folder_is_not_run(tmp_path, module):
    work, ran = tmp_path / "work", tmp_path / "ran"
    work.mkdir()
    (work / f"{module}.py").write_text(RAN.format(str(ran)))
    toy(tmp_path, "ok", body="import random, pandas\n" + RECORD)
    code, said = prx("ablate", tmp_path / "toy.ipynb", "--preset", "smoke", "--seeds", "1", "--no-report", "--out", tmp_path / "o", cwd=work)
    assert "1 done" in said and "Traceback" not in said and not ran.exists(), said


def test_a_module_in_the_folder_of_a_run_or_of_a_report_is_not_run(tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    jobs = plan.plan(toy(tmp_path, "a", "b", body="import colorsys, wave\n" + RECORD), out=tmp_path)
    for job in jobs:
        Path(job.out).mkdir(parents=True)
        write_json(Path(job.out) / "status.json", {"state": "killed", "key": job.key})
        for module in ("colorsys", "wave", "pandas", "sitecustomize"):
            (Path(job.out) / f"{module}.py").write_text(RAN.format(str(ran)))
    assert batch.run(jobs[:1], prepare=None, say=lambda line: None)[0]["state"] == "done"
    assert run.supervise(jobs[1])["state"] == "done", "a fresh process, with a kernel forked in it"
    scratch = run.scratch_folder(tmp_path)
    run.execute(jobs[1].notebook, Path(jobs[1].out) / "notebook.ipynb", jobs[1].parameters, scratch)     # and an ordinary kernel
    shutil.rmtree(scratch)
    group = results.pretend_runs(tmp_path / "r", 2)
    (group / "report").mkdir()
    for module in ("pandas", "matplotlib", "colorsys"):
        (group / "report" / f"{module}.py").write_text(RAN.format(str(ran)))
    report.make_report(group)
    assert not ran.exists()


def test_a_notebook_that_only_a_run_names_is_not_run(tmp_path):
    ran = tmp_path / "ran"
    [job] = plan.plan(toy(tmp_path / "a", "base", body=RECORD, name="own") if (tmp_path / "a").mkdir() is None else None, out=tmp_path / "o")
    evil = tmp_path / "evil.ipynb"
    evil.write_text(Path(job.notebook).read_text().replace("from prx_nb", f"open({str(ran)!r}, 'w')\\nfrom prx_nb", 1))
    folder = Path(job.out)
    for how in ({"notebook": str(evil)}, {"notebook": str(evil), "declared": {}}, {"ablation": str(evil), "notebook": ""}, {"ablation": "prediction_target", "notebook": str(evil)}):
        write_json(folder / "job.json", asdict(job) | how)
        write_json(folder / "status.json", {"state": "cell error", "key": job.key})
        write_json(folder / "record.json", {"status": "done", "ablation": how.get("ablation", "own"), "variant": "base", "seed": 0, "preset": "smoke", "metrics": {"val": 1.0}})
        for words in (["report", folder.parent], ["status", folder.parent], ["retry", folder.parent, "--dry-run"], ["clean", folder.parent, "--dry-run"]):
            code, said = prx(*words, cwd=tmp_path)
            assert not ran.exists(), (how, words)
            assert "unexpected" not in said
    write_json(folder / "job.json", asdict(job) | {"notebook": str(evil)})
    code, said = prx("retry", folder.parent, "--dry-run", cwd=tmp_path)
    assert code == 2 and "has not been used here" in said and f"prx-nb ablate {evil} --dry-run" in said
    assert prx("ablate", evil, "--preset", "smoke", "--dry-run", cwd=tmp_path)[0] == 0 and ran.exists(), "who names it has it run"
    assert prx("retry", folder.parent, "--dry-run", cwd=tmp_path)[0] == 0


def test_code_that_only_a_recipe_of_a_run_uses_is_not_run(tmp_path, monkeypatch):
    from prx_nb.core.train import Run
    monkeypatch.setenv("PRX_NB_CACHE", str(tmp_path / "cache"))
    ran, evil = tmp_path / "ran", tmp_path / "evil.py"
    evil.write_text(RAN.format(str(ran)))
    (tmp_path / "run").mkdir()
    tree = recipe.preset("smoke").model_dump(mode="json")
    for name in (str(evil), "antigravity"):
        (tmp_path / "run" / "recipe.json").write_text(json.dumps(tree | {"uses": [name]}))
        with pytest.raises(recipe.RecipeError, match="has not been used on this machine"):
            Run.load(tmp_path / "run")
        code, said = prx("sample", tmp_path / "run", "--prompt", "a cat", cwd=tmp_path)
        assert code == 2 and "has not been used" in said and not ran.exists()
    recipe.use(str(evil))
    assert ran.read_text() == "ran", "who names it has it run"
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(tree | {"uses": [str(evil)]}))
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint"):
        Run.load(tmp_path / "run")


@pytest.mark.parametrize("setting", ["text.encoder", "techniques.repa.encoder"])
def test_code_in_the_folder_of_an_encoder_is_neither_run_nor_asked_about(tmp_path, setting):
    from safetensors.numpy import save_file
    import numpy as np
    ran, folder = tmp_path / "ran", tmp_path / "enc"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModel": "own.M"}}))
    (folder / "own.py").write_text(RAN.format(str(ran)))
    (folder / "tokenizer.json").write_text("{}")
    save_file({"a": np.zeros(1, np.float32)}, folder / "model.safetensors")
    from prx_nb.core import encoders, text
    with pytest.raises(ValueError, match="code of its own, which is never run"):
        text.load_text_encoder(str(folder)) if setting.startswith("text") else encoders._from_hub(str(folder))
    assert not ran.exists()


def test_weights_that_would_be_unpickled_are_refused(tmp_path):
    import pickle
    import torch
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return exec, (RAN.format(str(ran)),)

    from prx_nb.core import encoders, latents, recipe as recipes, text
    for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(pickle.dumps(Evil()))
        torch.save({"a": torch.zeros(1)}, folder / "other.bin")
        (folder / "config.json").write_text(json.dumps({"model_type": "bert", "_class_name": "AutoencoderKL"}))
        (folder / "tokenizer.json").write_text("{}")
        (folder / "model.safetensors.index.json").write_text("{}")
        for load in (lambda: text.load_text_encoder(str(folder)), lambda: encoders._from_hub(str(folder)),  # noqa: B023
                     lambda: latents.load_latents(recipes.Latents(autoencoder=str(folder), channels=4, factor=8))):  # noqa: B023
            with pytest.raises(ValueError):
                load()
    assert not ran.exists()


def test_no_pickle_and_no_remote_code_stands_in_the_package():
    import ast
    root = Path(files.__file__).parents[1]
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {a.name for a in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}, path
            if isinstance(node, ast.Call):
                called, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert called != "torch.load" or given.get("weights_only") == "True", path
                assert given.get("allow_pickle", "False") == "False" and given.get("trust_remote_code", "False") == "False", path
                assert called not in ("np.load", "numpy.load") or "allow_pickle" in given or path.name == "images.py", path
                first = ast.unparse(node.args[0]) if node.args else ""
                assert not (called.startswith("subprocess.") and "sys.executable" in first) or "pip" in first, (path, first)


def test_a_folder_of_pickled_tasks_is_nobody_elses(tmp_path):
    (tmp_path / ".slurm").symlink_to(tmp_path)
    with pytest.raises(slurm.SlurmError, match="is a link"):
        slurm._private(tmp_path / ".slurm")


# --- text is text


@pytest.mark.parametrize("words", ["![x](http://evil.example/a.png)", "[x](javascript:alert(1))", "<img src=http://evil.example/a.png>", "` <img src=http://evil.example/a> ``",
                                   "a\n\n<img src=http://evil.example/a>", "x]: y\n\n![x][x]\n\n[x]: http://evil.example/a.png", "**![a](http://evil.example/b)**",
                                   "a\n```\n</code><img src=http://evil.example/a>", "**a` <img src=http://evil.example/q> `**"])
def test_words_of_a_record_load_nothing_and_lead_nowhere(tmp_path, words):
    import mistune
    import pandas as pd
    page = Page(tmp_path, words)
    for kind in ("p", "h2", "h3", "li", "small", "warn", "code"):
        page.text(words, kind)
    page.frame(pd.DataFrame({words: [words]}), words)
    with page.folded(words):
        page.text(words)
    for made in (mistune.html(markdown(page)), as_html(page)):
        assert "<img" not in made.replace("&lt;img", "") and "<a href=\"http" not in made and "<a href=\"javascript" not in made
    assert "Content-Security-Policy\" content=\"default-src 'none'" in as_html(page)


def test_words_of_a_record_give_a_terminal_no_orders(tmp_path, capsys):
    for name, words in (("error", "\x1b]0;owned\x07\x1b[2Jboom"), ("host", "\x1b[31mx"), ("slurm", "\x1b[31m")):
        write_json(tmp_path / f"{name}-s0" / "job.json", {})
        write_json(tmp_path / f"{name}-s0" / "status.json", {"state": "cell error" if name == "error" else "running", "host": "elsewhere", name: words})
    write_json(tmp_path / "done-s0" / "job.json", {})
    write_json(tmp_path / "done-s0" / "status.json", {"state": "done"})
    write_json(tmp_path / "done-s0" / "record.json", {"status": "done", "metrics": {"KID\x1b[2J": 1.0}})
    watch.show([tmp_path], tmp_path, everything=True)
    said = capsys.readouterr().out
    assert "boom" in said and "\x1b" not in said and "\x07" not in said


# --- what a status says is checked


@pytest.mark.parametrize("status", [{"pid": -1}, {"pid": 2 ** 80}, {"pid": "1"}, {"pid": True}, {"born": None}, {"history": 5}, {"seconds": "x"}, {"error": ["x"]}, {"device": 7}, {"state": ["running"]}, {"cell": {}}])
def test_a_status_of_any_kind_stops_nobody(tmp_path, status):
    [job] = plan.plan(toy(tmp_path, "ok", body=RECORD), out=tmp_path)
    whole = {"state": "running", "key": job.key, "host": os.uname().nodename, "pid": 1 << 22, "born": 1.0} | status
    write_json(Path(job.out) / "status.json", whole)
    write_json(Path(job.out) / "job.json", {})
    assert len(watch.survey(tmp_path)) == 1
    assert batch.run([job], prepare=None, say=lambda line: None)[0]["state"] == "done"
