"JupyterLab in Debian's chromium, by the command of `make lab` on a copy of the checkout."
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = ("nbs", "prx_nb", "outputs/published", "sweeps", "settings.ini", "pyproject.toml", "README.md", ".gitignore", ".gitattributes")
# every cell is drawn, not only those in sight; nothing asks or tells in a corner
SETTINGS = {"notebook-extension/tracker": {"windowingMode": "none"}, "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
            "docmanager-extension/plugin": {"autosave": False}}
LONG = 180        # seconds to wait for anything: on a machine that others use, too, a page takes its time

ERRORS = """() => jupyterapp.shell.currentWidget.context.model.toJSON().cells.flatMap(c => c.outputs || [])
    .filter(o => o.output_type == 'error').map(o => o.traceback.join('\\n'))"""


def chromium() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def missing() -> str:
    "What keeps the browser tests from running here; empty if nothing does."
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is not installed (pip install -e '.[dev]')"
    return "" if chromium() else "no chromium here (apt-get install chromium)"


def git(home: Path, *words: str) -> str:
    return subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(home), *words], capture_output=True, text=True, check=True).stdout


def copy_of_the_checkout(home: Path) -> Path:
    for name in COPIED:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, home / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        else:
            shutil.copy(ROOT / name, home / name)
    git(home, "init", "-q")
    git(home, "add", ".")
    git(home, "commit", "-qm", "as it is")
    return home


def own_notebook(home: Path, name: str, *cells: str) -> str:
    "A reader's notebook in `mine`; what to open it by."
    (home / "mine").mkdir(exist_ok=True)
    made = [{"cell_type": "code", "id": f"c{n}", "metadata": {}, "source": text, "outputs": [], "execution_count": None} for n, text in enumerate(cells)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    (home / "mine" / name).write_text(json.dumps({"cells": made, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
    return f"mine/{name}"


def settings_of_a_new_user(folder: Path) -> dict[str, str]:
    for name, values in SETTINGS.items():
        (path := folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings").parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    return {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"), "JUPYTER_CONFIG_DIR": str(folder / "config"),
            "JUPYTER_DATA_DIR": str(folder / "data"), "JUPYTER_RUNTIME_DIR": str(folder / "runtime"), "IPYTHONDIR": str(folder / "ipython")}


@contextmanager
def running_lab(home: Path, user: Path):
    "The address of JupyterLab with its token, and what it said until it was there."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, log = secrets.token_hex(16), user / "lab.log"
    user.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "prx_nb.lab.desk", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
               "--expose-app-in-browser", f"--IdentityProvider.token={token}"]
    own = {k: v for k, v in os.environ.items() if k not in ("MPLBACKEND", "PRX_NB_OUT")}          # what tests set is no reader's
    with open(log, "w") as out:
        server = subprocess.Popen(command, cwd=home, stdout=out, stderr=out, env=own | settings_of_a_new_user(user) | {"PYTHONPATH": str(home)})
    try:
        end = time.monotonic() + LONG
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={token}", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", token, log
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


class Lab:
    "A page with JupyterLab, and what a reader does in it."

    def __init__(self, page, address: str, token: str):
        self.page, self.address, self.token = page, address, token
        page.set_default_timeout(1000 * LONG)

    def open(self, notebook: str = "") -> None:
        "A notebook, alone in the window; none: what the server shows first. Until its kernel is idle."
        where = f"/lab/tree/{notebook}?reset&token={self.token}" if notebook else f"/?token={self.token}"
        self.page.goto(self.address + where)
        self.page.wait_for_selector(".jp-Notebook .jp-Cell")
        # what is run before the kernel is there asks which one it shall be
        self.idle()

    def menu(self, name: str, item: str) -> None:
        self.page.click(f'.lm-MenuBar-itemLabel:text-is("{name}")')
        self.page.click(f'.lm-Menu-itemLabel:text-is("{item}")')

    def run_all(self, seconds: float = 2 * LONG) -> None:
        "Run > Run All Cells, until all have run."
        begin = time.monotonic()
        self.menu("Run", "Run All Cells")
        self.page.wait_for_function(f"""() => {{
            const prompts = [...document.querySelectorAll('.jp-CodeCell')].filter(c => c.querySelector('.cm-content').innerText.trim())
                .map(c => c.querySelector('.jp-InputPrompt').innerText);
            return ({ERRORS})().length || prompts.every(p => /\\d/.test(p)); }}""", timeout=1000 * seconds, polling=500)
        self.seconds = time.monotonic() - begin

    def errors(self) -> list[str]:
        "The tracebacks that cells have left. A page shows them as it shows what is printed on stderr."
        return self.page.evaluate(ERRORS)

    def run(self, number: int) -> None:
        "Run one code cell, and do not wait for it."
        self.cell(number).locator(".cm-content").click()
        self.page.keyboard.press("Control+Enter")

    def cell(self, number: int):
        return self.page.locator(".jp-CodeCell").nth(number)

    def failed(self) -> list[str]:
        "As soon as a cell has ended with an error: its words."
        self.page.wait_for_function(f"() => ({ERRORS})().length", polling=200)
        return self.errors()

    def idle(self) -> None:
        self.page.wait_for_selector('.jp-StatusBar-TextItem:text-is("PRX Workbook | Idle")')

    def save(self) -> None:
        self.menu("File", "Save Notebook")
        self.page.wait_for_function("() => !document.querySelector('.jp-mod-dirty')")
