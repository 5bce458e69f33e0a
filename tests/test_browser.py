"The workbook as a reader meets it: JupyterLab and the site in a real browser."
import json
import re
import shutil
from pathlib import Path

import browser
import pytest

from prx_nb.lab import docs

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(browser.missing()), reason=browser.missing())]
PROBE = ["!command -v prx-nb", "!prx-nb ablate prediction_target --preset smoke --seeds 1 --dry-run", "import sys; print(sys.executable)"]


@pytest.fixture(scope="module")
def chrome():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as play:
        made = play.chromium.launch(executable_path=browser.chromium(), args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield made
        made.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return browser.copy_of_the_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def server(home, tmp_path_factory):
    with browser.running_lab(home, tmp_path_factory.mktemp("user") / "new") as found:
        yield found


@pytest.fixture
def lab(chrome, server):
    page = chrome.new_page(viewport={"width": 1280, "height": 900})
    yield browser.Lab(page, *server[:2])
    page.close()


def test_the_index_opens_first_with_every_picture_and_link_alive(lab, server):
    lab.open()
    assert lab.page.url.split("?")[0].endswith("/lab/tree/nbs/index.ipynb")
    lab.page.wait_for_function("() => { const all = [...document.querySelectorAll('.jp-Notebook img')]; return all.length > 9 && all.every(i => i.complete); }")
    pictures = lab.page.evaluate("() => [...document.querySelectorAll('.jp-Notebook img')].map(i => [i.src, i.naturalWidth, i.alt])")
    assert [src for src, width, alt in pictures if not width or not alt] == []
    dead = lab.page.evaluate("""async () => {
        const own = [...document.querySelectorAll('.jp-Notebook a[href]')].map(a => a.href).filter(h => h.startsWith(location.origin) && !h.includes('#'));
        const found = await Promise.all([...new Set(own)].map(async h => [h, (await fetch(h)).status]));
        return [found.length, found.filter(f => f[1] != 200)]; }""")
    assert dead[0] > 80 and dead[1] == []
    lab.page.click('.jp-Notebook a:text-is("Flow") >> nth=0')
    lab.page.wait_for_selector('.lm-TabBar-tabLabel:text-is("13_flow.ipynb")')
    assert "You are root" in server[2].read_text() or "--allow-root" not in server[2].read_text()


def test_commands_are_on_the_path_and_runs_land_in_the_checkout(lab, home):
    lab.open(browser.own_notebook(home, "probe.ipynb", *PROBE))
    lab.run_all()
    said = "\n".join(lab.page.locator(".jp-OutputArea-output").all_inner_texts())
    assert "bin/prx-nb" in said and f"runs in {home}/outputs: " in said, said
    assert "PRX Workbook" in lab.page.locator(".jp-KernelName").first.inner_text()
    lab.save()
    assert json.loads((home / "mine" / "probe.ipynb").read_text())["cells"][1]["outputs"], "what is mine is kept as it ran"


def keyboard_moves_a_picture(lab):
    "The first control with a slider: one picture, and another one after a key."
    cell = lab.page.locator(".jp-CodeCell:has(.noUi-handle)").first
    picture = cell.locator(".jp-OutputArea img")
    picture.first.wait_for(state="attached")
    assert picture.count() == 1, "one picture"
    before = picture.get_attribute("src")
    cell.locator(".noUi-handle").first.focus()
    lab.page.keyboard.press("ArrowRight")
    for _ in range(10 * browser.LONG):
        lab.page.wait_for_timeout(100)
        if picture.count() == 1 and picture.get_attribute("src") != before:
            return
    raise AssertionError(f"{picture.count()} pictures, and none moved")


@pytest.mark.parametrize("notebook", ["techniques/02_irepa", "techniques/05_sprint", "techniques/09_immiscible"])
def test_a_technique_runs_its_slider_moves_by_keyboard_and_git_stays_clean(lab, home, notebook):
    lab.open(f"nbs/{notebook}.ipynb")
    lab.run_all()
    assert lab.errors() == []
    keyboard_moves_a_picture(lab)
    lab.save()
    assert browser.git(home, "status", "--short") == "", "read, run and saved"


def test_in_the_playground_a_prompt_is_typed_and_new_samples_appear(lab, home):
    lab.open("nbs/lab/27_explore.ipynb")
    lab.run_all()
    assert lab.errors() == []
    play = lab.page.locator(".jp-OutputArea-output:has(.widget-text input)").last
    pictures = lambda: [img.get_attribute("src") for img in play.locator("img").all()]
    play.locator("img").first.wait_for()
    before, words = pictures(), "noto on blue: red heart"
    assert len(before) == len(set(before)) == 4, "four pictures, each from noise of its own"
    play.locator(".widget-text input").fill(words)
    play.locator(".widget-text input").press("Enter")
    play.locator(f'img[alt="picture 4 of 4 drawn for: {words}"]').wait_for()
    assert len(pictures()) == 4 and not set(pictures()) & set(before), "the same pictures"
    assert "samples in " in play.locator("[role=status]").inner_text()


@pytest.mark.parametrize("notebook", ["core/27_train"])
def test_the_rooms_of_training_run(lab, notebook):
    lab.open(f"nbs/{notebook}.ipynb")
    lab.run_all()
    assert lab.errors() == []


TRAINING = ("""from prx_nb.core.recipe import preset
from prx_nb.core.train import train
recipe = preset("smoke").replace({"train.steps": 200})""", "run = train(recipe, '../outputs/stopped')", "print(run.record['status'], len(run.curves.step.unique()))")


def test_training_is_stopped_by_the_button_and_goes_on_when_called_again(lab, home):
    record = lambda: json.loads((home / "outputs/stopped/record.json").read_text())
    lab.open(browser.own_notebook(home, "training.ipynb", *TRAINING))
    lab.run(0)
    lab.run(1)
    live = lab.cell(1).locator(".jp-OutputArea")
    live.locator("p:has-text('mean of the last losses')").wait_for()
    lab.page.click('[data-command="notebook:interrupt-kernel"]:visible')
    said, stopped = lab.failed(), record()
    assert len(said) == 1 and (at := re.fullmatch(r"stopped at step (\d+); call again to go on", said[0])), said
    lab.cell(1).locator('[data-mime-type="application/vnd.jupyter.stderr"]').get_by_text(said[0], exact=True).wait_for()
    assert stopped["status"] == "interrupted" and 1 <= int(at[1]) < 200
    assert (home / f"outputs/stopped/checkpoint/step-{int(at[1]):07d}.safetensors").is_file()
    lab.run(1)
    live.locator("p:has-text('step 200 of 200')").wait_for()
    lab.run(2)
    lab.cell(2).locator("text=done 200").wait_for()
    assert lab.errors() == [] and live.locator("img").count() > 1, "curves, and what it draws"
    assert record()["started"] == stopped["started"] and record()["status"] == "done", "it began anew"


def test_what_is_changed_is_saved_and_seen(lab, home):
    lab.open("nbs/core/03_seeds.ipynb")
    lab.page.locator(".jp-CodeCell .cm-content").first.click()
    lab.page.keyboard.press("Control+End")
    lab.page.keyboard.type("  # mine")
    lab.save()
    assert browser.git(home, "status", "--short") == " M nbs/core/03_seeds.ipynb\n"
    browser.git(home, "checkout", "-q", "nbs/core/03_seeds.ipynb")


def test_a_page_of_the_site_is_searched_and_fits_a_telephone(chrome, tmp_path):
    (nbs := tmp_path / "w" / "nbs").mkdir(parents=True)
    for name in ("core/13_flow", "core/03_seeds"):
        nb = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text())
        text = re.sub(r"\]\([^)]*\)", "]", json.dumps(nb))                  # links lead out of this small site
        (nbs / f"{name.split('/')[1]}.ipynb").write_text(text)
    first = {"cell_type": "markdown", "id": "a", "metadata": {}, "source": "# Small\n\n![Drawings](samples.png)"}
    shutil.copy(ROOT / "outputs/published/prediction_target/samples.png", nbs)
    (nbs / "index.ipynb").write_text(json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [first]}))
    start = docs.build(tmp_path / "w", tmp_path / "site")
    page = chrome.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
    asked = []
    page.on("request", lambda request: asked.append(request.url) if not request.url.startswith(("file:", "data:")) else None)
    page.goto(start.as_uri())
    page.wait_for_url("**/nbs/index.html")
    assert page.evaluate("() => [...document.images].every(i => i.naturalWidth > 0)")
    dark = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", dark)[:3])) < 200, dark
    page.goto((tmp_path / "site" / "nbs" / "13_flow.html").as_uri())
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth") and page.locator("math").count() > 20
    page.set_viewport_size({"width": 1280, "height": 900})
    page.fill(".sidebar-search", "velocity")
    page.press(".sidebar-search", "Enter")
    page.wait_for_selector('#search-results a:has-text("Flow")')
    page.click('#search-results a:has-text("Flow") >> nth=0')
    assert "13_flow.html" in page.url and asked == []
    page.close()
