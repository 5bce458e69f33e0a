"One training for several runs: two ablations with the same baseline, trained once, measured as if trained twice."
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import Stops, same

from prx_nb.core.files import write_json
from prx_nb.core.recipe import preset
from prx_nb.core.record import update_record
from prx_nb.core.train import train
from prx_nb.lab import batch, identity, watch
from prx_nb.lab import run as runs
from prx_nb.lab.plan import plan

SMOKE = preset("smoke").replace({"train.steps": 4, "train.validate_every": 2, "train.checkpoint_every": 2})


def offered(folder, *others):
    write_json(folder / "shared.json", {"from": [os.path.relpath(other, folder) for other in others]})
    return folder


def test_a_training_is_taken_over_to_the_last_bit(whole, prepared, tmp_path, capsys):
    out = offered(tmp_path / "b", tmp_path / "nobody", whole.dir)
    run = train(SMOKE, out, prepared=prepared, progress=False, device="cpu")
    same(run, whole)
    assert run.record["trained"]["seconds"] == whole.record["cost"]["train_seconds"] and run.record["cost"] == whole.record["cost"]
    assert (out / run.record["trained"]["by"]).resolve() == whole.dir.resolve() and "taken over" in capsys.readouterr().out
    assert {k: v for k, v in run.record.items() if k != "trained"} == whole.record
    again = train(SMOKE, out, prepared=prepared, progress=False, device="cpu")
    assert again.record == run.record, "nor is it measured anew when it is opened again"
    third = train(SMOKE, offered(tmp_path / "c", out), prepared=prepared, progress=False, device="cpu")
    assert (tmp_path / "c" / third.record["trained"]["by"]).resolve() == whole.dir.resolve(), "the one that trained is named"


def copied(whole, folder):
    shutil.copytree(whole.dir, folder)
    return folder


@pytest.mark.parametrize("fault, words", [("cut", "cannot be read"), ("flip", "checksum"), ("gone", "no checkpoint of its last step"), ("data", "data_key is"),
                                          ("torch", "torch is 0.1 there"), ("hardware", "hardware is"), ("recipe", "recipe_key is"), ("open", "")])
def test_what_is_damaged_or_not_the_same_is_not_taken(whole, prepared, tmp_path, capsys, fault, words):
    source = copied(whole, tmp_path / "a")
    last = source / "checkpoint/step-0000004.safetensors"
    content = bytearray(last.read_bytes())
    content[-5] ^= 1
    {"cut": lambda: last.write_bytes(content[:-99]), "flip": lambda: last.write_bytes(content), "gone": last.unlink, "open": lambda: update_record(source, status="running"),
     "data": lambda: update_record(source, data_key="other"), "torch": lambda: update_record(source, versions={"torch": "0.1"}),
     "hardware": lambda: update_record(source, hardware="another"), "recipe": lambda: update_record(source, recipe_key="other")}[fault]()
    run = train(SMOKE, offered(tmp_path / "b", source), prepared=prepared, progress=False, device="cpu")
    said = capsys.readouterr().out
    assert words in said and "trained" not in run.record and not (run.dir / ".taken").exists()
    same(run, whole)


