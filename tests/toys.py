"Toy ablations and small helpers for the tests of the lab."
import os
import time
from pathlib import Path

import psutil

from prx_nb.lab import run
from prx_nb.lab.plan import pretend_ablation

BODY = """
import json, os, pathlib, sys, time
folder = pathlib.Path(out)
begin = time.time()
print("hello from", variant, seed, flush=True)
(folder / "pid").write_text(str(os.getpid()))
tries = folder / "tries"
tries.write_text(str(int(tries.read_text()) + 1 if tries.exists() else 1))
if variant == "raises": raise RuntimeError("on purpose")
if variant == "nan": exec("class NonFiniteLoss(RuntimeError): pass\\nraise NonFiniteLoss('loss is nan')")
if variant == "greedy": bytearray(1 << 60)
if variant == "dies" or variant == "diesonce" and tries.read_text() == "1": os._exit(9)
if variant == "hangs": time.sleep(1000)
if variant == "slow": time.sleep(1.5)
if variant == "lasts": time.sleep(6)
if variant != "silent":
    (folder / "record.json").write_text(json.dumps({"status": "done", "metrics": {"FD[toy]": 2.0, "KID[toy]": 0.5}, "begin": begin, "end": time.time(),
        "threads": os.environ["OMP_NUM_THREADS"], "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "overrides": overrides}))
"""


def toy(folder, *variants, body=BODY, name="toy"):
    return pretend_ablation(folder, *variants, body=body, name=name)


def states(jobs):
    return {job.name: run.read_status(job.out).get("state") for job in jobs}


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def kernel(folder):
    "The process id of a toy's kernel, once it has one."
    path = Path(folder) / "pid"
    wait_for(lambda: path.exists() and path.read_text())
    return int(path.read_text())


def left_over(word):
    "Processes of this user whose command line holds a word."
    found = []
    for process in psutil.process_iter(["cmdline", "uids"]):
        if process.info["uids"] and process.info["uids"].real == os.getuid() and any(word in part for part in process.info["cmdline"] or ()):
            found.append(process.pid)
    return found
