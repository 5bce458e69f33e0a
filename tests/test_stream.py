"Samples read from shards while training goes on: the same run as from a cache, exact when it goes on, shared by processes and by nodes."
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from test_processes import curves, same, tensors

from prx_nb.core.batch import data_key, prepare, read_batch, summarise
from prx_nb.core.checkpoint import CheckpointError
from prx_nb.core import stream
from prx_nb.core.images import DataError, chance
from prx_nb.core.pack import write_pack
from prx_nb.core.recipe import RecipeError, preset
from prx_nb.core.seeds import order
from prx_nb.core.stream import open_shards, read_ahead
from prx_nb.core.train import Run, train
from prx_nb.lab.plan import plan

COUNT = 46
WORDS = "red blue round small two a fox house over under bright old".split()


def picture(n):
    "Noise, that no two are alike, not square and larger than what is trained on."
    pixels = np.random.default_rng(n).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def caption(n):
    return " ".join(np.random.default_rng(n).choice(WORDS, 2 + n % 4))


def tar(path, members):
    with tarfile.open(path, "w") as out:
        for name, raw in members:
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            out.addfile(info, io.BytesIO(raw))


def pairs(numbers):
    return [part for n in numbers for part in ((f"{n:05d}.png", picture(n)), (f"{n:05d}.txt", caption(n).encode()))]


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    "Two tars and a parquet file of three row groups."
    folder = tmp_path_factory.mktemp("shards")
    tar(folder / "a.tar", pairs(range(13)))
    tar(folder / "b.tar", pairs(range(13, 26)))
    rows = {"image": [{"bytes": picture(n), "path": None} for n in range(26, COUNT)], "caption": [caption(n) for n in range(26, COUNT)]}
    pq.write_table(pa.table(rows), folder / "c.parquet", row_group_size=7)
    return folder


def streams(shards, **more):
    return preset("smoke").replace({"data.source": "shards", "data.path": str(shards), "data.limit": None, "data.holdout_concepts": 0,
                                    "data.holdout_pairs": 0, "train.steps": 14, "train.checkpoint_every": 5, "train.keep": 9,
                                    "train.validate_every": 7, "optimizer.eps": 1e-4} | more)


def ran(recipe, folder, **more):
    return train(recipe, folder, progress=False, device="cpu", **more)


@pytest.fixture(scope="module")
def streamed(shards, tmp_path_factory):
    return ran(streams(shards), tmp_path_factory.mktemp("streamed"))


def test_the_same_losses_as_from_a_cache_to_the_bit(shards, streamed, tmp_path):
    cached = ran(streams(shards, **{"data.stream": False}), tmp_path / "cached")
    assert curves(cached).xs("loss flow", level="name").std() > 0.01
    same(cached, streamed)
    summary = streamed.record["data_summary"]
    assert (summary["train"], summary["found"], summary["stream"]["shards"]) == (COUNT, COUNT, 3)
    assert cached.recipe.key != streamed.recipe.key


