"Pictures that keep their shape: 200 of 6 shapes train, are drawn at each shape, go on to the bit, in two processes as in one."
import json
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from prx_nb.core import batch, data, images
from prx_nb.core.batch import prepare, read_batch, summarise
from prx_nb.core.data import DataError
from prx_nb.core.drawing import DrawingError
from prx_nb.core.images import Ragged, bucket_of
from prx_nb.core.recipe import Data, RecipeError, preset
from prx_nb.core.train import Run, train, validation_set
from prx_nb.lab import judge
from runs import CPU, plain, same, strike, weights

ROOT = Path(__file__).parents[1]
SHAPES = {(48, 48): (16, 16), (60, 40): (24, 16), (40, 60): (16, 24), (64, 48): (16, 12), (48, 64): (12, 16), (80, 40): (24, 12)}
COUNTS = (50, 40, 35, 30, 25, 20)


def drawing(n: int, size: tuple[int, int]) -> Image.Image:
    "A disc at one side, on a ground that changes from left to right: what is cut off or stretched shows."
    w, h = size
    y, x = np.mgrid[:h, :w]
    dice = np.random.default_rng(n)
    picture = np.stack([255 * x / w, 255 * y / h, np.full((h, w), dice.integers(256))], -1)
    picture[(x - h / 3) ** 2 + (y - h / 3) ** 2 < (h / 4) ** 2] = dice.integers(0, 256, 3)
    return Image.fromarray(picture.astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for k, (shape, count) in enumerate(zip(SHAPES, COUNTS)):
        for n in range(count):
            drawing(1000 * k + n, shape).save(root / f"{'abcdef'[k]}{n:02d}.png")
            (root / f"{'abcdef'[k]}{n:02d}.txt").write_text(f"disc {n} of kind {k}")
    return root


@pytest.fixture(scope="module")
def recipe(folder):
    return preset("smoke").replace({
        "data.source": "folder", "data.path": str(folder), "data.limit": None, "data.fit": "keep", "data.grid": 4,
        "data.holdout_concepts": 0.1, "data.augment": ["flip"], "train.steps": 20, "train.checkpoint_every": 7,
        "train.validate_every": 10, "train.keep": 3, "sample.steps": 2, "optimizer.clip": 0.1, "optimizer.eps": 1e-4})


@pytest.fixture(scope="module")
def prepared(recipe):
    return prepare(recipe, progress=False)


@pytest.fixture(scope="module")
def whole(recipe, prepared, tmp_path_factory):
    return train(recipe, tmp_path_factory.mktemp("whole"), prepared=prepared, progress=False, device="cpu")


def sides(picture) -> tuple[int, int]:
    return picture.shape[1], picture.shape[0]


def test_every_picture_is_pillows_own_resize_of_its_whole_file(folder, prepared):
    images = prepared.images
    assert len(images) == 200 and isinstance(images.pixels, Ragged)
    for item, pixels in zip(images.items, images.pixels):
        with Image.open(folder / item.key) as file:
            bucket = SHAPES[file.size]
            assert sides(pixels) == bucket and file.size[0] * bucket[1] == file.size[1] * bucket[0], "not stretched at all"
            assert np.array_equal(pixels, file.convert("RGB").resize(bucket, Image.Resampling.LANCZOS))


def test_a_batch_is_of_one_shape_and_each_picture_comes_equally_often(recipe, prepared):
    train_on = len(prepared.split.train)
    seen, shapes = torch.zeros(200, dtype=torch.long), []
    for step in range(train_on):                                  # a round: as many steps as pictures
        index = batch._drawn(prepared, recipe, step)
        kinds = {tuple(s) for s in np.asarray(prepared.images.pixels.shapes)[index.numpy()].tolist()}
        assert len(kinds) == 1 and len(index) == recipe.train.batch
        shapes += kinds
        seen += index.bincount(minlength=200)
    assert (seen[prepared.split.train] == recipe.train.batch).all() and seen.sum() == train_on * recipe.train.batch
    assert len(set(shapes)) == 6
    for shape in set(shapes):                                     # at any moment, not only at the end
        share = sum(s == shape for s in shapes) / train_on
        ahead = np.cumsum([s == shape for s in shapes]) - share * np.arange(1, train_on + 1)
        assert abs(ahead).max() < 1 + 6 * share


def test_a_step_is_a_pure_function_and_processes_share_it(recipe, prepared):
    for step in (3, 11):
        full = read_batch(prepared, recipe, step)
        parts = [read_batch(prepared, recipe, step, part) for part in (slice(0, 4), slice(4, 8))]
        assert torch.cat([p.x0 for p in parts]).equal(full.x0) and full.x0.equal(read_batch(prepared, recipe, step).x0)
        h, w = full.x0.shape[2:]
        assert (w, h) in SHAPES.values()
    assert not full.x0.equal(read_batch(prepared, recipe.replace("seed", 1), 11).x0)


def test_validation_sees_each_held_out_picture_in_its_shape(recipe, prepared):
    fixed = validation_set(prepared, recipe, CPU)
    index = torch.cat([b.index for b in fixed])
    assert set(index.tolist()) <= set(prepared.heldout.tolist()) and len({b.x0.shape for b in fixed}) > 2
    for b in fixed:
        for i, x0 in zip(b.index, b.x0):
            assert x0.equal(prepared.images.shaped(i[None])[0])
    times = torch.cat([b.t for b in fixed]).sort().values
    torch.testing.assert_close(times, (torch.arange(len(times)) + 0.5) / len(times))


def test_it_trains_and_draws_each_shape(whole):
    assert whole.record["status"] == "done"
    losses = whole.curves[whole.curves.name == "loss flow"].value
    assert len(losses) == 20 and losses.std() > 0.01
    for w, h in SHAPES.values():
        assert whole.sample(["disc 3 of kind 1"], size=(h, w)).images.shape == (1, 3, h, w)
    with pytest.raises(DrawingError, match="multiples of 4"):
        whole.sample("disc", size=(16, 18))


@pytest.mark.parametrize("at,when", [(12, "before"), (16, "after")])
def test_a_killed_run_goes_on_to_the_bit(at, when, whole, recipe, tmp_path):
    left = strike(recipe, tmp_path, at, when)
    same(train(recipe, left, progress=False, device="cpu"), whole)


def test_two_processes_give_the_losses_of_one(whole, recipe, tmp_path):
    two = train(recipe.replace("train.processes", 2), tmp_path / "two", progress=False, device="cpu")
    one, other = (plain(r).set_index(["step", "name"]).value.sort_index() for r in (whole, two))
    assert one.index.equals(other.index) and (one - other).abs().max() < 1e-5
    for name, value in weights(whole).items():
        torch.testing.assert_close(value, weights(two)[name], rtol=1e-4, atol=1e-5)


def test_the_summary_tells_all(recipe, prepared, tmp_path):
    told = summarise(prepared, recipe)
    assert told.fit == {"how": "keep", "buckets": {"{} x {}".format(*b): n for b, n in zip(SHAPES.values(), COUNTS)}}
    assert "nothing is cropped; buckets: 16 x 16 50" in str(told) and "about 16 x 16 px" in str(told)
    for n in range(12):
        drawing(n, (100, 57)).save(tmp_path / f"thing {n}.png")
    mine = recipe.replace({"data.path": str(tmp_path), "data.grid": 8, "data.holdout_concepts": 0.2})
    white = summarise(prepare(mine, progress=False), mine).fit["white"]
    assert white["images"] == 12 and 0 < white["most"] < 8
    out = mine.replace("data.stretch", 0.5)
    assert "white" not in (fit := summarise(prepare(out, progress=False), out).fit) and fit["out"]["images"] == 12


def test_pictures_of_any_shape_are_whole_and_hardly_stretched(tmp_path):
    dice, grid = np.random.default_rng(0), 4
    for n in range(60):
        w, h = (int(v) for v in dice.integers(30, 200, 2))
        Image.new("RGB", (w, h), (0, 0, 0)).save(tmp_path / f"p{n:02d}.png")
    images = data.load(Data(source="folder", path=str(tmp_path), size=32, fit="keep", grid=grid), progress=False)
    for item, pixels in zip(images.items, images.pixels):
        w, h = item.facts["shape"]
        inside = (pixels == 0).all(-1)                            # all that is not white is the picture
        x, y = inside.any(0).sum(), inside.any(1).sum()
        assert inside.sum() == x * y and (pixels[~inside] == 255).all()
        assert sides(pixels)[0] % grid == 0 == sides(pixels)[1] % grid and (x, y) == bucket_of((w, h), 32, grid)[2:]
        assert (x == sides(pixels)[0]) or (y == sides(pixels)[1])
        scale = min(sides(pixels)[0] / w, sides(pixels)[1] / h)
        assert abs(x - scale * w) <= 0.5 and abs(y - scale * h) <= 0.5, "stretched by half a pixel at most"
        assert 2 / 3 - 1e-9 <= math.prod(sides(pixels)) / 32 ** 2 <= 1.5 + 1e-9


def test_one_too_long_is_named_and_counts_as_unreadable(tmp_path):
    for n in range(9):
        drawing(n, (40, 40)).save(tmp_path / f"p{n}.png")
    Image.new("RGB", (3000, 2)).save(tmp_path / "line.png")
    with pytest.raises(DataError, match="line.png .*3000 x 2 px is too long"):
        data.load(Data(source="folder", path=str(tmp_path), size=16, fit="keep", grid=4), progress=False)


def test_latents_are_kept_by_shape(recipe, tmp_path):
    from diffusers import AutoencoderKL

    from prx_nb.core.latents import load_latents
    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4,
                  down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2).save_pretrained(tmp_path)
    r = recipe.replace({"latents.autoencoder": str(tmp_path), "latents.channels": 4, "latents.factor": 2,
                        "denoiser.in_channels": 4, "denoiser.patch_size": 2, "data.augment": []})
    ready, space = prepare(r, progress=False), load_latents(r.latents)
    assert len(ready.buckets) == 6
    for same_shape in ready.buckets:
        some = same_shape[[4, 0, 2]]
        torch.testing.assert_close(ready.clean(some), space.encode(ready.images.shaped(some)), rtol=0, atol=2e-3)
    with pytest.raises(DataError, match="several shapes"):
        ready.clean(torch.cat([b[:1] for b in ready.buckets]))
    x0 = read_batch(ready, r, 2).x0
    assert x0.shape[1] == 4 and (x0.shape[3] * 2, x0.shape[2] * 2) in SHAPES.values()
    run = train(r.replace("train.steps", 3), tmp_path / "run", prepared=ready, progress=False, device="cpu")
    assert run.sample("disc", size=(12, 24)).images.shape == (1, 3, 12, 24)


