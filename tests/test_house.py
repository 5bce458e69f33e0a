"The house rules: notebooks run, are clean, and the package is what they export."
import ast
import graphlib
import json
import re
import shutil
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from forks import run_notebook

from prx_nb.lab import ablations, plan

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
ABLATIONS = sorted((ROOT / "nbs" / "ablations").glob("*.ipynb"))
LIMIT = 600                                    # seconds a notebook may take: it is there to end a hang, not to time


def short(path):
    return path.relative_to(ROOT / "nbs").as_posix()


def command(name, *args, cwd=ROOT, timeout=LIMIT):
    done = subprocess.run([str(BIN / name), *args], cwd=cwd, capture_output=True, text=True, timeout=timeout)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=short)
def test_notebook_runs(notebook, tmp_path):
    code, said, differ = run_notebook(notebook, tmp_path / "log.txt", LIMIT)
    assert code is not None, f"{short(notebook)} ran longer than {LIMIT} s:\n{said[-2000:]}"
    assert code == 0 and "Success" in said, f"{short(notebook)} failed:\n{said[-4000:]}"
    assert not differ, "what is stored is not what comes out; execute it again, or let the cell begin with #| varies:\n" + "\n".join(differ)


def test_a_notebook_that_fails_or_says_other_words_is_noticed(tmp_path):
    nb = json.loads((ROOT / "nbs/core/03_seeds.ipynb").read_text())
    nb["cells"].append(nb["cells"][-1] | {"cell_type": "code", "id": "fails", "source": ["assert 1 == 2, 'on purpose'"], "outputs": [], "execution_count": None})
    (tmp_path / "fails.ipynb").write_text(json.dumps(nb))
    code, said, _ = run_notebook(tmp_path / "fails.ipynb", tmp_path / "log.txt", LIMIT)
    assert code not in (0, None) and "on purpose" in said
    shown = lambda text: [{"output_type": "stream", "name": "stdout", "text": [text]}]
    nb["cells"][-1] |= {"source": ["print('loss', 1.02)"], "outputs": shown("loss 1.00\n")}
    nb["cells"].append(nb["cells"][-1] | {"id": "words", "outputs": shown("lost 1.02\n")})
    nb["cells"].append(nb["cells"][-1] | {"id": "number", "outputs": shown("loss 1.20\n")})
    nb["cells"].append(nb["cells"][-1] | {"id": "excused", "source": ["#| varies\n", "print('loss', 7)"]})
    (tmp_path / "other.ipynb").write_text(json.dumps(nb))
    code, _, differ = run_notebook(tmp_path / "other.ipynb", tmp_path / "log.txt", LIMIT)
    assert code == 0 and [d.split("\n")[0] for d in differ] == ["cell words", "cell number"]


