"Metrics against independent formulas, and the mistakes they must notice."
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

from prx_nb.core import metrics
from prx_nb.core.data import Split
from prx_nb.core.images import PALETTE, Images, Item
from prx_nb.core.show import from_uint8, to_uint8


def cloud(n, d, seed, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


def drawn(concept, style, ground, side=24):
    "A shape (by concept) with a stroke (by style) on a ground; uint8 (side, side, 3)."
    y, x = np.mgrid[:side, :side] / (side - 1) * 2 - 1
    angle = concept * 0.7
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    radius = np.abs(u) ** (1 + concept % 3) + np.abs(v * (1 + concept % 4)) ** 2
    ink = (radius < 0.5) if style == "solid" else (np.abs(radius - 0.45) < 0.2)
    image = np.empty((side, side, 3), np.uint8)
    image[:] = PALETTE[ground]
    image[ink] = [(20, 20, 20), (240, 240, 255), (200, 30, 120)][concept % 3]
    return image


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "Sixteen concepts in two styles on eight grounds, held out: four concepts; features in an own cache."
    grounds = list(PALETTE)
    pixels, items = [], []
    for concept in range(16):
        for k, style in enumerate(("solid", "outline")):
            for copy in range(2):
                ground = grounds[(concept * 3 + k + 2 * copy) % 8]
                pixels.append(drawn(concept, style, ground))
                items.append(Item(f"{style}/{concept}/{copy}", str(concept), style, f"shape {concept}", (), "", "", ground, None, {}))
    images = Images(np.stack(pixels), items, "test-metrics", [], "")
    held = torch.tensor([i for i, item in enumerate(items) if int(item.concept) % 4 == 0])
    train = torch.tensor([i for i in range(len(items)) if i not in set(held.tolist())])
    with pytest.MonkeyPatch.context() as patch:
        packages = metrics.pooled_features.__globals__["cache_dir"]("packages")
        home = tmp_path_factory.mktemp("cache")
        (home / "packages").symlink_to(packages)
        patch.setenv("PRX_NB_CACHE", str(home))
        encoder = metrics.load_vision_encoder("effnet-lite0", size=64, device="cpu")
        yield images, Split(train, held, torch.tensor([], dtype=torch.long)), metrics.Reference(images, Split(
            train, held, torch.tensor([], dtype=torch.long)), encoder)


def test_frechet_distance_is_the_closed_form():
    mix = cloud(8, 8, 9)
    a, b = (cloud(300, 8, 0) @ mix).double(), (cloud(200, 8, 1, 0.3) @ mix.T).double()
    ca, cb = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = scipy.linalg.sqrtm(ca @ cb).real
    truth = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(ca + cb - 2 * root)
    assert metrics.fd(a, b) == pytest.approx(truth, rel=1e-4)
    assert metrics.fd(a, a) == pytest.approx(0, abs=1e-3)


def polynomial(x, y):
    return (x @ y.T / x.shape[1] + 1) ** 3


def test_kid_is_the_unbiased_polynomial_mmd():
    a, b = cloud(90, 12, 0), cloud(90, 12, 1, 0.4)
    x, y = a.double().numpy(), b.double().numpy()
    off = lambda k: (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))
    truth = off(polynomial(x, x)) + off(polynomial(y, y)) - 2 * polynomial(x, y).mean()
    assert metrics.kid(a, b) == pytest.approx(truth, rel=1e-3)          # sets of one size: every subset is the whole set


@pytest.mark.parametrize("n, m, d", [(90, 90, 12), (200, 90, 12), (40, 150, 6), (60, 30, 80)])
def test_distances_leave_the_global_generator_alone(n, m, d):
    "Both distances, also where there are fewer images than features; KID as the mean of torchmetrics' subsets, and exactly for equal sets."
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance
    real, fake, given = cloud(n, d, 2).double(), cloud(m, d, 3, 0.2).double(), torch.nn.Identity()
    given.num_features = d
    peers = FrechetInceptionDistance(feature=given), KernelInceptionDistance(feature=given, subsets=400, subset_size=min(n, m))
    for peer in peers:
        peer.update(real, real=True)
        peer.update(fake, real=False)
    assert metrics.fd(real, fake) == pytest.approx(peers[0].compute().item(), rel=1e-6)
    before = torch.random.get_rng_state()
    ours = metrics.kid(real, fake)
    assert torch.equal(torch.random.get_rng_state(), before) and ours == metrics.kid(real, fake)
    torch.manual_seed(0)
    mean, spread = (v.item() for v in peers[1].compute())
    assert ours == (pytest.approx(mean, rel=1e-6) if n == m else pytest.approx(mean, abs=5 * spread / 400**0.5))
    torch.random.set_rng_state(before)