@pytest.mark.parametrize("changes,words", [
    ({"data.grid": None}, "data.grid = None"),
    ({"data.grid": 6}, "a divisor of data.size"),
    ({"data.grid": 2}, "is not a multiple of latents.factor 1 x denoiser.patch_size 4"),
    ({"data.fit": "crop"}, "data.grid = 4 with data.fit = 'crop' would do nothing"),
    ({"techniques.repa.weight": 0.5, "data.augment": []}, "reads all images as squares"),
    ({"tuning.subset": ["style=a"]}, "chosen and drawn images are squares"),
    ({"synthetic.share": 0.5}, "chosen and drawn images are squares"),
    ({"data.source": "shards"}, "data.source = 'shards'"),
])
def test_what_does_not_go_together_is_refused(recipe, changes, words):
    with pytest.raises(RecipeError, match=words.replace(".", r"\.")):
        recipe.replace(changes)


def test_squares_are_not_touched(recipe, folder):
    plain_one = preset("smoke")
    assert plain_one.key == plain_one.replace({"data.fit": "crop", "data.stretch": 0.0}).key
    assert "keep" in json.dumps(recipe.model_dump(mode="json")) and recipe.key != recipe.replace(
        {"data.fit": "crop", "data.grid": None}).key
    cropped = prepare(recipe.replace({"data.fit": "crop", "data.grid": None}), progress=False)
    assert cropped.images.pixels.shape == (200, 16, 16, 3) and cropped.buckets == ()


