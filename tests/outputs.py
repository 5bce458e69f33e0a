"What a notebook's cells print, compared with what is stored in it: the same words, and the same numbers to a few percent."
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

MEASURED = re.compile(r"\d+(?:\.\d+)?(?= ?(?:s|ms|min|MB|GB|seconds|minutes)\b)")          # time and memory are another's
CONTROL = re.compile(r"^interact\(", re.MULTILINE)
OF_A_PICTURE = re.compile(r"<matplotlib\.|Text\(")
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?![\w.]*\w)", re.IGNORECASE)


def joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)


def text_of(outputs: Iterable[Mapping], values: bool = True) -> str:
    "What outputs say in plain text: printed lines and, if wanted, values; not pictures, tables, warnings or widgets."
    found = []
    for output in outputs:
        if output["output_type"] == "stream" and output["name"] == "stdout":
            found.append(joined(output["text"]))
        elif values and output["output_type"] in ("execute_result", "display_data") and not any(k.startswith("image/") for k in output["data"]):
            value = joined(output["data"].get("text/plain", ""))
            shown_otherwise = any(k == "text/html" or k.startswith("application/vnd") for k in output["data"])
            if not shown_otherwise and not OF_A_PICTURE.search(value):
                found.append(value)
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", "\n".join(found))           # colours and the like
    return re.sub(r" at 0x[0-9a-f]+", "", text)                                  # which cleaning takes away


def first_difference(stored: str, fresh: str, tolerance: float = 0.05) -> str | None:
    "The first lines that do not say the same; none if all do. Numbers may differ by a share, and near 0 by a millionth."
    close = lambda a, b: math.isclose(float(a), float(b), rel_tol=tolerance, abs_tol=1e-6)
    left, right = ([line.split() for line in MEASURED.sub("...", text).splitlines() if line.strip()] for text in (stored, fresh))
    for old, new in zip(left, right):
        old, new = " ".join(old), " ".join(new)
        words = [re.sub(r"[-\s]+", " ", NUMBER.sub("#", line)).strip() for line in (old, new)]
        numbers = [NUMBER.findall(line) for line in (old, new)]
        if words[0] != words[1] or not all(map(close, *numbers)):
            return f"stored: {old}\n fresh: {new}"
    return None if len(left) == len(right) else f"{len(left)} lines are stored, {len(right)} come out: {(left + right)[-1]}"


def shows(outputs: Iterable[Mapping]) -> bool:
    "Whether there is something to look at: a picture or a table."
    return any(kind.startswith("image/") or kind == "text/html" for output in outputs for kind in output.get("data", ()))


def watch(shell: type, found: Path) -> None:
    """Have notebooks that run in this process write the cells whose text is not what is stored into a file. `#| varies` excuses one, and a widget.
    Controls, which nbdev leaves out, are built once: one that fails, or shows nothing, fails its notebook."""
    run, run_all, differ = shell.cell, shell.run_all, []

    def build(self, cell, *args, **options):
        import torch
        failed = []                                        # a widget tells of an error where it would show a picture
        self.showtraceback = lambda error=None, *_, **__: failed.append((error or sys.exc_info())[1])
        try:
            with torch.random.fork_rng(devices=[]):        # what comes below draws what it draws without
                run(self, cell, *args, **options)
        finally:
            del self.showtraceback
        if failed or not shows(cell.get("outputs", ())):
            self.exc = failed[0] if failed else AssertionError("a control that shows nothing")

    def cell(self, cell, *args, **options):
        if cell.cell_type != "code":
            return run(self, cell, *args, **options)
        quiet = cell.source.rstrip().endswith(";")         # the shell would drop what such a cell prints, too
        stored, cell.source = text_of(cell.get("outputs", ()), not quiet), cell.source.rstrip().removesuffix(";")
        (build if CONTROL.search(cell.source) else run)(self, cell, *args, **options)
        excused = {"varies", "eval:"} & set(getattr(cell, "directives_", None) or ()) or "interact(" in cell.source
        if not excused and (says := first_difference(stored, text_of(cell.get("outputs", ()), not quiet))):
            differ.append(f"cell {cell.id}\n{says}")
            found.write_text(json.dumps(differ))

    def cells(self, nb, *args, preproc, **options):
        skipped = lambda cell: not CONTROL.search(cell.source) and preproc(cell)
        return run_all(self, nb, *args, preproc=skipped, **options)
    shell.cell, shell.run_all = cell, cells