@pytest.mark.parametrize("biased", [False, True])
def test_mmd_pair_by_pair(biased):
    from scipy.spatial.distance import cdist
    x, y = cloud(40, 6, 0).numpy(), cloud(30, 6, 1, 0.5).numpy()
    unit = lambda v: v / np.linalg.norm(v, axis=1, keepdims=True)
    k = lambda a, b: np.exp(-cdist(unit(a), unit(b), "sqeuclidean") / (2 * 10.0**2))
    keep = lambda m: m.mean() if biased else m[~np.eye(len(m), dtype=bool)].mean()
    truth = 1000 * (keep(k(x, x)) + keep(k(y, y)) - 2 * k(x, y).mean())
    ours = metrics.mmd(torch.tensor(x), torch.tensor(y), biased=biased)
    assert ours == pytest.approx(truth, rel=1e-5)
    own = metrics.gaussian_total(torch.tensor(x), torch.tensor(x))
    assert own == pytest.approx(k(x, x).sum()) and ours == metrics.mmd(torch.tensor(x), torch.tensor(y), biased=biased, own=own)


def test_unbiased_means_unbiased():
    many = [(metrics.mmd(cloud(20, 5, 2 * i), cloud(20, 5, 2 * i + 1)), metrics.mmd(cloud(20, 5, 2 * i), cloud(20, 5, 2 * i + 1), biased=True))
            for i in range(200)]
    fair, published = np.array(many).T
    assert abs(fair.mean()) < 4 * fair.std() / 200**0.5 < published.mean()


def test_bytes_go_through_one_door(world):
    "torchmetrics with our module on bytes equals the distance of features; anything but bytes is refused."
    from torchmetrics.image.fid import FrechetInceptionDistance
    images, split, reference = world
    few, other = images.batch(split.train[:12]), images.batch(split.concepts[:12])
    module = metrics.ImageFeatures(reference.encoder)
    metric = FrechetInceptionDistance(feature=module, normalize=False)
    for batch, real in ((few, True), (other, False)):
        metric.update(to_uint8(batch), real=real)
    with torch.no_grad():
        ours = metrics.fd(reference.encoder.pooled(few), reference.encoder.pooled(other))
    assert metric.compute().item() == pytest.approx(ours, rel=1e-2)
    with pytest.raises(metrics.MetricError, match="uint8"):
        module(few)
    scaled = FrechetInceptionDistance(feature=module, normalize=True)   # torchmetrics leaves scaling to own modules
    with pytest.raises(metrics.MetricError, match="uint8"):
        scaled.update((few + 1) / 2, real=True)
    items = [images.items[i] for i in split.concepts.tolist()]
    with pytest.raises(metrics.MetricError, match="floating point"):
        metrics.evaluate(to_uint8(images.batch(split.concepts)), items, reference)
    with torch.no_grad():
        assert not torch.allclose(module(to_uint8(few)), module(255 - to_uint8(few)), atol=0.1)   # inversion shows


def test_real_images_score_as_real(world):
    images, split, reference = world
    real, items = images.batch(split.concepts), [images.items[i] for i in split.concepts.tolist()]
    found = metrics.evaluate(real, items, reference)
    name = "effnet-lite0"
    assert found["background"] == 1 and found[f"style[{name}]"] > 0.8 and found[f"retrieval@1[{name}]"] > 0.6
    assert all(math.isfinite(v) for v in found.values()) and set(reference.chance) <= set(found)
    assert found == pytest.approx(reference.limits, rel=1e-3, abs=1e-3)
    assert found == metrics.evaluate(real, items, reference)            # the same for the same samples
    for metric in found:
        metrics.higher_is_better(metric)
    # what is asked for, not what is drawn, decides
    wrong = metrics.evaluate(real, [replace(i, concept=str((int(i.concept) + 4) % 16), background="white") for i in items], reference)
    assert wrong[f"retrieval@1[{name}]"] < 0.3 and wrong["background"] < 0.5
    assert wrong[f"KID[{name}]"] == found[f"KID[{name}]"]


