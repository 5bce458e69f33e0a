"""prx_nb.core.pack: there and back, on a machine that has nothing, and damaged files."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from prx_nb.core import captions, data, recipe
from prx_nb.core.images import DataError
from prx_nb.core.pack import write_pack
from prx_nb.core.text import TextError, text_states


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    "A small recipe, and the same recipe reading from its pack."
    small = recipe.preset("smoke").replace("data.limit", 120)
    path = write_pack(small, tmp_path_factory.mktemp("pack") / "new folder" / "ümläut.safetensors", progress=False)
    return small, small.replace({"data.source": "pack", "data.path": str(path)})


def test_round_trip(packed):
    before, after = (data.load(r.data, progress=False) for r in packed)
    assert np.array_equal(before.pixels, after.pixels) and isinstance(after.pixels, np.memmap)
    assert (before.items, before.key, before.bad, before.notice) == (after.items, after.key, after.bad, after.notice)
    index = torch.tensor([5, 1])
    assert before.batch(index).equal(after.batch(index))
    for a, b in zip(*(vars(data.split(i, r.data)).values() for i, r in zip((before, after), packed))):
        assert a.equal(b)


def test_states_of_every_kind_are_in_it(packed, monkeypatch):
    small, other = packed
    texts = ["", *{t for i in data.load(other.data).items for t in captions.choices(i, "mixed")}]
    fresh = text_states(small.text.encoder, texts, small.text.tokens, progress=False)
    from prx_nb.core import text
    monkeypatch.setattr(text, "load_text_encoder", lambda *a, **k: pytest.fail("the encoder was loaded"))
    monkeypatch.setattr(text, "cache_dir", lambda *a: pytest.fail("the cache was looked at"))
    states = text_states(small.text.encoder, texts, small.text.tokens, progress=False, pack=other.data.path)
    for a, b in zip(states.lookup(texts), fresh.lookup(texts)):
        assert a.equal(b)


ALONE = """
import sys
for name in ("transformers", "diffusers", "datasets", "papermill", "resvg_py", "onnx", "tokenizers", "pandas", "matplotlib", "tqdm", "yaml"):
    sys.modules[name] = None
