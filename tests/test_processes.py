"Several real processes (gloo, on the CPU): they equal one, go on exactly, fail as one, and leave nobody behind."
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import psutil
import pytest
import torch

from prx_nb.core import processes
from prx_nb.core.checkpoint import CheckpointError, find_checkpoint
from prx_nb.core.processes import ProcessDied
from prx_nb.core.recipe import RecipeError, preset
from prx_nb.core.batch import prepare
from prx_nb.core.technique import Technique
from prx_nb.core.train import NonFiniteLoss, Run, train

ONE = preset("smoke").replace({"train.steps": 20, "train.checkpoint_every": 7, "train.validate_every": 10, "train.keep": 3,
                               "optimizer.clip": 0.1, "optimizer.eps": 1e-4, "sample.steps": 2})
WAYS = ("ddp", "fsdp2")


def several(way="ddp", recipe=ONE):
    return recipe.replace({"train.processes": 2, "train.parallel": way})


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return train(ONE, tmp_path_factory.mktemp("one"), prepared=prepare(ONE, progress=False), progress=False, device="cpu")


@pytest.fixture(scope="module", params=WAYS)
def two(request, tmp_path_factory):
    return train(several(request.param), tmp_path_factory.mktemp(request.param), progress=False, device="cpu")


def tensors(run):
    return find_checkpoint(run.dir / "checkpoint", run.recipe)[0]


def curves(run):
    c = run.curves[run.curves.name != "seconds"]
    return c.set_index(["step", "name"]).value.sort_index()


def close(a: Run, b: Run) -> None:
    "The same run but for the order of additions."
    assert curves(a).index.equals(curves(b).index)
    assert (curves(a) - curves(b)).abs().max() < 1e-5
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys() and {k.split(".")[0] for k in first} == {"model", "ema", "optimizer"}
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def same(a: Run, b: Run) -> None:
    "The same to the last bit."
    assert curves(a).equals(curves(b))
    assert all(v.equal(tensors(b)[k]) for k, v in tensors(a).items())


def test_two_processes_with_half_the_batch_equal_one(one, two):
    losses = curves(one).xs("loss flow", level="name")
    assert len(losses) == 20 and losses.std() > 0.01
    assert curves(one).xs("gradient norm", level="name").min() > 0.1, "clipping acts in every step"
    close(one, two)
    moved = [k for k, v in tensors(one).items() if k.startswith("model.") and not v.equal(tensors(one)["ema.module." + k[6:]])]
    assert len(moved) > 20, "the average is another set of weights"
    cost = two.record["cost"]
    assert two.record["status"] == "done" and cost["parameters"] == one.record["cost"]["parameters"]
    assert cost["images_seen"] == 20 * 8 and cost["flops_step"] == one.record["cost"]["flops_step"]
    assert json.loads((two.dir / "progress.json").read_text())["step"] == 20
    assert {p.name for p in two.dir.rglob("*")} == {p.name for p in one.dir.rglob("*")}, "one process writes, and nothing else"


def cut(run, folder):
    "A copy of a run as if it had been stopped after its first checkpoint."
    shutil.copytree(run.dir, folder)
    for path in sorted((folder / "checkpoint").glob("*"))[1:]:
        path.unlink()
    (folder / "record.json").unlink()
    return folder


def test_a_run_in_two_processes_goes_on_in_one_and_the_other_way_round(one, two, tmp_path):
    close(train(ONE, cut(two, tmp_path / "a"), progress=False, device="cpu"), one)
    close(train(two.recipe, cut(one, tmp_path / "b"), progress=False, device="cpu"), one)


def test_a_finished_run_is_not_started_again(two, monkeypatch):
    monkeypatch.setattr(processes, "launch", lambda *a, **k: pytest.fail("started"))
    same(train(two.recipe, two.dir, progress=False, device="cpu"), two)


SCRIPT = """
import os, signal, sys, time
from prx_nb.core import train as t
real = t.objective
def objective(model, batch, flow, techniques=(), number=0):
    losses = real(model, batch, flow, techniques, number)
    rank = int(os.environ["RANK"])
    if rank == {rank} and number == {step}:
        {action}
    return losses
t.objective = objective
t.main(*sys.argv[1:])
"""


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    "Let one process do something at a step."
    real = subprocess.Popen

    def plant(action, rank=1, step=9):
        (tmp_path / "faulty.py").write_text(SCRIPT.format(action=action, rank=rank, step=step))

        def swapped(command, **more):
            if command[-5:-3] == ["-m", "prx_nb.core.train"]:
                command = [*command[:-5], str(tmp_path / "faulty.py"), *command[-3:]]
            return real(command, **more)
        monkeypatch.setattr(processes.subprocess, "Popen", swapped)
    yield plant
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])], "left over"