@pytest.mark.parametrize("plot,says", [("plt.plot([1 / (n + 1)])", None), ("1 / n", "ZeroDivisionError"), ("None", "a control that shows nothing")])
def test_a_control_is_built_and_one_that_fails_is_noticed(plot, says, tmp_path):
    nb = json.loads((ROOT / "nbs/core/03_seeds.ipynb").read_text())
    source = f"#| eval: false\nimport matplotlib.pyplot as plt\nfrom prx_nb.core.show import interact\ninteract(lambda n=0: {plot}, n=(0, 3));"
    cell = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    nb["cells"] = nb["cells"][:1] + [cell | {"id": "moves", "source": [source]}, cell | {"id": "after", "source": ["assert 'plt' in globals(), 'not run'"]}]
    (tmp_path / "moves.ipynb").write_text(json.dumps(nb))
    code, said, _ = run_notebook(tmp_path / "moves.ipynb", tmp_path / "log.txt", LIMIT)
    assert (code == 0) == (says is None) and (says or "Success") in said, said


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=short)
def test_notebook_is_tidy(notebook):
    text = notebook.read_text()
    nb = json.loads(text)
    assert len(text.encode()) < 200 * 1024, f"{len(text.encode()) / 1024:.0f} KiB"
    assert "widgets" not in nb["metadata"]
    ids = [cell["id"] for cell in nb["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in nb["cells"]:
        assert not any(o["output_type"] == "error" for o in cell.get("outputs", [])), "an error was saved"
        source = "".join(cell["source"])
        for line in source.splitlines() if cell["cell_type"] == "code" else ():
            assert len(line) <= 110, f"a code line of {len(line)} characters: {line[:80]}"
    for place in (str(ROOT), str(Path.home()) + "/"):
        assert place not in text, f"names a place on one machine: {place}"
    shown = json.dumps([cell.get("outputs") for cell in nb["cells"]])
    assert not (places := re.findall(r"/tmp/tmp\w+|/var/folders/\w+", shown)), f"outputs name places of one machine: {places}"


def exported_cells():
    "(notebook, lines of code, definitions) of every exported cell but imports and constants."
    for notebook in NOTEBOOKS:
        for cell in json.loads(notebook.read_text())["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "code" and re.match(r"(#\|.*\n)*#\| *exporti?\b", source):
                kinds = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
                lines = [line for line in source.splitlines() if line.strip() and not line.startswith("#|")]
                yield short(notebook), len(lines), [n.name for n in kinds]


def test_cells_are_small_and_define_one_thing():
    cells = list(exported_cells())
    assert [c for c in cells if c[1] > 40] == [], "longer than 40 lines"
    assert statistics.median(lines for _, lines, names in cells if names) <= 10
    assert [c for c in cells if len(c[2]) > 1 and c[1] > 12] == [], "several definitions in one cell"


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory):
    "The package exported anew from the notebooks, which were cleaned anew, in another folder."
    copy = tmp_path_factory.mktemp("rebuilt") / "prx-workbook"
    copy.mkdir()
    for name in ("settings.ini", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "nbs", copy / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (copy / "prx_nb").mkdir()
    shutil.copy(ROOT / "prx_nb" / "__init__.py", copy / "prx_nb")
    for tool in ("nbdev_export", "nbdev_clean"):
        code, said = command(tool, cwd=copy)
        assert code == 0, said[-2000:]
    return copy


def files(folder, ending):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob(f"*{ending}")
            if ".ipynb_checkpoints" not in p.parts}


def test_package_is_what_the_notebooks_export(rebuilt):
    ours, theirs = files(ROOT / "prx_nb", ".py"), files(rebuilt / "prx_nb", ".py")
    assert sorted(set(ours) - set(theirs)) == [], "modules that no notebook exports"
    assert sorted(set(theirs) - set(ours)) == [], "not exported yet: run `make export`"
    assert [name for name in ours if ours[name] != theirs[name]] == [], "out of step: run `make export`"


def test_notebooks_are_clean(rebuilt):
    ours, theirs = files(ROOT / "nbs", ".ipynb"), files(rebuilt / "nbs", ".ipynb")
    assert [name for name in ours if ours[name] != theirs[name]] == [], "not clean: run `make export`"


def test_every_declared_ablation_has_its_notebook_and_the_other_way_round():
    assert {p.stem: p.stem for p in ABLATIONS} == {name: a.name for name, a in ablations.known().items()}


@pytest.mark.parametrize("notebook", ABLATIONS, ids=short)
def test_ablation_notebook_has_one_parameters_cell(notebook):
    plan.check_parameters(notebook, ["variant", "seed", "preset", "overrides", "out"])
    assert "default_exp" not in notebook.read_text(), "an ablation is not exported"


def test_ruff():
    code, said = command("ruff", "check", "prx_nb", "tests", "--output-format", "concise")
    assert code == 0, said
    code, said = command("ruff", "check", "--select", "F821", "--isolated", "prx_nb")
    assert code == 0, said


def test_core_imports_nothing_heavy():
    modules = sorted(f"prx_nb.core.{p.stem}" for p in (ROOT / "prx_nb" / "core").glob("[a-z]*.py"))
    heavy = ("diffusers", "transformers", "torchmetrics", "torchvision", "matplotlib", "datasets", "onnx", "papermill", "scipy")
    script = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
    for other in {heavy!r}:
        assert other not in sys.modules, f"{{name}} imports {{other}}"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_module_of_the_core_imports_in_a_circle():
    core, needs = ROOT / "prx_nb" / "core", {}
    for path in core.glob("[a-z]*.py"):
        found = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]      # inside functions too
        rooms = [[n.module.split(".")[-1]] if n.module and n.module != "prx_nb.core" else [a.name for a in n.names] for n in found
                 if n.level == 1 or (n.module or "").startswith("prx_nb.core")]
        needs[path.stem] = {room for some in rooms for room in some if (core / f"{room}.py").exists()}
    assert needs["pack"] >= {"data", "text"} and needs["data"] >= {"images", "emoji"}, "imports are seen"
    graphlib.TopologicalSorter(needs).prepare()                     # raises CycleError


def test_nothing_is_unpickled():
    for path in (ROOT / "prx_nb").rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"^\s*(import|from) pickle", text, re.M), path
        for call in re.findall(r"torch\.load\((?:[^()]|\([^()]*\))*\)", text):
            assert "weights_only=True" in call, f"{path}: {call}"
        assert "allow_pickle=True" not in text, path


def test_every_direct_dependency_is_constrained():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + sum(project["optional-dependencies"].values(), [])
    name = lambda line: re.split(r"[<>=\[;!~ ]", line.strip())[0].lower().replace("_", "-")
    pinned = {name(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line.strip() and line[0] != "#"}
    assert {name(w) for w in wanted} - pinned - {"prx-nb"} == set()


TECHNIQUES = sorted(p.stem.partition("_")[2] for p in (ROOT / "nbs" / "techniques").glob("[0-9]*.ipynb"))


@pytest.mark.parametrize("module", sorted([*(ROOT / "prx_nb/core").glob("*.py"), *(ROOT / "prx_nb/lab").glob("*.py")]), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_core_and_lab_know_no_technique(module):
    text = module.read_text()
    named = [t for t in TECHNIQUES if re.search(rf"\b{t}\b", text, re.IGNORECASE) and t != "jit"] + re.findall(r"techniques\.jit\b", text)
    assert named == [], "a technique is found by its name, and only its room knows it"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            assert "techniques." not in f"{node.module or ''}.", f"line {node.lineno} imports from {node.module}"
