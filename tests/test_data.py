"""prx_nb.core.data, emoji and images: sources, cache, split, and what happens when processes die and files are broken."""
import importlib.util
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prx_nb.core import data, emoji
from prx_nb.core import images as making
from prx_nb.core.data import DataError, Images, Item, load, split
from prx_nb.core.files import cache_dir
from prx_nb.core.recipe import Data

SCRIPT = "from prx_nb.core import data, recipe\ndata.load(recipe.Data(limit={limit}), workers={workers})\nprint('done')\n"


@pytest.fixture(scope="session")
def packages():
    "The folder of fetched packages, filled once."
    emoji.emoji_jobs(Data())
    return cache_dir("packages")


@pytest.fixture
def cache(tmp_path, monkeypatch, packages):
    "An empty cache that shares the fetched packages."
    home = tmp_path / "cache"
    home.mkdir()
    (home / "packages").symlink_to(packages)
    monkeypatch.setenv("PRX_NB_CACHE", str(home))
    return home


def same(a, b):
    assert a.items == b.items and a.key == b.key and a.bad == b.bad and a.notice == b.notice
    assert np.array_equal(a.pixels, b.pixels)


def start(tmp_path, limit, workers=2):
    "A real process, a script without a __main__ guard, that loads emoji into the cache of the environment."
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(limit=limit, workers=workers))
    return subprocess.Popen([sys.executable, str(script)], start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def helpers_of(home):
    "Numbers of living helper processes that use this cache."
    found = []
    for p in Path("/proc").iterdir() if Path("/proc").is_dir() else []:
        try:
            if p.name.isdigit() and b"_serve" in (p / "cmdline").read_bytes() and str(home).encode() in (p / "environ").read_bytes():
                found.append(p.name)
        except OSError:
            pass
    return found


# ---------------------------------------------------------------- emoji
def test_emoji_items_and_pixels(cache):
    import resvg_py
    images = load(Data(limit=120, size=48), progress=False)
    assert 100 < len(images) <= 120 and images.pixels.dtype == np.uint8 and images.pixels.shape[1:] == (48, 48, 3)
    assert len({i.key for i in images.items}) == len(images) and not images.bad
    assert {i.style for i in images.items} == {"noto", "twemoji", "openmoji", "fluent"}
    assert "Apache" in images.notice and "CC BY-SA" in images.notice and "Microsoft" in images.notice
    assert next(cache.glob("images/*/NOTICE")).read_text("utf-8") == images.notice
    # an independent drawing of one: straight onto its ground, at the size itself
    n, item = next((n, i) for n, i in enumerate(images.items) if i.style == "twemoji")
    code = item.key.split("/")[1]
    files = {m.member.split("/")[-1]: json.loads(m.path.read_text("utf-8")) for m in emoji.set_files("twemoji")}
    name = next(v for k, v in files["chars.json"].items() if k.upper() == code)
    body = files["icons.json"]["icons"][name]["body"]
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 36 36" width="48" height="48">{body}</svg>'
    ground = "#" + bytes(data.PALETTE[item.background]).hex()
    png = resvg_py.svg_to_bytes(svg_string=svg, background=ground)
    direct = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"), float)
    assert np.abs(direct - images.pixels[n]).mean() < 3


def test_emoji_settings(packages):
    jobs = lambda **k: emoji.emoji_jobs(Data(**k))[0]
    base, tones = jobs(), jobs(skin_tones=True)
    assert len(base) > 7000 and len(tones) > 14000
    assert {j["item"]["concept"] for j in tones} == {j["item"]["concept"] for j in base}, "tones add no concepts"
    assert {j["item"]["background"] for j in base} == set(data.PALETTE)
    assert {j["item"]["background"] for j in jobs(background="white")} == {"white"}
    few, more = ({j["item"]["key"] for j in jobs(limit=n)} for n in (100, 1000))
    assert few < more and len(few) == 100
    assert len({j["item"]["concept"] for j in jobs(limit=100)}) < 60, "concepts are kept whole, in all their styles"


def test_facts_do_not_depend_on_size(cache):
    small, large = (load(Data(limit=40, size=s), progress=False) for s in (16, 64))
    assert [i.facts for i in small.items] == [i.facts for i in large.items] and small.key != large.key
    yellow = next(i for i in small.items if i.facts["colours"])
    assert 0 < yellow.facts["fill"] <= 1 and all(0 <= c <= 1 for c in yellow.facts["centre"])


def test_twins_inside_a_style_are_dropped(cache, monkeypatch):
    def job(key, colour):
        style, code = key.split("/")
        svg = {"body": f'<rect width="9" height="5" fill="{colour}"/>', "box": [0, 0, 10, 10], "flips": [False, False]}
        return {"item": {"key": key, "concept": code, "style": style, "background": "white"}, "svg": svg}
    made = [job("noto/1", "red"), job("noto/2", "red"), job("noto/3", "blue"), job("fluent/1", "red")]
    monkeypatch.setitem(data.SOURCES, "emoji", lambda d: (made, "notice"))
    images = load(Data(), progress=False)
    assert [i.key for i in images.items] == ["noto/1", "noto/3", "fluent/1"]
    assert [tuple(p[2, 2]) for p in images.pixels] == [(255, 0, 0), (0, 0, 255), (255, 0, 0)]


def test_batch_is_a_copy_in_range(cache):
    images = load(Data(limit=16), progress=False)
    index = torch.tensor([3, 0, 3])
    batch = images.batch(index)
    assert batch.shape == (3, 3, 32, 32) and batch.dtype == torch.float32 and batch.min() >= -1 and batch.max() <= 1
    assert batch[0].equal(batch[2]) and batch.is_contiguous()
    expected = torch.tensor(np.array(images.pixels[3])).permute(2, 0, 1) / 127.5 - 1
    assert torch.allclose(batch[0], expected)
    batch.zero_()
    assert images.batch(index)[0].allclose(expected)


# ---------------------------------------------------------------- processes that die
LIMIT = 760


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, packages):
    "Images made in one go by one process."
    home = tmp_path_factory.mktemp("whole")
    (home / "packages").symlink_to(packages)
    before, os.environ["PRX_NB_CACHE"] = os.environ.get("PRX_NB_CACHE"), str(home)
    try:
        return load(Data(limit=LIMIT), progress=False, workers=1)
    finally:
        os.environ.pop("PRX_NB_CACHE")
        if before is not None:
            os.environ["PRX_NB_CACHE"] = before


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_drawing_goes_on(cache, tmp_path, undisturbed, monkeypatch, how):
    child = start(tmp_path, LIMIT)
    deadline = time.monotonic() + 120
    while len(list(cache.glob("images/*/shard-*.npz"))) < 2 and time.monotonic() < deadline:
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.01)
    os.killpg(child.pid, how) if how == signal.SIGINT else child.kill()      # Ctrl-C reaches the whole group
    child.communicate(timeout=60)
    assert child.returncode != 0 and not list(cache.glob("images/*/items.json"))
    while helpers_of(cache) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not helpers_of(cache), "helper processes outlive their parent"
    there = len(list(cache.glob("images/*/shard-*.npz")))
    made = []
    make = making._make_shard
    monkeypatch.setattr(making, "_make_shard", lambda **k: (made.append(k), make(**k)))
    same(load(Data(limit=LIMIT), progress=False, workers=1), undisturbed)
    total = -(-LIMIT // making.SHARD)
    assert 2 <= there <= total and len(made) == total - there, "finished shards are kept"
    assert not [p.name for p in next(cache.glob("images/*")).iterdir() if p.name not in ("items.json", "pixels.npy", "NOTICE", "lock")]


def test_two_processes_at_once(cache, tmp_path, undisturbed):
    children = [start(tmp_path, LIMIT) for _ in range(2)]
    for child in children:
        out, err = child.communicate(timeout=200)
        assert child.returncode == 0 and "done" in out, err
    same(load(Data(limit=LIMIT), progress=False), undisturbed)


def test_helper_that_cannot_start_is_one_error(cache, monkeypatch):
    dead = lambda: subprocess.Popen([sys.executable, "-c", "import sys; sys.exit('no such thing')"], text=True,
                                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    monkeypatch.setattr(making, "_helper", dead)
    with pytest.raises(DataError, match="died"):
        load(Data(limit=300), progress=False, workers=2)


def test_no_renderer_is_one_error(cache, monkeypatch):
    import importlib.util
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install resvg_py"):
        load(Data(limit=16), progress=False)
    assert not list(cache.glob("images/*/items.json"))


def test_damaged_cache_is_named(cache):
    load(Data(limit=16), progress=False)
    pixels = next(cache.glob("images/*/pixels.npy"))
    pixels.write_bytes(pixels.read_bytes()[:1000])
    with pytest.raises(DataError, match="damaged.*delete") as error:
        load(Data(limit=16), progress=False)
    assert str(pixels.parent) in str(error.value)


def test_wrong_checksum_in_the_package_cache(tmp_path, monkeypatch, packages):
    from prx_nb.core.files import FetchError
    for member in [*emoji.set_files("fluent"), *emoji.name_files()]:
        to = tmp_path / "packages" / member.path.parent.name / member.path.name
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(member.path.read_bytes())
    monkeypatch.setenv("PRX_NB_CACHE", str(tmp_path))
    icons = emoji.set_files("fluent")[0].path
    assert tmp_path in icons.parents
    icons.write_bytes(icons.read_bytes().replace(b"#0074ba", b"#ff0000", 1))
    with pytest.raises(FetchError, match="wrong checksum.*delete the file"):
        load(Data(styles=("fluent",), limit=16), progress=False)


# ---------------------------------------------------------------- folder
def picture(seed=0, size=(20, 14)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def folder(path, rows, name="metadata.jsonl"):
    path.mkdir(parents=True, exist_ok=True)
    (path / name).write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")


def load_folder(path, **k):
    return load(Data(source="folder", path=str(path), size=8, **k), progress=False)


def test_folder_with_metadata(cache, tmp_path):
    root = tmp_path / "pictures"
    folder(root, [{"file_name": "a.png", "text": "ein Käfer 🪲", "concept": "beetle", "style": "photo"},
                  {"file_name": "deep/b c.png", "caption": "two"}])
    (root / "deep").mkdir()
    picture(1).save(root / "a.png")
    picture(2).save(root / "deep" / "b c.png")
    images = load_folder(root)
    assert [(i.key, i.caption, i.concept, i.style, i.label) for i in images.items] == [
        ("a.png", "ein Käfer 🪲", "beetle", "photo", "a"), ("deep/b c.png", "two", "deep/b c", "", "b c")]
    assert images.items[0].background is None and set(images.items[0].facts) == {"colours", "shape"}
    first = images.key
    picture(3).save(root / "a.png")                                  # a changed file is a new set
    again = load_folder(root)
    assert again.key != first and not np.array_equal(again.pixels[0], images.pixels[0])


def test_folder_without_metadata(cache, tmp_path):
    root = tmp_path / "p"
    (root / "x").mkdir(parents=True)
    picture(1).save(root / "x" / "red_fox.jpg")
    (root / "x" / "red_fox.txt").write_text("\ufeffa fox, rot wie Glühwein", "utf-8")
    picture(2).save(root / "lake.webp")
    items = {i.key: i for i in load_folder(root).items}
    assert items["x/red_fox.jpg"].caption == "a fox, rot wie Glühwein" and items["lake.webp"].caption is None
    assert items["lake.webp"].label == "lake" and items["x/red_fox.jpg"].label == "red fox"


def test_folder_metadata_in_subfolder_and_csv(cache, tmp_path):
    folder(tmp_path / "p" / "train", [{"file_name": "a.png", "text": "one"}])
    (tmp_path / "p" / "test").mkdir()
    (tmp_path / "p" / "test" / "metadata.csv").write_text('file_name,text\na.png,"two, with a comma"\n')
    for part in ("train", "test"):
        picture(1).save(tmp_path / "p" / part / "a.png")
    assert {i.key: i.caption for i in load_folder(tmp_path / "p").items} == {"train/a.png": "one", "test/a.png": "two, with a comma"}


def test_image_modes_orientation_and_crop(cache, tmp_path):
    root = tmp_path / "p"
    root.mkdir()
    stripes = np.zeros((10, 30, 3), np.uint8)
    stripes[:, 10:20] = (255, 0, 0)
    Image.fromarray(stripes).save(root / "wide.png")                 # the middle square is red
    clear = Image.new("RGBA", (12, 12), (0, 0, 0, 0))
    clear.save(root / "clear.png")                                   # becomes white
    index = Image.new("P", (12, 12), 0)
    index.putpalette([0, 0, 255] * 256)
    index.info["transparency"] = 0
    index.save(root / "palette.png", transparency=0)
    Image.new("L", (12, 12), 128).save(root / "grey.png")
    Image.new("CMYK", (12, 12), (0, 255, 255, 0)).save(root / "cmyk.jpg", quality=100)
    Image.fromarray(np.full((12, 12), 0x8080, np.uint16)).save(root / "deep.png")
    turned = np.zeros((12, 12, 3), np.uint8)
    turned[:6] = 255                                                 # upper half white; shown turned by 90 degrees
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(turned).save(root / "turned.png", exif=exif)
    images = load_folder(root)
    pixel = {i.key: images.pixels[n].astype(int) for n, i in enumerate(images.items)}
    assert not images.bad and len(images) == 7
    assert np.abs(pixel["wide.png"] - (255, 0, 0)).max() < 60 and np.abs(pixel["wide.png"][:, 3:5] - (255, 0, 0)).max() < 5
    assert (pixel["clear.png"] == 255).all() and (pixel["palette.png"] == 255).all()
    assert (pixel["grey.png"] == 128).all() and (pixel["deep.png"] == 128).all()
    assert pixel["cmyk.jpg"][4, 4, 0] > 200 and pixel["cmyk.jpg"][4, 4, 1] < 60
    assert pixel["turned.png"][:, :3].max() < 30 and pixel["turned.png"][:, 5:].min() > 225, "rotated clockwise: white is right"


def test_resize_is_antialiased(cache, tmp_path):
    root = tmp_path / "p"
    root.mkdir()
    fine = np.zeros((256, 256, 3), np.uint8)
    fine[:, ::2] = 255                                               # nearest neighbour would give black or white
    Image.fromarray(fine).save(root / "fine.png")
    assert np.abs(load_folder(root).pixels.astype(int) - 127).max() < 12


def test_broken_images_are_counted_and_named(cache, tmp_path):
    root = tmp_path / "p"
    names = [f"{n:02d}.png" for n in range(40)]
    folder(root, [{"file_name": n, "text": n} for n in names])
    for n in names:
        picture(int(n[:2]), (40, 40)).save(root / n)
    whole = (root / "07.png").read_bytes()
    (root / "07.png").write_bytes(whole[:len(whole) // 2])           # truncated
    (root / "08.png").write_text("<html>not found</html>")           # no image
    (root / "09.png").unlink()                                       # missing
    (root / "10.png").write_bytes(b"")                               # empty
    images = load_folder(root, max_bad=0.1)
    assert len(images) == 36 and [name for name, _ in images.bad] == ["07.png", "08.png", "09.png", "10.png"]
    assert all(reason for _, reason in images.bad) and [i.key for i in images.items] == [n for n in names if n not in dict(images.bad)]
    assert np.array_equal(images.pixels[7], load_folder(root, max_bad=0.1).pixels[7])
    with pytest.raises(DataError, match=r"4 of 40 images cannot be read, more than data.max_bad = 0.05.*07.png.*08.png.*09.png") as error:
        load_folder(root, max_bad=0.05)
    assert len(str(error.value).splitlines()) == 1
    (root / "07.png").write_bytes(whole)                             # repaired: the good one is seen
    assert len(load_folder(root, max_bad=0.1)) == 37


@pytest.mark.parametrize("make, message", [
    (lambda p: None, "no such folder"),
    (lambda p: p.mkdir(), "holds no images"),
    (lambda p: (p.mkdir(), (p / "metadata.jsonl").write_text('{"file_name": "a.png"\n')), "not valid JSON"),
    (lambda p: folder(p, [{"name": "a.png"}]), "row 1: no 'file_name'"),
    (lambda p: folder(p, [{"file_name": "a.png"}, {"file_name": "a.png"}]), "twice: a.png"),
    (lambda p: (p.mkdir(), (p / "metadata.jsonl").write_bytes(b'{"file_name": "\xff"}')), "not UTF-8"),
    (lambda p: folder(p, [{"file_name": "a.png", "text": "x"}]), "1 of 1 images cannot be read"),
])
def test_bad_folders(cache, tmp_path, make, message):
    make(tmp_path / "p")
    with pytest.raises(DataError, match=message):
        load_folder(tmp_path / "p")


# ---------------------------------------------------------------- hf
hf = pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="the extra hf is not installed")


def png(seed):
    out = io.BytesIO()
    picture(seed).save(out, "PNG")
    return out.getvalue()


def parquet(path, columns):
    import pyarrow as pa
    import pyarrow.parquet as pq
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def load_hf(path, **k):
    return load(Data(source="hf", path=str(path), size=8, **k), progress=False)


@hf
def test_hf_parquet_equals_folder(cache, tmp_path):
    n = 20
    parquet(tmp_path / "hf" / "a.parquet", {"image": [{"bytes": png(i), "path": None} for i in range(n)],
                                            "text": [f"bild {i} ü" for i in range(n)], "score": list(range(n))})
    folder(tmp_path / "f", [{"file_name": f"{i:02d}.png", "text": f"bild {i} ü"} for i in range(n)])
    for i in range(n):
        (tmp_path / "f" / f"{i:02d}.png").write_bytes(png(i))
    one, other = load_hf(tmp_path / "hf"), load_folder(tmp_path / "f")
    assert [i.caption for i in one.items] == [i.caption for i in other.items] and np.array_equal(one.pixels, other.pixels)
    assert len({i.concept for i in one.items}) == n and len(load_hf(tmp_path / "hf" / "a.parquet", limit=9)) == 9


@hf
def test_hf_typed_columns_and_broken_rows(cache, tmp_path):
    import datasets
    rows = [png(i) for i in range(12)]
    rows[5] = rows[5][:60]
    typed = datasets.Dataset.from_dict({"caption": [str(i) for i in range(12)], "jpg": [{"bytes": b, "path": None} for b in rows]})
    typed.cast_column("jpg", datasets.Image(decode=False)).to_parquet(tmp_path / "t.parquet")
    images = load_hf(tmp_path / "t.parquet", max_bad=0.2)
    assert len(images) == 11 and images.bad[0][0] == "00000005"


@hf
def test_hf_goes_on_after_an_interrupt(cache, tmp_path, monkeypatch):
    path = parquet(tmp_path / "a.parquet", {"image": [png(i) for i in range(300)], "text": [str(i) for i in range(300)]})
    make, calls = making._make_shard, []

    def stop(**k):
        calls.append(k["path"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        make(**k)
    monkeypatch.setattr(making, "_make_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        load(Data(source="hf", path=str(path), size=8, limit=290), progress=False, workers=1)
    images = load(Data(source="hf", path=str(path), size=8, limit=290), progress=False, workers=1)
    assert [i.caption for i in images.items] == [str(i) for i in range(290)] and len(calls) == 2 + 2


@hf
def test_hf_that_breaks_off_is_one_error_and_goes_on(cache, tmp_path, monkeypatch):
    path = parquet(tmp_path / "a.parquet", {"image": [png(i) for i in range(200)], "text": [str(i) for i in range(200)]})
    stream = data._hf_stream

    class Breaking:
        def __init__(self, rows):
            self.rows = rows

        def __iter__(self):
            for n, row in enumerate(self.rows):
                if n == 150:
                    raise ConnectionError("the line is dead")
                yield row
    monkeypatch.setattr(data, "_hf_stream", lambda p: (Breaking(stream(p)[0]), stream(p)[1]))
    with pytest.raises(DataError, match="stopped after row 149 .*the line is dead.*call again"):
        load(Data(source="hf", path=str(path), size=8), progress=False, workers=2)
    monkeypatch.setattr(data, "_hf_stream", stream)
    assert [i.caption for i in load(Data(source="hf", path=str(path), size=8), progress=False).items] == [str(i) for i in range(200)]


@pytest.mark.parametrize("columns, message", [
    ({"image": [b"x"], "score": [1.0]}, "did not find a caption column.*caption.*text.*the columns are image, score"),
    ({"text": ["a"], "score": [1.0]}, "did not find an image column"),
])
@hf
def test_hf_without_columns(cache, tmp_path, columns, message):
    with pytest.raises(DataError, match=message):
        load_hf(parquet(tmp_path / "a.parquet", columns))


@hf
def test_hf_that_is_not_there(cache, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no .parquet files"):
        load_hf(tmp_path / "empty")
    (tmp_path / "bad.parquet").write_text("not parquet")
    with pytest.raises(DataError, match="could not be opened as a dataset"):
        load_hf(tmp_path / "bad.parquet")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        load_hf("somebody/something")


# ---------------------------------------------------------------- split
def distinct(count):
    "Pixels of so many images, no two alike."
    return np.arange(count, dtype=np.uint32).view(np.uint8).reshape(count, 2, 2, 1).repeat(3, 3)


def made_up(seed=0, concepts=400, styles=4):
    rng = random.Random(seed)
    items = [Item(f"{s}/{c}/{t}", f"c{c}", f"s{s}") for c in range(concepts) for s in range(rng.randint(1, styles)) for t in range(rng.randint(1, 3))]
    return Images(distinct(len(items)), items, "k", [], "")


def parts(images, held):
    return {name: {images.items[i].key for i in index} for name, index in vars(held).items()}


def test_split_keeps_its_promises():
    images, settings = made_up(), Data(holdout_concepts=0.1, holdout_pairs=0.2)
    held = split(images, settings)
    assert all(i.dtype == torch.int64 for i in vars(held).values())
    assert sorted(torch.cat(list(vars(held).values())).tolist()) == list(range(len(images)))
    of = lambda index, f: {f(images.items[i]) for i in index}
    concept, pair = lambda i: i.concept, lambda i: (i.concept, i.style)
    assert not of(held.concepts, concept) & (of(held.train, concept) | of(held.pairs, concept))
    assert not of(held.train, pair) & of(held.pairs, pair), "all tones of a pair are held out"
    for c in of(held.pairs, concept):
        assert len({s for d, s in of(held.train, pair) if d == c}) >= 2
    assert 0.05 < len(of(held.concepts, concept)) / 400 < 0.15 and len(held.pairs) > 0


def test_split_depends_on_names_only():
    images, settings = made_up(), Data(holdout_concepts=0.1, holdout_pairs=0.2)
    whole = parts(images, split(images, settings))
    order = list(range(len(images)))
    random.Random(1).shuffle(order)
    mixed = Images(images.pixels, [images.items[i] for i in order], "k", [], "")
    assert parts(mixed, split(mixed, settings)) == whole
    some = [i for i in images.items if int(i.concept[1:]) % 3]
    fewer = Images(images.pixels[:len(some)], some, "k", [], "")
    kept = {i.key for i in some}
    assert parts(fewer, split(fewer, settings)) == {name: keys & kept for name, keys in whole.items()}
    more = split(images, Data(holdout_concepts=0.2, holdout_pairs=0.2))
    assert whole["concepts"] < parts(images, more)["concepts"], "a larger share holds the smaller one"


def test_split_edges():
    images = made_up(concepts=6)
    none = split(images, Data(holdout_concepts=0, holdout_pairs=0))
    assert len(none.train) == len(images) and len(none.concepts) == len(none.pairs) == 0
    assert len(split(images, Data(holdout_concepts=0.001)).concepts) > 0, "what is asked for is not empty"
    single = Images(distinct(6), [Item(str(n), str(n), "photo") for n in range(6)], "k", [], "")
    assert len(split(single, Data(holdout_pairs=0.9)).pairs) == 0, "one style: no pairs"
    with pytest.raises(DataError, match="nothing is left to train on"):
        split(single, Data(holdout_concepts=0.999999))


def test_gender_tone_and_direction_are_one_concept():
    same = ["1F3C3", "1F3C3-1F3FF", "1F3C3-200D-2640-FE0F", "1F3C3-1F3FB-200D-2642-FE0F-200D-27A1-FE0F"]
    assert {emoji.concept_of(c) for c in same} == {"1F3C3"}
    assert emoji.concept_of("1F9D1-1F3FB-200D-1F91D-200D-1F9D1-1F3FF") == emoji.concept_of("1F469-200D-1F91D-200D-1F468")
    assert emoji.concept_of("1F3F3-FE0F-200D-1F308") != emoji.concept_of("1F3F3-FE0F")


# ---------------------------------------------------------------- colours
def test_colours_are_named_like_the_nearest_example():
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (500, 3))
    agree = 0
    for c in rgb:
        distance = [np.linalg.norm(making.oklab(c) - p) for p in making._POINTS]
        agree += making.colours(c[None], np.ones(1))[0][0] == making._NAMES[int(np.argmin(distance))]
    assert agree > 0.95 * len(rgb), "the table of 5 bits rarely differs"
    weights = np.array([0.1, 0.9])
    assert making.colours(np.array([[255, 0, 0], [0, 0, 0]]), weights) == [("black", 0.9)]
    assert making.colours(np.array([[255, 0, 0]]), np.zeros(1)) == []
