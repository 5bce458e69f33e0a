"""A sweep with faults in a fifth of its runs, compared run by run with one that was left in peace.

    python tests/fault_sweep.py                       102 smoke runs, two at a time, twice (about 15 minutes on two cores)
    python tests/fault_sweep.py --seeds 4 --share 0.6 a short form; `make test` runs one like it

Faults are real: SIGKILL to kernels, to runs' processes and to the driver, a checkpoint on a full tmpfs, a loss that is not a
number, a run that never ends, a checkpoint overwritten with noise, an allocation that cannot be had. Faults that pass must
leave nothing behind: after the retries those runs too equal the undisturbed ones, bit for bit but for times and memory.
"""
import argparse
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import nbformat
import pandas as pd
from safetensors import safe_open

from prx_nb.core.files import read_json, write_json
from prx_nb.lab import ablations, batch, plan, run

ROOT = Path(__file__).parents[1]
PASSING = ("kernel killed", "process killed", "checkpoint corrupt", "memory short", "disk full")    # equal to the undisturbed run in the end
LASTING = ("loss not finite", "time limit")                                                           # fail, and stay failed
EXPECTED = {"loss not finite": "non-finite loss", "time limit": "timeout"}
LIMIT = 60                                     # seconds a run may take
NEVER = 15                                     # and one that never ends

CELL = '''
# What goes wrong in this run, if anything: faults.json beside the runs says. Most faults strike on the first attempt alone.
import json, os, pathlib, random, signal, subprocess, threading, time
_home, _me = pathlib.Path(out).parent, pathlib.Path(out).name
_fault = json.loads((_home / "faults.json").read_text()).get(_me) if (_home / "faults.json").exists() else None
_first = not (pathlib.Path(out) / "struck").exists()
if _fault:
    (pathlib.Path(out) / "struck").write_text(_fault)
    _later = lambda what: threading.Timer(random.uniform(0, 3), what).start()
    if _fault == "kernel killed" and _first: _later(lambda: os.kill(os.getpid(), signal.SIGKILL))
    if _fault == "process killed" and _first: _later(lambda: os.kill(os.getppid(), signal.SIGKILL))
    if _fault == "time limit": time.sleep(1000)
    if _fault == "memory short" and _first: bytearray(1 << 60)
    if _fault == "disk full" and _first:
        (pathlib.Path(out) / "checkpoint").mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(pathlib.Path(out) / "checkpoint")], check=True)
    if _fault == "loss not finite":
        from prx_nb.core import train as _train
        _honest = _train.objective
        _train.objective = lambda model, b, flow, techniques=(), number=0: {k: v * (float("nan") if number == 8 else 1)
                                                                             for k, v in _honest(model, b, flow, techniques, number).items()}
    if _fault == "checkpoint corrupt" and _first:
        from prx_nb.core import train as _train
        _save = _train.save_checkpoint
        def _spoil(*args, **kwargs):
            path = _save(*args, **kwargs)
            path.write_bytes(os.urandom(path.stat().st_size // 2))
            os.kill(os.getpid(), signal.SIGKILL)
        _train.save_checkpoint = _spoil
'''


def notebook(folder: Path) -> Path:
    "The prediction target's notebook with the cell above in it. It does nothing where there is no faults.json."
    nb = nbformat.read(ROOT / "nbs" / "ablations" / "prediction_target.ipynb", 4)
    at = next(i for i, cell in enumerate(nb.cells) if "parameters" in cell.metadata.get("tags", []))
    nb.cells.insert(at + 1, nbformat.v4.new_code_cell(CELL, id="faults"))
    nbformat.write(nb, str(folder / "prediction_target.ipynb"))
    return folder / "prediction_target.ipynb"


def jobs(folder: Path, name: str, seeds: int) -> list[plan.Job]:
    ablation = dataclasses.replace(ablations.get("prediction_target"), notebook=str(folder / "prediction_target.ipynb"))
    planned = plan.plan(ablation, "smoke", seeds, out=folder / name, timeout=LIMIT)
    faults = read_json(planned[0].group / "faults.json") if (planned[0].group / "faults.json").exists() else {}
    return [dataclasses.replace(job, timeout=NEVER) if faults.get(job.name) == "time limit" else job for job in planned]


def drive(folder: Path, name: str, seeds: int, at_once: int) -> subprocess.Popen:
    "A driver in a process of its own, so that it can be killed."
    log = open(folder / f"{name}.txt", "a")
    return subprocess.Popen([sys.executable, __file__, "--drive", name, "--out", str(folder), "--seeds", str(seeds), "--jobs", str(at_once)],
                            stdout=log, stderr=log)


def mounts(folder: Path) -> list[str]:
    lines = Path("/proc/mounts").read_text().splitlines() if Path("/proc/mounts").exists() else []
    return [where for _, where, kind, *_ in map(str.split, lines) if kind == "tmpfs" and where.startswith(str(folder))]


def can_mount(folder: Path) -> bool:
    (spot := folder / "mount-me").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(spot)], capture_output=True).returncode == 0
    if mounted:
        subprocess.run(["umount", str(spot)], check=True)
    spot.rmdir()
    return mounted


def draw_faults(folder: Path, planned: list[plan.Job], share: float, dice: random.Random) -> dict[str, str]:
    "Which run gets which fault; every kind before any comes twice."
    kinds = [k for k in PASSING + LASTING if k != "disk full" or can_mount(folder)]
    struck = dice.sample(sorted(job.name for job in planned), round(share * len(planned)))
    return {name: kinds[i % len(kinds)] for i, name in enumerate(struck)}