def test_the_same_latents_and_states_as_from_a_cache(shards, tmp_path, vae, encoder):
    "A tiny autoencoder and a tiny transformer with random weights, frozen; they see other batches than a cache's, so to a tolerance."
    from prx_nb.core.latents import describe
    tiny = {"latents": describe(str(vae)), "denoiser.in_channels": 4, "denoiser.patch_size": 2,
            "text.encoder": str(encoder), "denoiser.context_in_dim": 16, "train.steps": 6}
    here = ran(streams(shards, **tiny), tmp_path / "here")
    there = ran(streams(shards, **tiny, **{"data.stream": False}), tmp_path / "there")
    assert (curves(here) - curves(there)).abs().max() < 1e-4 and curves(here).index.equals(curves(there).index)
    again = ran(streams(shards, **tiny), tmp_path / "again")
    same(here, again)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    import diffusers
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    blocks = {f"{way}_block_types": [f"{what}Block2D"] * 2 for way, what in (("down", "DownEncoder"), ("up", "UpDecoder"))}
    diffusers.AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=2, latent_channels=4, **blocks).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    folder = tmp_path_factory.mktemp("encoder")
    words = Tokenizer(models.WordLevel({w: n for n, w in enumerate(["[PAD]", "[UNK]", *WORDS])}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def cut(run, folder, step):
    "A copy of a run as if it had been killed after a checkpoint."
    shutil.copytree(run.dir, folder)
    for path in (folder / "checkpoint").glob("*"):
        if int(path.stem.partition("-")[2]) > step:
            path.unlink()
    (folder / "record.json").unlink()
    return folder


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_run_goes_on_at_the_sample_to_the_bit(shards, streamed, tmp_path, monkeypatch, workers):
    "46 samples are five steps and six samples: each checkpoint lies within an epoch, and the number of workers is another."
    monkeypatch.setenv("PRX_NB_WORKERS", workers)
    for step in (5, 10):
        same(ran(streamed.recipe, cut(streamed, tmp_path / str(step), step)), streamed)


def test_it_goes_on_after_a_kill(shards, tmp_path, monkeypatch):
    "Killed without a word, with its workers reading ahead: nobody is left, and the rest is the same to the bit."
    buffered = streams(shards, **{"data.buffer": 9, "train.steps": 400, "train.checkpoint_every": 20, "train.validate_every": 400})
    buffered.save(tmp_path / "r.json")
    child = subprocess.Popen([sys.executable, "-m", "prx_nb.core.train", tmp_path / "r.json", tmp_path / "killed", '{"device": "cpu", "progress": false}'])
    until = time.time() + 120
    while not list((tmp_path / "killed").glob("checkpoint/step-*")) and time.time() < until and child.poll() is None:
        time.sleep(0.05)
    family = psutil.Process(child.pid).children()
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert family and not psutil.wait_procs(family, timeout=30)[1], "the workers end with it"
    assert len(list((tmp_path / "killed").glob("checkpoint/step-*"))) < 20
    same(ran(buffered, tmp_path / "killed"), ran(buffered, tmp_path / "whole"))


def test_two_processes_equal_one_and_see_disjoint_samples(shards, streamed, tmp_path):
    both = ran(streamed.recipe.replace("train.processes", 2), tmp_path / "two")
    assert (curves(both) - curves(streamed)).abs().max() < 1e-5
    for name, value in tensors(streamed).items():
        torch.testing.assert_close(value, tensors(both)[name], rtol=1e-4, atol=1e-5)
    source = prepare(streams(shards, **{"data.buffer": 9}), progress=False).stream
    halves = [[n for taken in read_ahead(source, 0, 8, 0, 23, part, 1) for n in taken.index.tolist()] for part in (slice(0, 4), slice(4, 8))]
    assert len(halves[0]) == 92 == len(halves[1]) and 23 * 8 == 4 * COUNT
    steps = [{*halves[0][4 * s:4 * s + 4]} | {*halves[1][4 * s:4 * s + 4]} for s in range(23)]
    epoch = [n for s in range(5) for n in steps[s]]
    assert all(len(s) == 8 for s in steps[:5]) and len({*epoch}) == 40, "nobody sees a sample twice"
    assert sorted(halves[0] + halves[1]) == sorted([*range(COUNT)] * 4), "four epochs: each sample four times"


def test_what_is_held_out_is_never_trained_on(shards, tmp_path):
    recipe = streams(shards, **{"data.holdout_concepts": 0.25, "data.buffer": 9})
    ready = prepare(recipe, progress=False)
    held = {ready.images.items[i].key for i in ready.split.concepts}
    assert len(held) == 12 and len(ready.stream) == 34 and len(ready.heldout) == 12
    keys = open_shards(str(shards)).key
    seen = [keys(n) for taken in read_ahead(ready.stream, 0, 8, 0, 17, processes=0) for n in taken.index.tolist()]
    assert not held & {*seen} and sorted(seen) == sorted([*{*seen}] * 4) and len({*seen}) == 34
    assert {ready.images.items[i].key for i in ready.split.train} == {*seen}
    capped = prepare(recipe.replace("data.holdout_most", 5), progress=False)
    assert len(capped.split.concepts) == 5 and len({data_key(p) for p in (ready, capped, prepare(streams(shards), progress=False))}) == 3


def test_seeds_shuffle_and_the_buffer_bounds_how_far(shards):
    source = lambda seed, **more: prepare(streams(shards, seed=seed, **more), progress=False).stream
    full, near = source(0), source(0, **{"data.buffer": 9})
    assert [*full.order(0, 3, 8)] == order(0, 3, 8, COUNT).tolist(), "as of sets in memory"
    first = [np.concatenate([near.order(seed, s, 23) for s in (0, 1)]) for seed in (0, 1)]
    assert sorted(first[0]) == sorted(first[1]) == [*range(COUNT)] and (first[0] != first[1]).any()
    parts = near.shards.parts[near.train]
    assert max(len({*parts[first[0][at:at + 9]]}) for at in range(0, COUNT, 9)) <= 4 < len({*parts})


def test_a_shard_that_changed_is_other_data(shards, streamed, tmp_path):
    copy = shutil.copytree(shards, tmp_path / "copy")
    moved = streamed.recipe.replace("data.path", str(copy))
    assert data_key(prepare(moved, progress=False)) == data_key(prepare(streamed.recipe, progress=False)), "where they lie does not count"
    tar(copy / "b.tar", [*pairs(range(13, 25)), ("00025.png", picture(25)), ("00025.txt", b"other words")])
    with pytest.raises(CheckpointError, match="a run on other data"):
        here = cut(streamed, tmp_path / "run", 5)
        (here / "recipe.json").unlink()
        changed = json.loads(streamed.recipe.model_dump_json())
        os.rename(shards / "b.tar", tmp_path / "b.tar")
        shutil.copy(copy / "b.tar", shards / "b.tar")
        try:
            ran(type(streamed.recipe).model_validate(changed), here)
        finally:
            os.replace(tmp_path / "b.tar", shards / "b.tar")


def damaged(folder, bad):
    "Sixty samples, of which some hold no picture."
    folder.mkdir()
    tar(folder / "a.tar", [(name, b"torn" if name[:-4] in bad and name.endswith("png") else raw) for name, raw in pairs(range(60))])
    return folder


def test_a_broken_sample_is_replaced_and_told(tmp_path, monkeypatch):
    "Two that are not among the prepared ones, and are first met in training."
    monkeypatch.setattr(stream, "SEEN", 20)
    bad = sorted((f"{n:05d}" for n in range(60)), key=lambda name: chance("stream", f"a/{name}"))[-2:]
    recipe = streams(damaged(tmp_path / "set", bad), **{"data.max_bad": 0.05})
    run = ran(recipe, tmp_path / "run")
    assert len(run.record["unreadable_samples"]) == 2 and run.record["data_summary"]["stream"]["prepared"] == 20
    assert all("UnidentifiedImageError" in run.record["unreadable_samples"][f"a/{name}"] for name in bad)
    same(run, ran(recipe, tmp_path / "again"))
    with pytest.raises(DataError, match=r"[12] of \d+ samples of .* broken, more than data.max_bad = 0.01 allows: a/000.. .Unident"):
        ran(recipe.replace("data.max_bad", 0.01), tmp_path / "strict")
    record = json.loads((tmp_path / "strict/record.json").read_text())
    assert record["status"] == "failed" and "max_bad" in record["cause"]


def test_faults_are_one_clear_error(shards, tmp_path):
    cut_off = tmp_path / "cut"
    shutil.copytree(shards, cut_off)
    whole = (cut_off / "b.tar").read_bytes()
    (cut_off / "b.tar").write_bytes(whole[:len(whole) // 2])
    for path, words in ((cut_off, "the shard b.tar cannot be read: .*copy it again, or take it away"),
                        (tmp_path / "nowhere", "neither a folder with .tar or .parquet files"),
                        (f"{shards}/*.zip", "nor a pattern that some fit")):
        with pytest.raises(DataError, match=words):
            prepare(streams(path), progress=False)
    for change, words in (({"data.stream": False, "data.source": "folder"}, "only shards are streamed"),
                          ({"captions.wrong": 0.5}, "captions.wrong = 0.5 with a stream"),
                          ({"techniques.repa.weight": 0.5}, "needs all training images at hand")):
        with pytest.raises(RecipeError, match=words):
            streams(shards).replace(change)


def test_no_caption_is_skipped_or_empty_as_in_a_folder(tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    tar(folder / "a.tar", [m for n, m in enumerate(pairs(range(20))) if n not in (1, 2, 5)] + [("z.json", b'{"caption": null}'), ("z.png", picture(99))])
    for how, there, left in (("skip", 18, "left out: 3 (a/00000, a/00002, a/z)"), ("empty", 20, "without a caption 3")):
        recipe = streams(folder, **{"data.no_caption": how})
        ready = prepare(recipe, progress=False)
        said = str(summarise(ready, recipe))
        assert "passed over: 1 (a/00001): a sample without a picture" in said and left in said, said
        assert "found 21, used" in said and len(ready.stream) == there and len(ready.split.train) == there - (how == "skip")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_nodes_of_one_process_each_are_the_same_run(shards, streamed, tmp_path):
    "torchrun --nnodes 2 on this machine: two launchers that know of each other by address and port alone."
    recipe = streamed.recipe.replace("train.processes", 2)
    recipe.save(tmp_path / "r.json")
    options, port = json.dumps({"device": "cpu", "progress": False}), free_port()
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1",
               "--master-port", str(port)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    nodes = [subprocess.Popen([*command, "--node-rank", str(rank), "-m", "prx_nb.core.train", str(tmp_path / "r.json"), str(tmp_path / "run"), options],
                              env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for rank in (0, 1)]
    try:
        said = [node.communicate(timeout=240)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], said
    run = Run.load(tmp_path / "run")
    assert run.record["status"] == "done" and (curves(run) - curves(streamed)).abs().max() < 1e-5
    same(run, ran(recipe, tmp_path / "one machine"))


def test_the_command_that_describes_data_reads_shards(shards):
    from prx_nb.lab.cli_data import _describe
    recipe = streams(shards, **{"data.holdout_concepts": 0.25})
    said = _describe(recipe, prepare(recipe, progress=False))
    assert f"{COUNT} images of 16 x 16 px from shards" in said and "to train on 34, streamed from 3 shards, shuffled 8192 at a time" in said
    assert "held out 12 images" in said and "Images from the shards" in said


def test_a_last_stage_and_another_layer_are_those_of_a_cache_to_the_bit(tmp_path, encoder):
    "Each picture has one caption, long and short ones differ: which is shown when, and from which layer it is read."
    folder = tmp_path / "set"
    folder.mkdir()
    long = lambda n: f"{WORDS[n % 11]} {WORDS[n % 7]}. {caption(n)}"
    tar(folder / "a.tar", [part for n in range(24) for part in ((f"{n}.png", picture(n)), (f"{n}.txt", long(n).encode()))])
    recipe = streams(folder, **{"captions.kind": "short", "captions.last": "long", "captions.last_share": 0.5, "text.encoder": str(encoder),
                                "text.layer": 1, "denoiser.context_in_dim": 16, "captions.dropout": 0.2, "data.augment": ["flip"]})
    here, there = (prepare(recipe.replace("data.stream", whether), progress=False) for whether in (True, False))
    assert here.stream.kinds == ["short", "long"]
    lengths = []
    for step in range(14):
        one, other = (read_batch(ready, recipe, step) for ready in (here, there))
        assert one.index.equal(other.index) and one.x0.equal(other.x0) and one.mask.equal(other.mask) and one.dropped.equal(other.dropped)
        torch.testing.assert_close(one.text, other.text, rtol=1e-3, atol=1e-3)
        lengths.append(one.mask[~one.dropped].sum(1).float().mean().item())
    assert max(lengths[:7]) < min(lengths[7:]), lengths
    last = prepare(recipe.replace("text.layer", None), progress=False)
    assert not read_batch(last, recipe.replace("text.layer", None), 0).text.equal(read_batch(here, recipe, 0).text)


def test_words_that_the_network_learns_come_from_shards_too(shards, tmp_path):
    learnt = streams(shards, **{"denoiser.words": "table", "text.encoder": "pieces", "train.steps": 3})
    same(ran(learnt, tmp_path / "here"), ran(learnt.replace("data.stream", False), tmp_path / "there"))


def test_what_needs_the_whole_set_is_refused_when_it_is_planned(shards):
    "Before anything is prepared, and in words that say what to set; the same with the set prepared is a plan."
    named = {"data.source": "shards", "data.path": str(shards)}
    with pytest.raises(RecipeError, match=r"techniques\.repa\.weight = [0-9.]+ needs all training images at hand.*set data\.stream = False"):
        plan("repa", preset="smoke", seeds=[0], overrides=named)
    assert plan("repa", preset="smoke", seeds=[0], overrides=named | {"data.stream": False})


def test_a_pack_can_be_written_of_shards(shards, tmp_path):
    whole = streams(shards, **{"data.stream": False})
    packed = whole.replace({"data.source": "pack", "data.path": str(write_pack(whole, tmp_path / "a.safetensors", progress=False)), "data.stream": True})
    one, other = (prepare(recipe, progress=False) for recipe in (whole, packed))
    assert one.images.items == other.images.items and one.texts == other.texts and len(other.images) == COUNT


def test_workers_are_forked_however_the_process_was_started(shards):
    "As in notebooks that are copies of one process: what a cell defines cannot be sent to a fork server's workers, who die of it unheard."
    code = f"""
import multiprocessing, numpy, prx_nb.core.stream as stream
from prx_nb.core.recipe import Data
multiprocessing.set_start_method("forkserver")
source = stream.Stream(stream.open_shards({str(shards)!r}), Data(source="shards", path="x", size=8), ["dense"], numpy.arange({COUNT}), {{"here": lambda: 0}})
print([len(taken.index) for taken in stream.read_ahead(source, 0, 8, 0, 3, processes=2)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[8, 8, 8]\n", done.stderr[-800:]