import socket
def refuse(*a, **k): raise AssertionError("network")
socket.socket.connect = refuse
import torch
from prx_nb.core import captions, data, recipe
from prx_nb.core.text import text_states
r = recipe.preset("smoke").replace({"data.limit": 120, "data.source": "pack", "data.path": sys.argv[1]})
images = data.load(r.data)
states = text_states(r.text.encoder, [captions.caption(i, "dense") for i in images.items], r.text.tokens, pack=r.data.path)
held = data.split(images, r.data)
print(len(images), len(held.train), images.batch(held.train[:4]).shape[1:], states.null(1)[0].shape)
"""


def test_on_a_machine_without_packages_and_network(packed, tmp_path):
    env = {"PATH": "", "PRX_NB_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    done = subprocess.run([sys.executable, "-c", ALONE, packed[1].data.path], env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == str(len(data.load(packed[1].data)))


def test_only_some_kinds(packed, tmp_path):
    small, other = packed
    path = write_pack(small, tmp_path / "p.safetensors", kinds=("short",), progress=False)
    assert path.stat().st_size < os.path.getsize(other.data.path) / 2
    images = data.load(other.replace("data.path", str(path)).data)
    assert text_states("static", [images.items[0].label], small.text.tokens, pack=path).lookup([images.items[0].label])[1].any()


def test_styles_and_limit_choose(packed):
    settings = packed[1].data
    whole = data.load(settings)
    some = data.load(settings.model_copy(update={"styles": ("noto",)}))
    assert {i.style for i in some.items} == {"noto"} and some.key != whole.key
    rows = [n for n, i in enumerate(whole.items) if i.style == "noto"]
    assert np.array_equal(some.pixels, whole.pixels[rows])
    few = data.load(settings.model_copy(update={"limit": 30}))
    assert len(few) == 30 and {i.key for i in few.items} < {i.key for i in whole.items}


def damaged(packed, tmp_path, change):
    content = bytearray(open(packed[1].data.path, "rb").read())
    path = tmp_path / "damaged.safetensors"
    changed = change(content)
    path.write_bytes(content if changed is None else changed)
    return packed[1].replace("data.path", str(path))


def flip(part):
    "Flip one bit in the middle of a part of the file."
    def change(content):
        at = content.find(part)
        assert at > 0
        content[at + len(part) // 2] ^= 4
    return change


def test_damage_is_one_clear_error(packed, tmp_path):
    pixels = data.load(packed[1].data).pixels
    for change in (lambda c: c[:len(c) // 2], lambda c: c[:4], lambda c: b"", lambda c: b"x" * 1000, flip(pixels[50].tobytes()), flip(b'"label"'),
                   flip(b"prx-nb pack 1")):
        with pytest.raises(DataError, match="damaged.safetensors cannot be used .*copy or write it again") as error:
            data.load(damaged(packed, tmp_path, change).data)
        assert "\n" not in str(error.value)
    with pytest.raises(TextError, match="damaged"):
        states = text_states("static", ["fox"], packed[0].text.tokens).export(["fox"])[0]["text.states"]
        bad = damaged(packed, tmp_path, flip(states.numpy()[:2].tobytes()))
        text_states("static", ["fox"], bad.text.tokens, pack=bad.data.path)


def test_wrong_use(packed, tmp_path):
    with pytest.raises(DataError, match="no such pack"):
        data.load(packed[1].replace("data.path", str(tmp_path / "none.safetensors")).data)
    with pytest.raises(DataError, match="images of 16 px, but data.size = 32"):
        data.load(packed[1].replace("data.size", 32).data)
    from safetensors.numpy import save_file
    save_file({"a": np.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="its format is None"):
        data.load(packed[1].replace("data.path", str(tmp_path / "other.safetensors")).data)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write to the folder"):
        write_pack(packed[0], tmp_path / "file" / "p.safetensors")


def test_an_interrupted_write_leaves_the_old_pack(packed, tmp_path, monkeypatch):
    import safetensors.torch
    path = write_pack(packed[0], tmp_path / "p.safetensors", kinds=("short",), progress=False)
    old = path.read_bytes()

    def half(tensors, to, meta):
        to.write_bytes(b"half")
        raise KeyboardInterrupt
    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        write_pack(packed[0], path, progress=False)
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]


@pytest.mark.parametrize("wrong, words", [({"facts": {"colours": [["nocolour", 1]]}}, r"items\.0\.facts\.colours\.0\.0 = 'nocolour'"),
                                          ({"facts": {"centre": [None, 0.5]}}, r"items\.0\.facts\.centre\.0 = None"), ({"caption": 5}, r"items\.0\.caption = 5"),
                                          ({"background": ["red"]}, r"items\.0\.background"), (None, "40 images, but 39 items")])
def test_items_that_are_none_are_named(packed, tmp_path, wrong, words):
    "A file that is whole, checksum and all, may still say nonsense of an image."
    from safetensors import safe_open
    from safetensors.numpy import save_file
    with safe_open(packed[1].data.path, "np") as f:
        meta, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    known = json.loads(tensors["images.items"].tobytes())
    words = words.replace("40", str(len(known["items"]))).replace("39", str(len(known["items"]) - 1))
    known["items"] = [known["items"][0] | wrong, *known["items"][1:]] if wrong else known["items"][1:]
    tensors["images.items"] = np.frombuffer(json.dumps(known).encode(), np.uint8)
    crc = data.pack_crc(tensors["images.pixels"], tensors["images.items"])
    save_file(tensors, tmp_path / "wrong.safetensors", meta | {"images.crc32": crc})
    with pytest.raises(DataError, match=f"wrong.safetensors cannot be used .*{words}"):
        data.load(packed[1].replace("data.path", str(tmp_path / "wrong.safetensors")).data)
