"Training in a real kernel as a person uses it: a figure that grows, a stop button, and the same cell again."
import json
import re
import time

import pytest
import torch
import torch.nn.functional as F
from jupyter_client.manager import start_new_kernel

from prx_nb.core import denoiser, live
from prx_nb.core.checkpoint import CheckpointError
from prx_nb.core.denoiser import PRX
from prx_nb.core.interop import to_diffusers
from prx_nb.core.live import Live
from prx_nb.core.recipe import RecipeError, preset
from prx_nb.core.train import Run, continue_, train, weights_of
from prx_nb.lab import explore

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


def test_two_processes_begin_with_the_weights_of_a_folder(tmp_path):
    short = preset("smoke", 3).replace("optimizer.cooldown", 0.0)
    quiet = {"progress": False, "device": "cpu"}
    first = train(short, tmp_path / "first", **quiet)
    one, two = (train(short.replace("train.processes", n), tmp_path / f"of{n}", init=tmp_path / "first", **quiet) for n in (1, 2))
    losses = lambda run: run.curves[run.curves.name == "loss flow"].value.tolist()
    assert losses(two) == pytest.approx(losses(one), rel=1e-4) and losses(two)[0] != pytest.approx(losses(first)[0], rel=1e-4)
    assert two.record["init"] == one.record["init"] == weights_of(first).told()
    longer = continue_(two, 2, **quiet)
    assert longer.record["init"]["step"] == 3 and losses(longer)[:3] == losses(two) and len(losses(longer)) == 5


def test_weights_come_from_a_folder_for_diffusers(tmp_path):
    recipe = preset("smoke", 2).replace({"flow.prediction": "x", "flow.noise_scale": 2.0, "sample.grid": "diffusers"})
    first = train(recipe, tmp_path / "first", progress=False, device="cpu")
    to_diffusers(first, tmp_path / "pipe")
    tuned = train(recipe.replace("seed", 1), tmp_path / "tuned", init=tmp_path / "pipe", progress=False, device="cpu")
    assert tuned.recipe.init == weights_of(first).mark and tuned.record["init"]["from"] == str(tmp_path / "pipe")
    with pytest.raises(RecipeError, match="init does not fit the recipe's denoiser: .* is .* there, .* here"):
        train(recipe.replace("denoiser.hidden_size", 64), tmp_path / "wide", init=tmp_path / "pipe", progress=False)


def test_the_way_through_a_fused_network_is_followed():
    net = PRX(**preset("smoke").replace({"denoiser.depth": 4, "denoiser.fusion": (1, 2)}).denoiser.model_dump())
    for p in net.parameters():
        torch.nn.init.normal_(p, float(p.ndim == 1), 0.1, generator=torch.Generator().manual_seed(1))
    x_t, t, text = torch.randn(1, 3, 16, 16), torch.tensor([0.4]), torch.randn(1, 5, 384)
    with torch.no_grad():
        taps = net(x_t, t, text, taps=(0, 1, 2, 3)).taps
        vec, turn = F.silu(denoiser.time_vector(net, t, 16, 16)), denoiser.rotary(4, 4, net.config["axes_dim"], 1e4)
        for i, x in enumerate(explore.entering(net, x_t, taps)):
            torch.testing.assert_close(net.blocks[i](x, net.txt_in(text), None, vec, turn), taps[i])


def test_the_shipped_run_puts_things_on_the_ground_that_is_asked_for():
    run = Run.load(explore.shipped())
    grounds = {"red": (224, 60, 60), "green": (75, 175, 80), "blue": (65, 110, 220), "yellow": (245, 220, 95)}
    images = run.sample([f"noto on {name}: tiger face" for name in grounds], seed=3).images
    border = torch.cat((images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]), 2).median(2).values
    wanted = torch.tensor(list(grounds.values())) / 127.5 - 1
    assert torch.cdist(border, wanted).argmin(1).tolist() == [0, 1, 2, 3], border
    with pytest.raises(CheckpointError, match="keeps its weights alone, without an optimizer"):
        continue_(run, 10)


def test_a_figure_that_fails_ends_no_training_and_changes_no_weight(tmp_path, monkeypatch):
    recipe, quiet = preset("smoke", 4), {"progress": False, "device": "cpu"}
    alone = train(recipe, tmp_path / "alone", **quiet)
    seen = train(recipe, tmp_path / "seen", watch=Live(["a cat"]), every=1, **quiet)
    monkeypatch.setattr(live, "live_page", lambda *a: 1 / 0)
    failed = train(recipe, tmp_path / "failed", watch=(figure := Live(["a cat"])), every=1, **quiet)
    assert "no figure, ZeroDivisionError" in figure.page
    for run in (seen, failed):
        assert all(v.equal(alone.model.state_dict()[k]) for k, v in run.model.state_dict().items())
