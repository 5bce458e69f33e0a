"""A reader's own data: nothing is dropped or changed without a word, a small set works, and what is wrong is said before training."""
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prx_nb.core import batch, captions, data, recipe, show, text, train
from prx_nb.core.data import DataError
from prx_nb.core.files import cache_dir
from prx_nb.core.recipe import Data, RecipeError, preset


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    "A cache of its own that shares the fetched packages."
    packages = cache_dir("packages").resolve()
    home = tmp_path / "cache"
    home.mkdir()
    (home / "packages").symlink_to(packages)
    monkeypatch.setenv("PRX_NB_CACHE", str(home))
    return home


def picture(n, size=(24, 18)):
    return Image.fromarray(np.random.default_rng(n).integers(0, 256, (size[1], size[0], 3), np.uint8))


def folder(root, count=8, caption="a thing number {}", stem="i{:03d}", size=(24, 18)):
    root.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        picture(n, size).save(root / f"{stem.format(n)}.png")
        if caption is not None:
            (root / f"{stem.format(n)}.txt").write_text(caption.format(n), "utf-8")
    return root


def load(root, **more):
    return data.load(Data(source="folder", path=str(root), size=8, **more), progress=False)


def smoke(root, **more):
    steps = {"train.steps": 2, "train.validate_every": 2, "train.checkpoint_every": 2}
    return preset("smoke").replace({"data.source": "folder", "data.path": str(root), "data.limit": None, **steps, **more})


def summary(root, **more):
    r = smoke(root, **more)
    return batch.summarise(batch.prepare(r, progress=False), r)


# ---------------------------------------------------------------- what is found, and what is passed over
def test_what_is_no_data_is_named_and_not_trained_on(tmp_path):
    root = folder(tmp_path / "set", 6)
    for odd in (".ipynb_checkpoints/i000-checkpoint.png", "._i000.png", "__MACOSX/i000.png", "@eaDir/i000.png", ".git/a.png"):
        (root / odd).parent.mkdir(exist_ok=True)
        picture(9).save(root / odd)
    for other in ("notes.pdf", "lone.txt", "photo.heic", "Thumbs.db"):
        (root / other).write_text("?")
    said = summary(root)
    assert said.images == 6 and sum(n for n, _ in said.passed_over.values()) == 9
    for name in (".ipynb_checkpoints", "._i000.png", "notes.pdf", "lone.txt", "photo.heic"):
        assert name in json.dumps(said.passed_over), name
    assert "passed over" in str(said)


def test_links_are_followed_once(tmp_path):
    folder(tmp_path / "elsewhere", 5)
    root = folder(tmp_path / "set" / "own", 3).parent
    for name, to in (("linked", tmp_path / "elsewhere"), ("again", tmp_path / "elsewhere"), ("round", root), ("up", tmp_path)):
        (root / name).symlink_to(to, target_is_directory=True)
    (root / "gone.png").symlink_to("nowhere.png")
    images = load(root)
    assert len(images) == 8 and len(images.twins) == 3, "three of the linked pictures are those of `own`"
    told = images.notes["passed_over"]
    assert told["a link to a folder that is read already"][0] == 3 and told["a link to nothing"][1] == ["gone.png"]
    changed = data.source_key(Data(source="folder", path=str(root), size=8))
    picture(99).save(tmp_path / "elsewhere" / "i001.png")
    assert data.source_key(Data(source="folder", path=str(root), size=8)) != changed, "a linked picture is part of the run"