def test_limits_come_from_disk(world, monkeypatch):
    "Measured once; again when anything they depend on is another, or the file is damaged."
    images, split, reference = world
    first, calls, real_score = reference.limits, [], metrics.score
    monkeypatch.setattr(metrics, "score", lambda *a: calls.append(1) or real_score(*a))
    again = lambda split=split, images=images: metrics.Reference(images, split, reference.encoder)
    assert again().limits == first and not calls
    [path] = [p for p in metrics.cache_dir("limits").glob(f"{reference.key}-*.json") if not p.stem.endswith("-scale")]
    for damage in ("{", "[1]", '{"KID": "x"}', ""):
        path.write_text(damage)
        assert again().limits == first and len(calls) == 1
        calls.clear()
    fewer = Split(split.train, split.concepts[:-4], split.pairs)
    other = Images(images.pixels, images.items, "another-key", [], "")
    keys = {again().key, again(fewer).key, again(Split(split.train[1:], split.concepts, split.pairs)).key, again(images=other).key}
    assert len(keys) == 4
    assert again(fewer).limits != first and calls
    monkeypatch.setattr(metrics.Path, "read_bytes", lambda self: b"other code")
    assert again().key not in keys
    for count in (0, 1):                                                # nothing, or too little, is held out
        assert again(Split(split.train, split.concepts[:count], split.pairs)).limits == {}


def test_one_reference_for_one_run(world):
    images, split, _ = world
    from types import SimpleNamespace as Space
    recipe = Space(evaluate=Space(features="effnet-lite0"))
    first = metrics.prepare(recipe, Space(images=images, split=split))
    assert metrics.prepare(recipe, Space(images=images, split=split)) is first
    assert metrics.prepare(recipe, Space(images=images, split=replace(split))) is not first
    assert len(metrics._last) == 1
    metrics._last.clear()