@pytest.mark.parametrize("technique", [{"techniques.tread.rate": 0.5}, {"techniques.sprint.rate": 0.75, "denoiser.fusion": [1, None]},
                                       {"flow.prediction": "x", "denoiser.bottleneck_size": 16},
                                       {"techniques.contrastive.weight": 0.05}, {"optimizer.name": "muon"}])
def test_techniques_train_on_shapes(technique, recipe, prepared, tmp_path):
    run = train(recipe.replace({"train.steps": 4} | technique), tmp_path, prepared=prepared, progress=False, device="cpu")
    assert run.record["status"] == "done" and Run.load(tmp_path).sample("disc", size=(12, 24)).images.isfinite().all()
    assert judge.draw(run, prepared, judge.exam(prepared, run.recipe)).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("name,variant", [("contrastive", "contrastive"), ("latent_space", "pixels"), ("target_map", "x_in_x"),
                                          ("augmentation", "flip")])
def test_ablations_look_into_runs_on_shapes(name, variant, recipe, tmp_path):
    "Their diagnostics too; what the captions of a folder do not name is no number, and no reason to lose the run."
    data = {f"data.{k}": v for k, v in recipe.data.model_dump().items() if k in ("source", "path", "limit", "fit", "holdout_concepts")}
    said = {"preset": "smoke", "variant": variant, "seed": 0, "out": str(tmp_path), "overrides":
            data | {"data.grid": 4, "train.steps": 4, "train.checkpoint_every": 4, "train.validate_every": 2, "sample.steps": 2}}
    cells = [c for c in json.loads((ROOT / f"nbs/ablations/{name}.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    names, shown = {"__name__": "__main__"}, pytest.MonkeyPatch()
    shown.setenv("MPLBACKEND", "Agg")
    for source in ("".join(c["source"]) for c in cells):
        exec(source, names)
        names |= said if source.startswith("variant =") else {}
    shown.undo(), plt.close("all")
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["metrics"]["joint[effnet-lite0]"] > 0 and record["diagnostic"]
    if name == "augmentation":
        assert None in record["diagnostic"]["errors"]["real"].values()


# ---------------------------------------------------------------- several sizes, and what depends on the size
@pytest.fixture(scope="module")
def sized(recipe):
    return recipe.replace({"data.scales": [0.5, 1.5], "train.steps": 12, "denoiser.size_token": True, "denoiser.span": 4,
                           "denoiser.resolution_embeds": True, "flow.shift_by_size": True})


def test_each_size_has_its_turn_and_the_same_pictures(sized):
    ready = prepare(sized, progress=False)
    assert [p.images.size for p in ready.more] == [8, 24] and all(p.images.items[7].key == ready.images.items[7].key for p in ready.more)
    steps, areas = 3 * len(ready.split.train), {8: 0, 16: 0, 24: 0}
    for step in range(steps):
        now, index, _ = batch._turn(ready, sized, step)
        areas[now.images.size] += 1
        if step % 60 == 0:
            h, w = now.clean(index[:1]).shape[2:]
            assert read_batch(ready, sized, step).x0.shape[2:] == (h, w)
            assert 2 / 3 - 1e-9 <= h * w / now.images.size ** 2 <= 1.5 + 1e-9
    assert set(areas.values()) == {len(ready.split.train)}, "each picture as often at each size"
    assert batch.data_key(ready) != batch.data_key(prepare(sized.replace("data.scales", [0.5]), progress=False))


def test_several_sizes_train_go_on_to_the_bit_and_draw_sizes_never_seen(sized, tmp_path):
    whole = train(sized, tmp_path / "whole", progress=False, device="cpu")
    same(train(sized, strike(sized, tmp_path, 9), progress=False, device="cpu"), whole)
    for size in ((8, 8), (12, 24), (32, 32), (40, 8)):
        drawn = whole.sample("disc", size=size).images
        assert drawn.shape[2:] == size and drawn.isfinite().all()
    assert "sizes: 16 px in 33%, 8 px in 33%, 24 px in 33% of the steps" in str(summarise(prepare(sized, progress=False), sized))


def test_small_first_then_large(recipe, tmp_path):
    r = recipe.replace({"data.scales": [0.5], "data.early": 0.5, "data.fit": "crop", "data.grid": None, "denoiser.span": 2})
    ready = prepare(r, progress=False)
    sides_ = [read_batch(ready, r, step).x0.shape[-1] for step in range(20)]
    assert sides_ == [8] * 10 + [16] * 10
    from prx_nb.core.cost import flops_step
    alone = [flops_step(r.replace({"data.size": s, "data.scales": [], "data.early": 0.0})) for s in (8, 16)]
    assert flops_step(r) == pytest.approx(sum(alone) / 2)
    aligned = train(r.replace({"techniques.repa.weight": 0.5, "data.augment": []}), tmp_path, progress=False, device="cpu")
    assert aligned.record["status"] == "done"
    aligns = aligned.curves[aligned.curves.name == "loss REPA"]
    assert len(aligns) == r.train.steps and (aligns.value.abs() <= 0.5).all(), "at both sizes"


def test_times_are_shifted_by_each_batchs_own_pixels(sized):
    ready, plain_flow = prepare(sized, progress=False), sized.replace("flow.shift_by_size", False)
    seen = set()
    for step in range(9):
        one = read_batch(ready, sized, step)
        moved, still = (batch.add_noise(one, r, step, CPU).t.double() for r in (sized, plain_flow))
        ratio = math.sqrt(math.prod(one.x0.shape[2:])) / 16
        seen.add(ratio)
        mixed = (moved - still).abs() < 1e-6                      # uniform draws are not shifted
        close = (moved - ratio * still / (1 + (ratio - 1) * still)).abs() < 5e-3
        assert (mixed | close).all() and (ratio == 1 or close.float().mean() > 0.5)
    assert min(seen) < 0.8 and max(seen) > 1.2


def test_the_vector_is_that_of_diffusers_for_every_shape():
    from diffusers import PRXTransformer2DModel

    from prx_nb.core.denoiser import PRX
    from runs import randomise
    c = dict(in_channels=3, patch_size=4, context_in_dim=24, hidden_size=32, num_heads=2, depth=2, axes_dim=(8, 8), resolution_embeds=True)
    mine, theirs = randomise(PRX(**c)).eval(), PRXTransformer2DModel(**c).eval()
    theirs.load_state_dict(mine.state_dict(), strict=True)
    g = torch.Generator().manual_seed(0)
    outs = []
    for h, w in ((16, 16), (16, 24), (24, 16), (8, 40)):
        x, t, text = torch.randn(2, 3, h, w, generator=g), torch.rand(2, generator=g), torch.randn(2, 5, 24, generator=g)
        with torch.no_grad():
            a, b = mine(x, t, text).prediction, theirs(x, t, text).sample
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * b.abs().max().item())
        outs.append(a)
    assert all(o.std() > 0.1 for o in outs)


def test_a_network_with_a_span_sees_a_doubled_image_at_the_same_angles():
    from prx_nb.core.denoiser import rotary
    small, large = (rotary(n, n, (8, 8), 1e4, "cpu", 4).angle() for n in (4, 8))
    slow = lambda turn: turn[:, 1]                                # of rows, slow enough not to come round
    assert slow(large).min() == pytest.approx(-0.025) and slow(large).max() == pytest.approx(0.325) and slow(small).max() == pytest.approx(0.3)
    assert slow(rotary(8, 8, (8, 8), 1e4).angle()).max() == pytest.approx(0.7), "without it: angles never seen"
    flat = rotary(2, 8, (8, 8), 1e4, "cpu", 4)
    assert torch.allclose(flat, rotary(2, 8, (8, 8), 1e4)), "as many tokens as the span's square: not moved"


@pytest.mark.parametrize("changes,words", [
    ({"data.early": 0.5}, "data.early = 0.5 without data.scales"),
    ({"data.scales": [1.0]}, "each once"),
    ({"data.scales": [1.125]}, "18 px is not a multiple of data.grid"),
    ({"data.scales": [0.5], "denoiser.kind": "dit"}, "only 'prx' takes every shape"),
    ({"denoiser.kind": "dit", "denoiser.size_token": True, "data.fit": "crop", "data.grid": None}, "denoiser.size_token = True"),
    ({"flow.shift_by_size": True, "flow.weight": "logit_normal"}, "a density of one shift"),
])
def test_sizes_that_do_not_go_together_are_refused(recipe, changes, words):
    with pytest.raises(RecipeError, match=words.replace(".", r"\.")):
        recipe.replace(changes)


def test_what_diffusers_has_no_place_for_is_not_exported(recipe):
    from prx_nb.core.interop import InteropError, denoiser_config
    for name, value in (("size_token", True), ("span", 8)):
        with pytest.raises(InteropError, match=f"denoiser.{name}"):
            denoiser_config(recipe.replace(f"denoiser.{name}", value).denoiser)
    assert not {"size_token", "span"} & denoiser_config(recipe.denoiser).keys()


def test_the_exam_draws_each_picture_in_its_shape_and_nothing_is_cut_off(recipe, prepared, whole):
    asked = judge.exam(prepared, recipe)
    drawn = judge.draw(whole, prepared, asked)
    assert drawn.shape == asked.reference.shape == (len(asked.index), 3, prepared.images.size, prepared.images.size)
    kinds = {tuple(prepared.images.shapes[i]) for i in asked.index.tolist()}
    assert len(kinds) > 2
    for i, picture, real in zip(asked.index.tolist(), drawn, asked.reference):
        h, w = prepared.images.shapes[i]
        edge = (slice(None), slice(None), 0) if h > w else (slice(None), 0)
        assert h == w or (picture[edge] == 1).all() and (real[edge] == 1).all(), "white beside it, in both"
        pad = images.as_square(Image.fromarray(prepared.images.pixels[i]), prepared.images.size, "pad")
        assert real.equal(torch.from_numpy(np.asarray(pad).copy()).permute(2, 0, 1) / 127.5 - 1)
    assert not drawn[0].equal(drawn[1])
