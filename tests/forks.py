"Notebooks run by nbdev_test in copies of a process that has the libraries loaded: seconds less for each than in fresh ones."
import json
import multiprocessing
import os
from pathlib import Path

LIBRARIES = ["nbdev.test", "torch._dynamo", "prx_nb.core.train", "prx_nb.lab.judge", "matplotlib.pyplot", "pandas", "pyarrow.parquet",
             "torchmetrics.image.fid", "torchmetrics.image.kid", "scipy.stats", "papermill", "ipywidgets"]
COPIES = multiprocessing.get_context("forkserver")
COPIES.set_forkserver_preload(LIBRARIES)       # imported there only; nothing is computed before the fork


def _run(notebook: str, log: str, differ: str) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    from execnb.shell import CaptureShell
    from nbdev.test import nbdev_test
    from outputs import watch
    watch(CaptureShell, Path(differ))
    nbdev_test(path=notebook, n_workers=0, do_print=True)


def run_notebook(notebook: Path, log: Path, seconds: float) -> tuple[int | None, str, list[str]]:
    "Exit code, none if it took longer; what was printed; the cells whose text is not what is stored."
    differ = log.with_suffix(".differ.json")
    copy = COPIES.Process(target=_run, args=(str(notebook), str(log), str(differ)))
    copy.start()
    copy.join(seconds)
    if late := copy.is_alive():
        copy.kill()
        copy.join()
    return (None if late else copy.exitcode, log.read_text() if log.exists() else "",
            json.loads(differ.read_text()) if differ.exists() else [])