def test_measuring_needs_no_heavy_package():
    "What every run pays for: the encoder and MMD need torch alone, only FD and KID load torchmetrics."
    import subprocess
    import sys
    code = """
import sys, torch
from prx_nb.core import metrics
g = torch.Generator().manual_seed(0)
a, b = torch.randn(30, 8, generator=g), torch.randn(20, 8, generator=g)
metrics.mmd(a, b)
metrics.load_vision_encoder("effnet-lite0", device="cpu")
print(*[m for m in ("torchmetrics", "transformers", "scipy", "matplotlib", "onnx") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_what_a_clipped_or_saved_sample_scores(world):
    "Samples are measured as the bytes that a file would hold."
    images, split, reference = world
    items = [images.items[i] for i in split.concepts.tolist()]
    loud = images.batch(split.concepts) * 1.7
    saved = from_uint8(to_uint8(loud))
    before = loud.clone()
    assert metrics.evaluate(loud, items, reference) == metrics.evaluate(saved, items, reference)
    assert torch.equal(loud, before)


def test_one_noise_batch_reused(world):
    "Two batches drawn from the same noise for the same captions are the same images: seen in `duplicates`."
    images, split, reference = world
    items = [images.items[i] for i in split.concepts[:8].tolist()]
    noise = torch.randn(8, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    fresh = torch.randn(8, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    sampler = lambda n: torch.tanh(F.avg_pool2d(n, 5, 1, 2) * 3)         # an image is a function of its noise
    reused = metrics.evaluate(torch.cat([sampler(noise), sampler(noise) + 1e-4]), items * 2, reference)
    proper = metrics.evaluate(torch.cat([sampler(noise), sampler(fresh)]), items * 2, reference)
    assert reused["duplicates"] == 0.5 and proper["duplicates"] == 0


def test_ranks_against_a_loop():
    g = torch.Generator().manual_seed(0)
    shown = [Item(f"k{i}", f"c{i % 5}", "s", "", (), "", "", None, None, {}) for i in range(17)]
    shown.append(Item("single", "only", "s", "", (), "", "", None, None, {}))
    points, centre = torch.randn(18, 4, generator=g), torch.randn(4, generator=g) * 0.1
    items, samples = [*shown[:9], shown[17]], torch.randn(10, 4, generator=g)
    ranks, count = metrics.concept_ranks(samples, items, points, shown, centre)
    assert count == 6
    for n, item in enumerate(items):
        scores = {}
        for concept in {s.concept for s in shown}:
            rows = [i for i, s in enumerate(shown) if s.concept == concept]
            others = [i for i in rows if shown[i].key != item.key] or rows
            scores[concept] = np.mean([F.cosine_similarity(samples[n] - centre, points[i] - centre, dim=0).item() for i in others])
        better = sum(v > scores[item.concept] + 1e-7 for v in scores.values())
        assert ranks[n].item() == 1 + better


def test_style_is_ridge_regression():
    x, names = cloud(60, 10, 0), ["a", "b", "c"] * 20
    fitted = metrics.StyleClassifier(x, names, ridge=0.05)
    centred = (x.double() - x.double().mean(0)).numpy()
    y = np.eye(3)[[("a", "b", "c").index(n) for n in names]]
    strength = 0.05 * np.trace(centred @ centred.T) / 60
    weight = np.linalg.solve(centred.T @ centred + strength * np.eye(10), centred.T @ (y - y.mean(0)))   # the primal form
    np.testing.assert_allclose(fitted.weight.numpy(), weight, rtol=1e-6, atol=1e-9)


def test_border_colours_see_the_border():
    for name, colour in PALETTE.items():
        image = torch.tensor(colour).view(3, 1, 1).expand(3, 16, 16) / 127.5 - 1
        spoiled = image.clone()
        spoiled[:, 3:13, 3:13] = -1                                      # a black object inside
        spoiled[:, 0, 5:9] = -1                                          # that touches the edge
        assert metrics.border_colours(spoiled[None]) == [name]


def test_bad_input(world):
    images, split, reference = world
    items = [images.items[i] for i in split.concepts[:4].tolist()]
    real = images.batch(split.concepts[:4])
    broken = real.clone()
    broken[2, 0, 0, 0] = float("nan")
    for samples, words in ((broken, "the first is sample 2"), (real[:3], "3 samples for 4 items"), (real[:, :1], "floating point")):
        with pytest.raises(metrics.MetricError, match=words):
            metrics.evaluate(samples, items, reference)
    with pytest.raises(metrics.MetricError, match="no metric 'FID'"):
        metrics.higher_is_better("FID")


def test_throughput():
    calls = []
    assert metrics.throughput(lambda: calls.append(1), 10, repeats=3, warmup=2) > 0 and len(calls) == 5


def test_samples_of_ones_own_prompts(world):
    "What no image of the data shows has no rank and no style; all else is measured, and the known ones as before."
    images, split, reference = world
    known = [images.items[i] for i in split.concepts.tolist()]
    mine = [Item(f"mine-{i}", f"unicorn {i}", "oil", caption="a unicorn") for i in range(8)]
    real, name = images.batch(split.concepts), reference.encoder.name
    own = metrics.evaluate(real[:8], mine, reference)
    assert all(math.isfinite(v) for v in own.values()) and f"KID[{name}]" in own
    assert not [m for m in own if m.startswith(("retrieval", "style", "background"))]
    alone, mixed = (metrics.evaluate(torch.cat(s), i, reference) for s, i in (((real,), known), ((real, real[:8]), known + mine)))
    same = [m for m in alone if m.startswith(("retrieval", "style"))]
    assert len(same) == 4 and [alone[m] for m in same] == [mixed[m] for m in same]
    with pytest.raises(metrics.MetricError, match="1 samples for 1 items: as many of each, and at least 2"):
        metrics.evaluate(real[:1], known[:1], reference)
    with pytest.raises(metrics.MetricError, match="few = 1"):
        metrics.evaluate(real, known, reference, beside=[reference], few=1)