def test_a_killed_process_stops_all_and_the_run_goes_on_exactly(two, faulty, tmp_path, monkeypatch):
    faulty("os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(ProcessDied, match="process 1 of 2 was killed by SIGKILL"):
        train(two.recipe, tmp_path / "run", progress=False, device="cpu")
    record = json.loads((tmp_path / "run/record.json").read_text())
    assert record["status"] == "failed" and "killed by SIGKILL" in record["cause"]
    assert [p.name for p in (tmp_path / "run/checkpoint").glob("*")] == ["step-0000007.safetensors"]
    monkeypatch.undo()
    again = train(two.recipe, tmp_path / "run", progress=False, device="cpu")
    same(again, two)
    assert again.record["status"] == "done" and again.record["cause"] is None


def test_a_loss_not_finite_in_one_process_stops_all(faulty, tmp_path):
    faulty("losses['flow'] = losses['flow'] * float('nan')")
    with pytest.raises(NonFiniteLoss, match="loss not finite, nan .loss flow.*at step 10 of recipe") as error:
        train(several("fsdp2"), tmp_path / "run", progress=False, device="cpu")
    assert "in process" in error.value.__notes__[0] and len(str(error.value).splitlines()) == 1
    record = json.loads((tmp_path / "run/record.json").read_text())
    assert record["status"] == "failed" and record["cause"].startswith("NonFiniteLoss")
    kept = pd.read_parquet(tmp_path / "run/curves.parquet")
    assert kept[kept.name == "loss flow"].step.max() == 10


def test_the_error_of_one_process_is_the_error_of_the_run(faulty, tmp_path, capfd):
    faulty("print('a word before'); raise OSError(28, 'No space left on device', '/a/file')")
    with pytest.raises(OSError, match="No space left on device.*/a/file") as error:
        train(several(), tmp_path / "run", progress=False, device="cpu")
    assert error.value.errno == 28 and "in process 1" in error.value.__notes__[0]
    said = capfd.readouterr()
    assert "a word before" in said.out and "Traceback" not in said.out + said.err, "what they print comes through; no page of traces"


def test_nobody_reads_what_is_still_being_written(faulty, tmp_path):
    "The first process is slow to write the only checkpoint; the other must wait before it opens the run."
    faulty("save = t.save_checkpoint; t.save_checkpoint = lambda *a: (time.sleep(2), save(*a))", rank=0)
    run = train(several(recipe=ONE.replace("train.checkpoint_every", 100)), tmp_path / "run", progress=False, device="cpu")
    assert run.record["status"] == "done" and len(list((tmp_path / "run/checkpoint").glob("*"))) == 1


def test_errors_that_can_be_known_at_once_start_nothing(tmp_path, monkeypatch, one):
    monkeypatch.setattr(processes, "launch", lambda *a, **k: pytest.fail("started"))
    with pytest.raises(CheckpointError, match="another recipe"):
        train(several().replace("optimizer.lr", 0.5), one.dir, progress=False, device="cpu")
    with pytest.raises(ValueError, match="techniques passed by hand"):
        train(several(), tmp_path, progress=False, device="cpu", techniques=[Technique()])
    with pytest.raises(RecipeError, match="one device cuda:1"):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        train(several(), tmp_path, progress=False, device="cuda:1")
    with pytest.raises(RecipeError, match="train.processes = 2, but 1 GPU can be seen"):
        train(several(), tmp_path, progress=False)
    with pytest.raises(RecipeError, match=r"one of 3 \(WORLD_SIZE\), but train.processes = 2"):
        monkeypatch.setenv("WORLD_SIZE", "3")
        train(several(), tmp_path, progress=False, device="cpu")


CHILD = """
import sys
from prx_nb.core import train as t
from prx_nb.core.recipe import load
t.train(load(sys.argv[1]), sys.argv[2], progress=False, device="cpu")
"""


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_nobody_is_left_when_the_notebook_is_gone(sig, tmp_path):
    several(recipe=ONE.replace({"train.steps": 100_000, "train.checkpoint_every": 5})).save(tmp_path / "r.json")
    child = subprocess.Popen([sys.executable, "-c", CHILD, tmp_path / "r.json", tmp_path / "run"], stderr=subprocess.PIPE, text=True)
    until = time.time() + 60
    while not list((tmp_path / "run").glob("checkpoint/step-*")) and time.time() < until and child.poll() is None:
        time.sleep(0.1)
    family = psutil.Process(child.pid).children(recursive=True)
    try:
        assert len([p for p in family if "prx_nb.core.train" in p.cmdline()]) >= 2
        os.kill(child.pid, sig)
        said = child.communicate(timeout=30)[1]
    finally:
        child.kill()                                               # nothing, if all went well
    assert ("KeyboardInterrupt" in said) == (sig == signal.SIGINT)
    gone, left = psutil.wait_procs(family, timeout=25)
    assert not left
    record = json.loads((tmp_path / "run/record.json").read_text())
    assert record["status"] == "interrupted", "they stopped as if by Ctrl-C, and kept the curve"
    assert len(pd.read_parquet(tmp_path / "run/curves.parquet")) >= 5