def disturb(folder: Path, seeds: int, at_once: int, kills: int, dice: random.Random) -> int:
    "Run the sweep, killing the driver now and then; freed disks are tried again at the end. Returns how often it was killed."
    planned, killed = jobs(folder, "disturbed", seeds), 0
    ended = lambda: sum(run.read_status(job.out).get("state", "queued") not in run.OPEN for job in planned)
    marks = sorted(dice.sample(range(1, len(planned)), min(kills, len(planned) - 1)))
    while True:
        driver = drive(folder, "disturbed", seeds, at_once)
        while driver.poll() is None:
            time.sleep(0.1)
            if marks and ended() >= marks[0]:
                marks.pop(0)
                time.sleep(dice.uniform(0, 3))
                driver.kill()
                driver.wait()
                killed += 1
        if driver.returncode != -signal.SIGKILL:
            break
    for place in mounts(folder):
        subprocess.run(["umount", place], check=True)
    drive(folder, "disturbed", seeds, at_once).wait()
    return killed


COSTS = {"train_seconds", "total_seconds", "step_seconds", "peak_memory_mb", "energy_joules"}         # not the same twice


def result(folder: Path) -> dict:
    "All that a run has left, but for times, memory and the names of broken checkpoints."
    record = read_json(folder / "record.json")
    record["cost"] = {k: v for k, v in record["cost"].items() if k not in COSTS}
    for name in ("started", "finished", "broken_checkpoints"):
        record.pop(name, None)
    curves = pd.read_parquet(folder / "curves.parquet").query("name != 'seconds'")
    [last] = sorted((folder / "checkpoint").glob("step-*.safetensors"))[-1:]
    return {"record": record, "curves": curves.to_csv(index=False), "samples": tensors(folder / "samples.safetensors"), "weights": tensors(last)}


def tensors(path: Path) -> dict[str, bytes]:
    with safe_open(path, "np") as f:                              # a header's order is not the same twice
        return {name: f.get_tensor(name).tobytes() for name in f.keys()}


def differences(peace: Path, storm: Path) -> list[str]:
    "Which parts of two runs' results are not the same."
    a, b = result(peace), result(storm)
    return [part for part in a if a[part] != b[part]]


def compare(folder: Path, seeds: int, faults: dict[str, str]) -> dict:
    "Counts, and the runs that are not as they should be."
    counts, wrong, tries = Counter(), [], Counter()
    for calm, rough in zip(jobs(folder, "undisturbed", seeds), jobs(folder, "disturbed", seeds)):
        said, fault = run.read_status(rough.out), faults.get(rough.name, "healthy")
        counts[f"{fault}: {said.get('state')}"] += 1
        tries[said.get("attempt", 0)] += 1
        if run.read_status(calm.out).get("state") != "done":
            wrong.append(f"{calm.name}: undisturbed, but {run.read_status(calm.out)}")
        elif fault in LASTING:
            wrong += [] if said.get("state") == EXPECTED[fault] else [f"{rough.name}: {fault}, but {said}"]
        elif said.get("state") != "done":
            wrong.append(f"{rough.name}: {fault}, ended {said}")
        elif parts := differences(Path(calm.out), Path(rough.out)):
            wrong.append(f"{rough.name}: {fault}, differs in {parts}")
    return {"runs": len(jobs(folder, "disturbed", seeds)), "struck": len(faults), "counts": dict(sorted(counts.items())),
            "attempts": {str(k): v for k, v in sorted(tries.items())}, "wrong": wrong}


def sweep(folder: Path, seeds: int, share: float, at_once: int, kills: int, seed: int = 0) -> dict:
    "Both sweeps and what came of them."
    notebook(folder)
    dice, begin = random.Random(seed), time.monotonic()
    drive(folder, "undisturbed", seeds, at_once).wait()
    peace = time.monotonic() - begin
    planned = jobs(folder, "disturbed", seeds)
    faults = draw_faults(folder, planned, share, dice)
    write_json(planned[0].group / "faults.json", faults)
    try:
        killed = disturb(folder, seeds, at_once, kills, dice)
    finally:
        for place in mounts(folder):
            subprocess.run(["umount", "-l", place])
    found = compare(folder, seeds, faults) | {"drivers killed": killed, "seconds undisturbed": round(peace), "seconds in all": round(time.monotonic() - begin)}
    return found | {"left running": [p for job in planned if (p := run.read_status(job.out).get("pid")) and Path(f"/proc/{p}").exists()]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=34, help="of each of the three variants")
    parser.add_argument("--share", type=float, default=0.2, help="of the runs that get a fault")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--kills", type=int, default=4, help="of the driver")
    parser.add_argument("--out", type=Path, help="kept; default: a folder that is deleted")
    parser.add_argument("--drive", help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(batch.cores()))
    if given.drive:
        batch.run(jobs(given.out, given.drive, given.seeds), given.jobs)
        return
    folder = (given.out or Path(tempfile.mkdtemp())).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    found = sweep(folder, given.seeds, given.share, given.jobs, given.kills)
    print(json.dumps(found, indent=1))
    if given.out is None:
        shutil.rmtree(folder)
    sys.exit(1 if found["wrong"] or found["left running"] else 0)


if __name__ == "__main__":
    main()