def test_who_has_techniques_by_hand_trains_itself(whole, prepared, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(SMOKE, offered(tmp_path / "b", whole.dir), prepared=prepared, progress=False, device="cpu", techniques=[Stops(3)])


CHILD = """
import os, signal, sys
from pathlib import Path
from prx_nb.core import train as t
from prx_nb.core.recipe import load
def strike(event, arguments):
    if event == "os.rename" and "." + "taken" in str(arguments[0]):
        global left
        left -= 1
        if left < 0: os.kill(os.getpid(), signal.SIGKILL)
left = int(sys.argv[3])
sys.addaudithook(strike)
t.train(load(sys.argv[1]), sys.argv[2], progress=False, device="cpu")
"""


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("stays", [True, False])
def test_a_kill_in_the_middle_leaves_nothing_half(whole, prepared, tmp_path, at, stays):
    source, out = copied(whole, tmp_path / "a"), offered(tmp_path / "b", tmp_path / "a")
    SMOKE.save(tmp_path / "recipe.json")
    done = subprocess.run([sys.executable, "-c", CHILD, tmp_path / "recipe.json", out, str(at)], capture_output=True, text=True, timeout=200)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (out / "checkpoint/step-0000004.safetensors").exists() and (out / ".taken").exists()
    if not stays:
        shutil.rmtree(source)
    run = train(SMOKE, out, prepared=prepared, progress=False, device="cpu")
    assert ("trained" in run.record) == stays and not (out / ".taken").exists()
    same(run, whole)


BODY = """
from prx_nb.lab import ablations, judge
from prx_nb.core import train
import time
begin = time.time()
recipe = ablations.recipe(ablation, variant, preset, seed, overrides)
prepared = train.prepare(recipe, progress=False)
run = train.train(recipe, out, prepared=prepared, progress=False)
assert len(run.curves) and run.model is not None
questions, images = judge.take(run, prepared)
judge.complete(run, ablation, variant, preset, judge.judge(run, prepared, questions, images), begin)
"""
STEPS = {"train.steps": 4, "train.validate_every": 4, "train.checkpoint_every": 4, "evaluate.samples": 16}


def two(folder, share=True):
    from dataclasses import replace

    from toys import toy
    jobs = [job for name in ("one", "other") for job in plan(toy(folder, "base", body=BODY, name=name), out=folder, overrides=STEPS, timeout=300)]
    return [replace(job, share=share) for job in jobs]


def test_two_ablations_with_one_baseline_train_it_once(tmp_path):
    jobs, said = two(tmp_path), []
    assert jobs[0].training == jobs[1].training and batch.taken_over(jobs) == {jobs[1].out}
    statuses = batch.run(jobs, at_once=2, say=said.append)
    assert [s["state"] for s in statuses] == ["done"] * 2, [Path(j.out, "log.txt").read_text()[-2000:] for j in jobs]
    first, second = (runs.record(job.out) for job in jobs)
    assert "trained" not in first and second["trained"]["by"] == "../../../one/smoke/base-s0"
    assert first["metrics"] == second["metrics"] and first["cost"]["train_seconds"] == second["cost"]["train_seconds"] < second["cost"]["total_seconds"]
    assert "taken over" in Path(jobs[1].out, "log.txt").read_text()
    rows = {r.group: r for r in watch.survey(tmp_path)}
    assert rows["other/smoke"].trained_by == "one/smoke/base-s0" and rows["one/smoke"].trained_by == ""
    assert "training of one/smoke/base-s0" in watch.as_text(list(rows.values()))
    (tmp_path / "alone").mkdir()
    alone = two(tmp_path / "alone", share=False)
    assert not batch.taken_over(alone)
    batch.run(alone, at_once=2, say=said.append)
    records = [runs.record(job.out) for job in alone]
    assert all("trained" not in r for r in records) and all(r["metrics"] == first["metrics"] for r in records)


def test_what_was_trained_is_kept_where_only_what_comes_after_it_changes(tmp_path):
    from toys import toy
    FAILS = BODY.replace("judge.complete", "raise SystemError('a bug in what judges')\njudge.complete")
    of = lambda body: plan(toy(tmp_path, "base", body=body), out=tmp_path, overrides=STEPS, timeout=300)
    def made(body):
        [status] = batch.run(of(body), say=lambda line: None)
        return status["state"], runs.record(of(body)[0].out), Path(of(body)[0].out)
    state, broken, folder = made(FAILS)
    assert state == "cell error" and broken["cost"]["train_seconds"]
    kept = lambda: {p.name: p.stat().st_mtime_ns for p in (folder / "checkpoint").iterdir()}
    trained = kept()
    state, mended, _ = made(BODY)
    assert state == "done" and "trained" not in mended and not (folder.parent / ".replaced").exists()
    assert kept() == trained, "it was through"
    [line] = batch.outdated(of(BODY + "\nprint('more')"))
    assert line.startswith("1 finished run no longer counts and will be judged again, with the training kept: the notebook")
    state, judged, _ = made(BODY + "\nprint('more')")
    assert state == "done" and judged["trained"]["by"] == "../.replaced/base-s0" and judged["metrics"] == mended["metrics"]
    assert (folder.parent / ".replaced" / "base-s0" / "record.json").exists()


def test_ten_thousand_runs_are_looked_through_in_seconds(tmp_path):
    import time
    job = two(tmp_path)[0]
    text = json.dumps({"training": "k", "parts": job.parts, "recipe": job.recipe})
    for n in range(2000):
        folder = tmp_path / f"a/smoke{n // 100}/v-s{n}"
        folder.mkdir(parents=True)
        (folder / "job.json").write_text(text.replace('"k"', f'"k{n}"'))
        (folder / "status.json").write_text('{"state": "done"}')
    begin = time.perf_counter()
    assert len(batch.equal_trainings([job])) == 2001
    assert time.perf_counter() - begin < 4, "10,000 within 20 s on a busy machine"


def test_what_is_trained_is_another_with_another_source(tmp_path, monkeypatch):
    first = identity.training(SMOKE)
    monkeypatch.setattr(identity, "libraries", lambda: {"torch": "0.1"})
    assert identity.training(SMOKE) != first
