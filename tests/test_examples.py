"Every example that the help, the README and the notebooks show: a command is planned or taken apart to its last option, Python is run."
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer.main

from prx_nb.lab import cli

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
TOP = typer.main.get_command(cli.app)
BLANKS = re.compile(r"[{}<>]|\b(NAME|RUN|FILE|PATH|PRESET|FOLDER)\b|path/to/")      # to be filled in, not to be run as it stands


def _helps(command=TOP, words=()):
    "Every command's help, as it is written."
    yield " ".join(("prx-nb", *words)), command.help or ""
    for name, inner in getattr(command, "commands", {}).items():
        yield from _helps(inner, (*words, name))


def _lines(text):
    "Commands in a text: on lines of their own, or `between backticks`."
    text = text.replace("\\\n", " ")
    for line in re.findall(r"^ *(?:[!$%] *)?prx-nb +(\S.*)$", text, re.M):
        yield re.split(r" {2,}(?!-)", line.split(" #")[0].strip())[0]
    yield from re.findall(r"`prx-nb +([^`\n]+)`", text)


def collected():
    found = {}
    texts = [*_helps(), ("README.md", (ROOT / "README.md").read_text())]
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text())["cells"]
        texts += [(path.relative_to(ROOT).as_posix(), "".join(c["source"])) for c in cells if c["cell_type"] == "markdown"]
    for where, text in texts:
        for line in _lines(text):
            found.setdefault(line, where)
    return found


EXAMPLES = collected()
WHOLE = [line for line in EXAMPLES if not BLANKS.search(line)]


def test_they_are_found_everywhere():
    places = set(EXAMPLES.values())
    assert len(EXAMPLES) > 50 and "README.md" in places and any(p.startswith("prx-nb ") for p in places) and any(p.startswith("nbs/") for p in places)
    assert len(WHOLE) > 40


def taken_apart(line):
    "Name the command of a line and take its arguments apart, which raises for a command or an option that is not there."
    command, words, name = TOP, shlex.split(line), "prx-nb"
    while isinstance(command, click.Group) or hasattr(command, "commands"):
        if not words or words[0].startswith("-"):
            break
        assert words[0] in command.commands, f"prx-nb {line}: there is no command {words[0]}"
        command, name, words = command.commands[words[0]], words[0], words[1:]
    with command.make_context(name, words) as context:
        return context


@pytest.mark.parametrize("line", EXAMPLES, ids=lambda line: line[:60])
def test_its_options_are_there(line):
    try:
        assert taken_apart(BLANKS.sub("x", line)) is not None
    except Exception as error:
        if type(error).__name__ != "MissingParameter":            # `prx-nb ablate` alone, in the midst of a sentence
            raise


def test_an_option_that_is_not_there_would_be_noticed():
    for wrong in ("ablate prediction_target --sede 3", "abalte prediction_target", "status --out /"):
        with pytest.raises((AssertionError, Exception)) as error:
            taken_apart(wrong)
        assert "prx-nb abalte" in str(error.value) or "No such option" in str(error.value) or "whole disk" in str(error.value)


@pytest.mark.parametrize("line", [x for x in WHOLE if x.startswith("ablate ") and "slurm" not in x], ids=lambda line: line[:60])
def test_an_ablation_can_be_planned(line, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    words = [w for w in shlex.split(line) if w not in ("--dry-run", "--wait")]
    if any(w.endswith(".ipynb") and not Path(w).exists() for w in words) or any(w.startswith("data.path=") for w in words):
        pytest.skip("of the reader's own files")
    with pytest.raises(SystemExit) as end:
        cli.main([*words, "--dry-run", *([] if "--out" in words else ["--out", str(tmp_path)])])
    assert end.value.code == 0, capsys.readouterr().err
    assert "to be run" in capsys.readouterr().out


def test_python_of_the_readme_runs(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    blocks += re.findall(r"`((?:from|import) [^`]+)`", (ROOT / "README.md").read_text())
    assert blocks
    done = subprocess.run([sys.executable, "-c", "\n".join(blocks)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.strip().splitlines():
        assert line in (ROOT / "README.md").read_text(), f"the README shows another answer than {line}"
