"Installed from a wheel, in an empty folder without a checkout, an ablation runs and is reported."
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    "The unpacked wheel, built from a copy so that nothing is left in the checkout."
    copy, wheels, site = (tmp_path_factory.mktemp(name) for name in ("copy", "wheels", "site"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "prx_nb", "nbs"):
        subprocess.run(["cp", "-r", ROOT / name, copy], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", wheels, copy]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    zipfile.ZipFile(next(wheels.glob("*.whl"))).extractall(site)
    return site


def test_the_wheel_holds_all_rooms_and_notebooks(installed):
    here = {p.relative_to(ROOT).as_posix() for p in (ROOT / "prx_nb").rglob("*.py")}
    there = {p.relative_to(installed).as_posix() for p in (installed / "prx_nb").rglob("*.py")}
    assert there == here
    assert {p.name for p in (installed / "prx_nb/ablations").iterdir()} == {p.name for p in (ROOT / "nbs/ablations").glob("*.ipynb")}


def test_an_ablation_runs_in_an_empty_folder(installed, tmp_path):
    code = f"import sys; sys.path.insert(0, {str(installed)!r}); import prx_nb; assert prx_nb.__file__.startswith({str(installed)!r}), prx_nb.__file__; " \
           "from prx_nb.lab import cli; cli.main(sys.argv[1:])"
    env = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", code, "ablate", "prediction_target", "--preset", "smoke", "--variants", "v", "--seeds", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    home = tmp_path / "outputs/prediction_target/smoke"
    assert json.loads((home / "v-s0/record.json").read_text())["status"] == "done" and (home / "report/report.html").stat().st_size > 1000
    assert json.loads((home / "v-s0/job.json").read_text())["notebook"].startswith(str(installed))
