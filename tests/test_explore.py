"Training in a real kernel as a person uses it: a figure that grows, a stop button, and the same cell again."
import json
import re
import time

import pytest
from jupyter_client.manager import start_new_kernel

from prx_nb.core.recipe import preset
from prx_nb.core.train import Run

PREPARE = """
from prx_nb.core.recipe import preset
from prx_nb.core.train import train
import prx_nb.core.live, matplotlib.figure, pandas
recipe = preset("smoke", 3000).replace({"train.validate_every": 20, "train.checkpoint_every": 1000})
"""
TRAIN = "train(recipe, {out!r}, device='cpu', every=5)"


class Person:
    "Runs cells in a kernel of its own; `there`: a person who can be asked, as in JupyterLab."

    def __init__(self, folder, there=True):
        self.there = there
        self.manager, self.client = start_new_kernel(kernel_name="python3", cwd=str(folder))

    def run(self, code, until=None, limit=240):
        "Messages of a cell as (seconds, kind, content); at the first that `until` likes, the stop button is pressed."
        began, found, pressed = time.monotonic(), [], False
        asked = self.client.execute(code, allow_stdin=self.there)
        while time.monotonic() - began < limit:
            message = self.client.get_iopub_msg(timeout=limit)
            if message["parent_header"].get("msg_id") != asked:
                continue
            kind, content = message["msg_type"], message["content"]
            found.append((time.monotonic() - began, kind, content))
            if until and not pressed and until(kind, content):
                pressed = True
                self.manager.interrupt_kernel()
            if kind == "status" and content["execution_state"] == "idle":
                return found
        raise AssertionError(f"no end after {limit} s: {found[-3:]}")

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture
def person(tmp_path):
    made = []

    def make(there=True):
        made.append(Person(tmp_path, there))
        return made[-1]
    yield make
    for one in made:
        one.close()


def pages(messages):
    return [(seconds, content["data"]["text/html"]) for seconds, kind, content in messages
            if kind in ("display_data", "update_display_data") and "text/html" in content["data"]]


def test_the_stop_button_saves_says_so_in_a_line_and_the_same_cell_goes_on(person, tmp_path):
    someone, out = person(), str(tmp_path / "run")
    assert not [c for _, kind, c in someone.run(PREPARE) if kind == "error"]
    grown = lambda kind, content: kind == "update_display_data" and "step 10 of" in content["data"].get("text/html", "")
    first = someone.run(TRAIN.format(out=out), until=grown)
    shown = pages(first)
    assert "are opened" in shown[0][1] and shown[0][0] < 5, "the first word comes at once (a busy machine is given some seconds)"
    assert any("validation up to step 10" in page and page.count("<figure") == 6 for _, page in shown), "curves and samples in place"
    assert sum(kind == "display_data" and "text/html" in c["data"] and "<p>" in c["data"]["text/html"] for _, kind, c in first) == 1, "one figure"
    error = next(content for _, kind, content in first if kind == "error")
    step = int(re.fullmatch(r"stopped at step (\d+); call again to go on", error["traceback"][0])[1])
    assert error["ename"] == "Stopped" and len(error["traceback"]) == 1 and step >= 10
    assert (tmp_path / f"run/checkpoint/step-{step:07d}.safetensors").exists()
    record = json.loads((tmp_path / "run/record.json").read_text())
    assert record["status"] == "interrupted"
    later = lambda kind, content: kind == "update_display_data" and f"step {step // 5 * 5 + 10} of" in content["data"].get("text/html", "")
    second = someone.run(TRAIN.format(out=out), until=later)
    assert f"step {step} of 3000" in pages(second)[1][1], "it goes on where it stopped"
    again = Run.load(tmp_path / "run")
    losses = again.curves[again.curves.name == "loss flow"].step.tolist()
    assert losses == list(range(1, losses[-1] + 1)) and losses[-1] > step


def test_where_nobody_can_be_asked_there_are_lines_and_an_interruption_is_what_it_was(person, tmp_path):
    nobody, out = person(there=False), str(tmp_path / "run")
    nobody.run(PREPARE)
    printed = lambda kind, content: kind == "stream" and "step" in content["text"]
    found = nobody.run(TRAIN.format(out=out), until=printed)
    assert not pages(found), "no figure"
    error = next(content for _, kind, content in found if kind == "error")
    assert error["ename"] == "KeyboardInterrupt" and len(error["traceback"]) > 1
    assert not list((tmp_path / "run/checkpoint").glob("step-*")), "the last checkpoint stands, and there was none"


def test_a_preset_of_another_length_looks_and_saves_in_proportion():
    longer = preset("smoke", 300).train
    assert (longer.steps / longer.checkpoint_every, longer.steps / longer.validate_every) == (2, 2)
    assert preset("smoke").replace("train.steps", 300).train.checkpoint_every == 6, "what is said one by one is taken at its word"