def test_names_that_are_not_utf8(tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    for n in range(300):                                             # so many that other processes make them
        with open(os.path.join(os.fsencode(root), b"caf\xe9_%d.png" % n), "wb") as f:
            picture(n).save(f, "PNG")
    settings = Data(source="folder", path=str(root), size=8)
    images = data.load(settings, progress=False, workers=2)
    assert len(images) == 300 and images.items[0].key.startswith("caf\\xe9_") and data.source_key(settings)
    data.split(images, settings)
    assert json.dumps([i.key for i in images.items]).encode()


def test_equal_names_in_folders_are_different_concepts(tmp_path):
    for kind in ("cat", "dog"):
        folder(tmp_path / "set" / kind, 4, f"a {kind} {{}}", "{:04d}")
    images = load(tmp_path / "set")
    assert {i.concept for i in images.items} == {f"{kind}/{n:04d}" for kind in ("cat", "dog") for n in range(4)}


@pytest.mark.parametrize("styles", [False, True])
def test_equal_pictures_are_on_one_side(tmp_path, styles):
    root, rows = tmp_path / "set", []
    root.mkdir()
    for n in range(60):
        picture(n % (55 if styles else 30)).save(root / f"p{n}.png")     # with styles: the same in two concepts and pairs
        rows.append({"file_name": f"p{n}.png", "text": str(n)} | ({"concept": f"c{n // 4}", "style": f"s{n % 4}"} if styles else {}))
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = Data(source="folder", path=str(root), size=8, holdout_concepts=0.2, holdout_pairs=0.3)
    images = data.load(settings, progress=False)
    split = data.split(images, settings)
    trained = {images.pixels[i].tobytes() for i in split.train.tolist()}
    held = [i for part in (split.concepts, split.pairs) for i in part.tolist()]
    assert held and not any(images.pixels[i].tobytes() in trained for i in held)
    said = summary(root, **{"data.holdout_concepts": 0.2})
    assert said.equal["groups"] == (5 if styles else 30) and "equal pictures under several names" in str(said)


# ---------------------------------------------------------------- captions
TABLES = {
    "metadata.jsonl": lambda rows: "\n".join(map(json.dumps, rows)),
    "METADATA.JSONL": lambda rows: "\r\n".join(map(json.dumps, rows)) + "\r\n\r\n",
    "metadata.json": json.dumps,
    "metadata.csv": lambda rows: "file_name,text\n" + "".join(f'{r["file_name"]},"{r["text"]}"\n' for r in rows),
}


@pytest.mark.parametrize("name", [*TABLES, "metadata.parquet", "by name", "coco"])
def test_tables_of_every_usual_kind(tmp_path, name):
    root = folder(tmp_path / "set", 4, None)
    rows = [{"file_name": f"i{n:03d}.png", "text": f"a fox, number {n}"} for n in range(4)]
    if name == "metadata.parquet":
        import pandas as pd
        pd.DataFrame(rows).to_parquet(root / name)
    elif name == "by name":
        (root / "metadata.json").write_text(json.dumps({r["file_name"]: r["text"] for r in rows}))
    elif name == "coco":
        tree = {"images": [{"id": n, "file_name": r["file_name"]} for n, r in enumerate(rows)],
                "annotations": [{"image_id": n, "caption": r["text"]} for n, r in enumerate(rows)]}
        (root / "metadata.json").write_text(json.dumps(tree))
    else:
        (root / name).write_text(TABLES[name](rows))
    assert [i.caption for i in load(root).items] == [r["text"] for r in rows]


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85", "\x1c", "\x0c", "\r"])
def test_only_a_newline_ends_a_line(tmp_path, sign):
    root, words = folder(tmp_path / "set", 2, None), f"red{sign}fox"
    rows = [json.dumps({"file_name": f"i{n:03d}.png", "text": words}, ensure_ascii=False) for n in range(2)]
    (root / "metadata.jsonl").write_bytes("\n".join(rows).encode())
    assert {i.caption for i in load(root).items} == {words}


@pytest.mark.parametrize("beside", ["i000.txt", "i000.TXT", "i000.caption", "i000.png.txt", "i000.Caption"])
def test_captions_beside_pictures(tmp_path, beside):
    root = folder(tmp_path / "set", 2, None)
    (root / beside).write_text("a fox\n\nan animal in snow \n")
    item = load(root).items[0]
    assert captions.choices(item, "long") == ["a fox", "an animal in snow"] and captions.caption(item, "dense") == "a fox"


def test_several_captions_are_all_drawn_from(tmp_path):
    root = folder(tmp_path / "set", 8, None)
    rows = [{"file_name": f"i{n:03d}.png", "text": [f"one {n}", f"two {n}", f"three {n}"][:1 + n % 3]} for n in range(8)]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    r = smoke(root, **{"captions.dropout": 0.0, "sample.guidance": 1.0})
    prepared = batch.prepare(r, progress=False)
    assert prepared.rows.shape == (8, 3)
    seen = {int(c) for step in range(60) for c in batch.read_batch(prepared, r, step).caption}
    trained = [t for i in prepared.split.train.tolist() for t in rows[i]["text"]]
    assert seen == set(prepared.states.rows(trained).tolist()), "each of them, and nothing else"
    assert batch.summarise(prepared, r).captions == {"different": 15, "fewest": 1, "most": 3}


@pytest.mark.parametrize("encoding", ["cp1252", "gbk", "shift_jis", "koi8-r", "utf-16-le"])
def test_encodings_are_asked_for_and_never_guessed(tmp_path, encoding):
    words = {"gbk": "一只红色的狐狸", "shift_jis": "赤い狐", "koi8-r": "лиса", "cp1252": "a woman’s café", "utf-16-le": "a fox"}[encoding]
    root = folder(tmp_path / "set", 3)
    (root / "i001.txt").write_bytes(f"red\n{words}".encode(encoding))
    with pytest.raises(DataError, match=r"i001.txt is not UTF-8 text .*data.encoding"):
        load(root)
    item = load(root, encoding=encoding).items[1]
    assert item.others == (words,)
    (root / "i001.txt").unlink()
    (root / "metadata.csv").write_bytes(f"file_name,text\ni000.png,{words}\n".encode(encoding))
    with pytest.raises(DataError, match="metadata.csv is not UTF-8 text"):
        load(root)
    assert load(root, encoding=encoding).items[0].caption == words


@pytest.mark.parametrize("row, said", [
    ({"text": 5}, r"row 2: column 'text' holds '5': a caption is text"),
    ({"text": ["a", None]}, r"row 2: column 'text' holds"),
    ({"caption": {"en": "a"}}, r"row 2: column 'caption' holds"),
    ({"text": "\ud83d"}, r"row 2: column 'text': half of a pair"),
    ({"text": "a", "concept": "\ud83d"}, r"row 2: 'concept' holds NUL or half of a pair"),
    ({"text": "a", "file_name": "\ud83d.png"}, r"row 2: 'file_name' holds NUL or half of a pair"),
    ({"text": "a", "file_name": None}, r"row 2: no 'file_name'"),
    ({"says": "a fox"}, r"no caption column .*words in says: set data.caption_column = 'says'"),
])
def test_a_cell_that_is_no_caption_is_refused_by_row(tmp_path, row, said):
    root = folder(tmp_path / "set", 2, None)
    first = {"text": "a"} if "says" not in row else {"says": "b"}
    (root / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": f"i{n:03d}.png"} | r) for n, r in enumerate((first, row))))
    with pytest.raises(DataError, match=said):
        load(root)


def test_a_comma_without_quotes_does_not_cut_a_caption(tmp_path):
    root = folder(tmp_path / "set", 1, None)
    (root / "metadata.csv").write_text("file_name,text\ni000.png,a fox, in snow\n")
    with pytest.raises(DataError, match="row 1: more cells than the header"):
        load(root)


def test_a_column_of_the_readers_choice(tmp_path):
    root = folder(tmp_path / "set", 2, None)
    (root / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": f"i{n:03d}.png", "text": "no", "says": f"fox {n}"}) for n in range(2)))
    assert [i.caption for i in load(root, caption_column="says").items] == ["fox 0", "fox 1"]
    with pytest.raises(DataError, match="row 1: there is no column data.caption_column = 'said'"):
        load(root, caption_column="said")


def test_without_a_caption(tmp_path):
    root = folder(tmp_path / "set", 4, None, "IMG_{:04d}")
    (root / "IMG_0000.txt").write_text("a red fox")
    (root / "IMG_0001.txt").write_text("\n")
    picture(9).save(root / "blue_lake.png")
    said = lambda **k: {i.key: captions.caption(i, "dense") for i in load(root, **k).items}
    plain = said()
    assert plain["IMG_0000.png"] == "a red fox" and plain["blue_lake.png"].startswith("blue lake")
    assert plain["IMG_0001.png"] == plain["IMG_0002.png"] == "", "not what its camera called it"
    assert said(no_caption="name")["IMG_0002.png"].startswith("IMG 0002") and said(no_caption="name")["IMG_0001.png"] == ""
    assert said(no_caption="empty")["blue_lake.png"] == "" and list(said(no_caption="skip")) == ["IMG_0000.png"]
    assert load(root, no_caption="skip").notes["left_out"] == ["IMG_0001.png", "IMG_0002.png", "IMG_0003.png", "blue_lake.png"]
    words = str(summary(root, **{"data.holdout_concepts": 0.0}))
    assert "without a caption 3 (IMG_0001.png" in words and "without a caption 1 (blue_lake.png)" in words


def test_a_dataset_without_some_captions_goes_on_after_an_interrupt(tmp_path):
    import io
    import pyarrow as pa
    import pyarrow.parquet as pq

    def png(n):
        out = io.BytesIO()
        picture(n).save(out, "PNG")
        return out.getvalue()
    path = tmp_path / "a.parquet"
    texts = [None if n % 3 == 0 else [f"a {n}", f"b {n}"] for n in range(200)]
    pq.write_table(pa.table({"image": [png(n) for n in range(200)], "sentences": texts}), path)
    of = lambda **k: data.load(Data(source="hf", path=str(path), size=8, **k), progress=False)
    assert [i.caption for i in of().items][:3] == ["", "a 1", "a 2"] and of().items[1].others == ("b 1",)
    left = of(no_caption="skip")
    assert len(left) == 133 and len(left.notes["left_out"]) == 67 and all(i.caption for i in left.items)


def test_what_is_cut_and_what_is_unknown_is_said(tmp_path):
    root = folder(tmp_path / "set", 8)
    (root / "i003.txt").write_text("a long way " * 20)
    (root / "i004.txt").write_text("แมว 🦊")
    said = summary(root)
    assert said.cut["captions"] == 1 and said.cut["pieces"] == 60 + 2 - 12 and said.unknown["captions"] == 1
    assert "text.tokens = 12" in str(said) and "does not know" in str(said)
    from prx_nb.core.pack import write_pack
    pack = write_pack(smoke(root), tmp_path / "a.pack", progress=False)
    r = smoke(root, **{"data.source": "pack", "data.path": str(pack)})
    packed = batch.summarise(batch.prepare(r, progress=False), r)
    assert (packed.cut, packed.unknown, packed.shapes) == (said.cut, said.unknown, said.shapes), "a pack says the same"


# ---------------------------------------------------------------- pixels
@pytest.mark.parametrize("size, side", [((40, 20), "width"), ((20, 50), "height")])
def test_what_is_cut_off_is_said_and_pad_cuts_nothing(tmp_path, size, side):
    root = folder(tmp_path / "set", 8, size=size)
    said = summary(root)
    share = 1 - min(size) / max(size)
    assert said.fit["cut"] == 8 and abs(said.fit["most"]) == pytest.approx(share) and f"{share:.0%} of the {side}" in str(said)
    padded = load(root, fit="pad").pixels[0]
    assert (padded[0] == 255).all() if side == "width" else (padded[:, 0] == 255).all()
    assert "filled up with white" in str(summary(root, **{"data.fit": "pad"}))


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (1, 1)])
def test_a_line_is_a_picture(tmp_path, size):
    root = folder(tmp_path / "set", 8)
    Image.new("RGB", size, (200, 0, 0)).save(root / "i000.png")
    for fit in ("crop", "pad"):
        images = load(root, fit=fit)
        assert len(images) == 8 and (images.pixels[0] == (200, 0, 0)).all(-1).any(), fit


# ---------------------------------------------------------------- small sets
@pytest.mark.parametrize("count", [4, 5, 20, 49])
def test_a_small_set_trains_and_is_examined(tmp_path, count):
    from prx_nb.lab import judge
    r = smoke(folder(tmp_path / "set", count))
    prepared = batch.prepare(r, progress=False)
    assert len(prepared.heldout) >= 2 and len(prepared.split.train) >= 2
    run = train.train(r, tmp_path / "run", prepared=prepared, progress=False, device="cpu")
    assert len(run.record["metrics"]) == len(train.BINS) and run.record["data_summary"]["images"] == count
    measured = judge.judge(run, prepared, *judge.take(run, prepared))
    assert all(map(np.isfinite, measured.values()))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_set_that_is_too_small_is_refused_before_training(tmp_path, count):
    with pytest.raises(DataError, match="images are too few|nothing is left"):
        train.train(smoke(folder(tmp_path / "set", count)), tmp_path / "run", progress=False)
    assert not list(tmp_path.glob("run/checkpoint/*"))


def test_changed_pictures_are_another_run(tmp_path):
    r = smoke(folder(tmp_path / "set", 20), **{"train.steps": 4})
    train.train(r, tmp_path / "run", progress=False, device="cpu")
    (tmp_path / "set" / "i003.txt").write_text("quite another thing")
    with pytest.raises(RuntimeError, match=r"other data .* the key [0-9a-f]{12}, these have [0-9a-f]{12}"):
        train.train(r, tmp_path / "run", progress=False, device="cpu")


# ---------------------------------------------------------------- known before training
def test_known_before_training(tmp_path, capsys):
    root = folder(tmp_path / "set", 8)
    with pytest.raises(RecipeError, match="train.batch = 100000000 .* GiB"):
        train.train(smoke(root, **{"train.batch": 10**8}), tmp_path / "big", progress=False)
    with pytest.raises(ValueError, match="tensorbord.*should be one of"):
        train.train(smoke(root), tmp_path / "told", progress=False, trackers=["tensorbord"])
    run = train.train(smoke(root, **{"train.precision": "bf16"}), tmp_path / "run", device="cpu")
    out = capsys.readouterr().out
    assert run.record["precision"] == {"asked": "bf16", "computed": "fp32"} and "all is done in fp32" in out
    assert out.startswith("8 images of 16 x 16 px from folder"), "the summary is the log's head"


def test_keys_of_recipes_are_those_of_november(tmp_path):
    assert preset("smoke").replace("data.fit", "crop").key == preset("smoke").key
    tree = preset("smoke").model_dump(mode="json")
    old = {**tree, "data": {k: v for k, v in tree["data"].items() if k not in ("caption_column", "encoding", "no_caption", "fit")}}
    assert recipe.parse(old).key == preset("smoke").key
    assert len({preset("smoke").replace(f"data.{k}", v).key for k, v in
                (("fit", "pad"), ("no_caption", "empty"), ("no_caption", "skip"), ("encoding", "gbk"), ("caption_column", "x"))}) == 5


def test_weights_of_another_network_are_no_text_encoder(tmp_path):
    import torch
    from safetensors.torch import save_file
    here = shutil.copytree(text.fetch_all(text._L6)[0].parent, tmp_path / "encoder")
    save_file({"layer.weight": torch.zeros(3)}, here / "model.safetensors", {"format": "pt"})
    with pytest.raises(text.TextError, match="cannot be loaded: its weights are of another network"):
        text.load_text_encoder(str(here), "cpu")


def test_what_fails_after_the_loop_is_failed_and_its_trackers_are_closed(tmp_path, monkeypatch):
    closed = []

    class Told:
        trackers = [type("T", (), {"finish": lambda self: closed.append(1)})()]

        def log(self, values, step=None):
            pass
    monkeypatch.setattr(train, "_tracker", lambda *a: Told())
    monkeypatch.setattr(train, "peak_memory", lambda device: float("nan"))      # no JSON: the last lines cannot be written
    with pytest.raises(ValueError):
        train.train(smoke(folder(tmp_path / "set")), tmp_path / "run", progress=False, device="cpu")
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["status"] == "failed" and record["cause"].startswith("ValueError") and closed == [1]


# ---------------------------------------------------------------- small things
def test_a_pack_that_moved_is_named(tmp_path):
    with pytest.raises(text.TextError, match="there is no pack .*gone.pack, and without it: no text encoder"):
        text.text_states("no-such-encoder", ["a"], 12, False, pack=tmp_path / "gone.pack")
    assert "a" in text.text_states("static", ["a"], 12, False, pack=tmp_path / "gone.pack"), "the encoder is there"


@pytest.mark.parametrize("name, kind", [("a.jpg", "JPEG"), ("a.JPEG", "JPEG"), ("a.png", "PNG"), ("a.webp", "WEBP")])
def test_a_picture_is_what_its_name_says(tmp_path, name, kind):
    show.save_picture(picture(1).quantize(), tmp_path / name)
    assert Image.open(tmp_path / name).format == kind
    with pytest.raises(ValueError, match="a picture's name ends in .png"):
        show.save_picture(picture(1), tmp_path / "a.bmpx")


def test_relative_paths_are_those_of_the_command(tmp_path, monkeypatch):
    from prx_nb.lab import plan
    folder(tmp_path / "my images", 2)
    monkeypatch.chdir(tmp_path)
    toy = plan.pretend_ablation(tmp_path, "a")
    [job] = plan.plan(toy, "smoke", 1, overrides={"data.source": "folder", "data.path": "my images"}, out="out {1}")
    assert job.parameters["overrides"]["data.path"] == str(tmp_path / "my images")


def test_the_same_folder_elsewhere_is_the_same_data(tmp_path):
    root = folder(tmp_path / "set", 8)
    r = smoke(root)
    key = batch.data_key(batch.prepare(r, progress=False))
    moved = Path(shutil.copytree(root, tmp_path / "other"))
    assert batch.data_key(batch.prepare(smoke(moved), progress=False)) == key
