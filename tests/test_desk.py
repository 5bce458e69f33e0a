"The way in: what is cleaned, what git sees, and what `make setup` and `make lab` do."
import copy
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prx_nb.lab import desk

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def as_jupyter_saves(nb):
    "A notebook after a session in some editor: counts, another name of the kernel, widgets, metadata of its own."
    nb = copy.deepcopy(nb)
    nb["metadata"]["kernelspec"]["display_name"] = "Python 3 (ipykernel)"
    nb["metadata"] |= {"language_info": {"name": "python", "version": "3.13.1"}, "widgets": {"state": {}}}
    for n, cell in enumerate(nb["cells"]):
        cell["metadata"] |= {"execution": {"iopub.status.busy": "now"}}
        if cell["cell_type"] == "code":
            cell["execution_count"] = n
            cell["outputs"].append({"output_type": "display_data", "metadata": {}, "data": {desk._WIDGET: {"model_id": str(n)}, "text/plain": ["interactive(...)"]}})
    return nb


def test_cleaning_gives_what_is_stored_and_what_nbdev_gives(tmp_path):
    shutil.copy(ROOT / "settings.ini", tmp_path)
    (tmp_path / "nbs").mkdir()
    for n, path in enumerate(NOTEBOOKS):
        text = path.read_text()
        assert desk.cleaned(text) == text, f"{path.name}: run `make clean-nbs`"
        worn = json.dumps(as_jupyter_saves(json.loads(text)))
        assert desk.cleaned(worn) == text, path.name
        del (worn := json.loads(worn))["metadata"]["widgets"]
        for cell in worn["cells"]:
            cell.get("outputs", [])[-1:] = []
        (tmp_path / "nbs" / f"{n}.ipynb").write_text(json.dumps(worn))
    done = subprocess.run([str(Path(sys.executable).parent / "nbdev_clean")], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [p.name for n, p in enumerate(NOTEBOOKS) if (tmp_path / "nbs" / f"{n}.ipynb").read_text() != p.read_text()] == []


def git(home, *words):
    return subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(home), *words], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def clone(tmp_path):
    for name in (".gitattributes", "settings.ini", ".gitignore"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "nbs" / "techniques", tmp_path / "nbs" / "techniques")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "all")
    return tmp_path


def wear(clone):
    "As JupyterLab saves what was opened; how many notebooks."
    worn = [*(clone / "nbs" / "techniques").glob("*.ipynb")]
    for path in worn:
        path.write_text(json.dumps(as_jupyter_saves(json.loads(path.read_text()))))
    return len(worn)


def test_git_sees_nothing_of_a_session_in_any_editor_once_the_filter_is_named(clone):
    assert desk.install_filter(clone).startswith("In this clone git takes notebooks without counts")
    wear(clone)
    begin = time.monotonic()
    assert git(clone, "diff") == ""
    assert time.monotonic() - begin < 20, "a python for each notebook"
    git(clone, "add", "-u")                        # status looks at sizes first, and would name them until then
    assert git(clone, "status", "--short") == ""
    path = clone / "nbs" / "techniques" / "04_tread.ipynb"
    nb = json.loads(path.read_text())
    nb["cells"][1]["source"] = ["other words"]
    path.write_text(json.dumps(nb))
    assert git(clone, "status", "--short") == " M nbs/techniques/04_tread.ipynb\n", "what was written is seen"


def test_without_the_filter_a_clone_works_as_any_other(clone):
    worn = wear(clone)
    assert git(clone, "status", "--short").count(" M ") == worn > 5
    git(clone, "commit", "-qam", "worn")
    assert git(clone, "status", "--short") == ""


def test_the_filter_of_an_environment_that_has_gone_takes_files_as_they_are(clone):
    git(clone, "config", "filter.prx-notebooks.clean", desk.filter_command(str(clone / "gone" / "python")))
    worn = wear(clone)
    assert git(clone, "status", "--short").count(" M ") == worn > 5


def test_own_hooks_and_an_own_filter_stay(clone):
    (hook := clone / ".git" / "hooks" / "pre-commit").write_text("#!/bin/sh\nexit 0\n")
    before = {p.name: p.read_text() for p in hook.parent.iterdir()}
    desk.install_filter(clone)
    assert {p.name: p.read_text() for p in hook.parent.iterdir()} == before
    git(clone, "config", "filter.prx-notebooks.clean", "cat")
    assert "is yours and stays: cat" in desk.install_filter(clone) and git(clone, "config", "filter.prx-notebooks.clean") == "cat\n"


def test_setup_names_the_filter_and_lab_is_the_desk():
    def would(target):
        plain = {k: v for k, v in os.environ.items() if k not in ("ARGS", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")}       # of a `make test`
        return subprocess.run(["make", "-n", "-W", "pyproject.toml", target], cwd=ROOT, env=plain, capture_output=True, text=True, check=True).stdout
    assert "prx_nb.lab.desk filter" in would("setup") and "|| echo" in would("setup")
    assert would("lab").rstrip().endswith("-m prx_nb.lab.desk") and would("clean-nbs").rstrip().endswith("-m prx_nb.lab.desk clean")


def test_the_filter_loads_nothing_heavy():
    script = "import sys, prx_nb.lab.desk; print([m for m in ('torch', 'pandas', 'nbdev', 'IPython', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.stdout == "[]\n", done.stderr


def test_mine_is_free():
    assert "/mine/" in (ROOT / ".gitignore").read_text().splitlines()
    assert all("mine" not in p.relative_to(ROOT).parts for p in NOTEBOOKS)
