"Damages, grades and verdicts on worlds whose truth is known."
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.ndimage
import torch

from prx_nb.core import metrics
from prx_nb.core.files import write_json
from prx_nb.core.images import Item
from prx_nb.lab import calibration


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def world(n=24, side=32, concepts=8):
    items = [Item(f"k{i}", f"c{i % concepts}", "s", "", (), "", "", "red", None, {}) for i in range(n)]
    return torch.rand(n, 3, side, side, generator=stream(9)) * 2 - 1, items


@pytest.mark.parametrize("name", calibration.DAMAGES)
def test_every_damage_starts_at_nothing_and_grows(name):
    images, items = world()
    damage, before = calibration.DAMAGES[name], images.clone()
    steps = []
    for strength in calibration.STRENGTHS:
        spoiled, asked = damage(images, items, strength, stream())
        again, asked_again = damage(images, items, strength, stream())
        assert torch.equal(spoiled, again) and asked == asked_again, "the same draw for the same generator"
        assert spoiled.shape == images.shape and len(asked) == len(items) and spoiled.abs().max() <= 1
        pairs = {i.key: k for k, i in enumerate(items)}
        origin = torch.stack([images[pairs[i.key]] for i in asked]) if name == "mode drop" else images
        steps.append((spoiled - origin).square().mean().item() + sum(a.key != b.key for a, b in zip(asked, items)))
    assert torch.equal(images, before), "the drawings are left as they are"
    assert steps[0] == 0 and all(a < b for a, b in zip(steps, steps[1:])), steps


@pytest.mark.parametrize("side", [16, 32, 48])
def test_blur_is_scipys(side):
    images, items = world(3, side)
    for strength in (0.25, 0.6, 1.0):
        sigma = strength * side / 16
        ours, _ = calibration.blur(images, items, strength, stream())
        theirs = scipy.ndimage.gaussian_filter(images.numpy(), (0, 0, sigma, sigma), mode="nearest", radius=(0, 0, *[int(3 * sigma) + 1] * 2))
        np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-5)


def test_noise_has_the_deviation_it_says():
    images, items = torch.zeros(20, 3, 32, 32), world(20)[1]
    added = calibration.noise(images, items, 0.25, stream())[0]
    assert added.std().item() == pytest.approx(0.25, rel=0.02) and abs(added.mean().item()) < 0.01


@pytest.mark.parametrize("strength, count", [(0.25, 6), (0.5, 12), (1.0, 24)])
def test_shares_are_exact_and_nested(strength, count):
    images, items = world()
    asked = calibration.wrong_captions(images, items, strength, stream())[1]
    wrong = [k for k, (a, b) in enumerate(zip(asked, items)) if a != b]
    assert len(wrong) == count and all(asked[k].concept != items[k].concept for k in wrong)
    negative = calibration.inverted(images, items, strength, stream())[0]
    turned = [k for k in range(24) if torch.equal(negative[k], -images[k])]
    assert len(turned) == count and all(torch.equal(negative[k], images[k]) for k in set(range(24)) - set(turned))
    full = calibration.wrong_captions(images, items, 1.0, stream())[1]
    assert all(asked[k] == full[k] for k in wrong), "what is wrong at a quarter is wrong the same way at the end"


def test_mode_drop_copies_a_few_and_keeps_captions_right():
    images, items = world(96, 8, 32)
    rows = {i.key: k for k, i in enumerate(items)}
    left = []
    for strength in (0.5, 1.0):
        spoiled, asked = calibration.mode_drop(images, items, strength, stream())
        assert all(torch.equal(picture, images[rows[i.key]]) for picture, i in zip(spoiled, asked))
        left.append(sum(a.key == b.key for a, b in zip(asked, items)))
    assert len({i.concept for i in asked}) == 2                          # one in sixteen of 32
    assert left == [6 + 45, 6]                                           # two concepts of three drawings stay; half of the others


def test_wrong_captions_need_a_choice():
    images, items = world(4, 8, 1)
    with pytest.raises(metrics.MetricError, match="two concepts at least, all 4 items show 'c0'"):
        calibration.wrong_captions(images, items, 0.5, stream())


# --- grades: metrics that are plain functions of the pixels

@pytest.fixture
def ruler(monkeypatch):
    "A pretend `metrics.evaluate`: brightness spread, an exact count of copies, and something that never moves."
    calls = []

    def evaluate(samples, items, reference, batch=None, seen=None):
        calls.append((samples, items))
        copies = 1 - len({s.numpy().tobytes() for s in samples}) / len(samples)
        return {"KID[x]": 1 - samples.std(0).mean().item(), "duplicates": copies, "background": 0.5,
                "retrieval@1[x]": float(np.mean([i.key == j for i, j in zip(items, reference)]))}
    monkeypatch.setattr(metrics, "evaluate", evaluate)
    return calls


def test_grade_measures_all_and_compares_the_same_drawings(ruler):
    images, items = world(40, 8, 20)
    frame = calibration.grade([i.key for i in items], images, items, samples=10, repeats=3)
    assert len(frame) == 4 * 5 * 5 * 3 and not frame.isna().any().any()
    assert set(frame.damage) == set(calibration.DAMAGES) and set(frame.strength) == set(calibration.STRENGTHS)
    start = frame[(frame.strength == 0) & (frame.metric == "KID[x]")].groupby("repeat").value
    assert (start.nunique() == 1).all() and start.first().nunique() == 3  # the same drawings in one repeat, others in the next
    assert all(len(s) == 10 == len(i) for s, i in ruler)
    again = calibration.grade([i.key for i in items], images, items, samples=10, repeats=3)
    pd.testing.assert_frame_equal(frame, again)


def test_grades_of_one_repeat_are_nested(ruler):
    "What is spoiled at a quarter is spoiled the same way at a half."
    images, items = world(20, 8, 10)
    calibration.grade([i.key for i in items], images, items, repeats=1, damages={"inverted": calibration.inverted, "wrong": calibration.wrong_captions})
    for part, kind in ((ruler[:5], 0), (ruler[5:], 1)):
        start, *later = [call[kind] for call in part]
        changed = [{k for k in range(20) if not (torch.equal(a[k], b[k]) if kind == 0 else a[k] == b[k])} for a, b in ((start, v) for v in later)]
        assert [len(c) for c in changed] == [5, 10, 15, 20] and all(a < b for a, b in zip(changed, changed[1:]))


def test_verdicts_of_metrics_with_known_manners(ruler):
    images, items = world(64, 32, 32)
    reference = [i.key for i in items]
    said = calibration.monotonic(calibration.grade(reference, images, items, samples=64, repeats=4)).set_index(["metric", "damage"]).verdict
    assert (said["background"] == "does not notice").all()
    assert said["duplicates", "mode drop"] == "notices" and said["duplicates", "wrong captions"] == "does not notice"
    assert said["KID[x]", "blur"] == "notices" and said["KID[x]", "wrong captions"] == "does not notice"


def frame(metric, *repeats, strengths=calibration.STRENGTHS):
    return pd.DataFrame([(metric, "d", s, r, float(v)) for r, values in enumerate(repeats) for s, v in zip(strengths, values)],
                        columns=["metric", "damage", "strength", "repeat", "value"])


def steady(*means, repeats=6, sd=0.01, seed=0):
    return np.array(means) + sd * np.random.default_rng(seed).normal(size=(repeats, len(means)))


@pytest.mark.parametrize("means, verdict, why", [
    ((0, 1, 2, 3, 4), "notices", ""),
    ((0, 0, 0, 0, 0), "does not notice", ""),
    ((4, 3, 2, 1, 0), "not monotonic", "better between 0 and 0.25, 0.25 and 0.5, 0.5 and 0.75, 0.75 and 1"),
    ((0, 1, 2, 1.5, 4), "not monotonic", "better between 0.5 and 0.75"),
    ((0, 1, 2, 3, 3), "not monotonic", "cannot tell 0.75 and 1"),
    ((0, 1, 0.5, 3, 3), "not monotonic", "better between 0.25 and 0.5; cannot tell 0.75 and 1"),
])
def test_verdict_and_reason(means, verdict, why):
    worse, better = steady(*means), -steady(*means)
    for metric, values in (("FD[x]", worse), ("style[x]", better)):      # for a share, more is better
        row = calibration.monotonic(frame(metric, *values)).iloc[0]
        assert (row.verdict, row.why) == (verdict, why)
        assert row.change == pytest.approx(means[-1] - means[0], abs=0.03)


def test_small_steps_that_add_up_are_not_nothing():
    "No single step stands out of its noise, but the whole way does."
    drift = np.array([[0, 3, -1, 4, 3], [0, -1, 4, 0, 3.1], [0, 4, 3, 1, 2.9], [0, 0, 1, 3, 3.05]])
    row = calibration.monotonic(frame("KID[x]", *drift)).iloc[0]
    assert row.verdict == "not monotonic" and row.why.startswith("cannot tell 0 and 0.25, 0.25 and 0.5")


def test_rho_is_that_of_all_measurements():
    from scipy.stats import spearmanr
    values = steady(0, 1, 2, 1.5, 4, sd=0.8)
    table = frame("KID[x]", *values)
    assert calibration.monotonic(table).rho[0] == pytest.approx(spearmanr(table.strength, table.value).statistic)
    assert calibration.monotonic(table.assign(metric="style[x]")).rho[0] == pytest.approx(-spearmanr(table.strength, table.value).statistic)
    assert calibration.monotonic(table.assign(value=1.0)).rho[0] == 0


def test_chance_rarely_makes_a_verdict():
    "A metric that is pure noise 'does not notice', about 95 times in a hundred."
    tables = [frame("KID[x]", *steady(0, 0, 0, 0, 0, repeats=8, sd=1, seed=s)).assign(damage=f"d{s}") for s in range(200)]
    said = calibration.monotonic(pd.concat(tables)).verdict
    assert 0.90 <= (said == "does not notice").mean() <= 0.995 and not (said == "notices").any()


def test_one_repeat_is_no_verdict():
    with pytest.raises(metrics.MetricError, match="two repeats at least"):
        calibration.monotonic(frame("KID[x]", (0, 1, 2, 3, 4)))


# --- spread

def test_spread_is_that_of_a_fresh_draw(monkeypatch):
    "Means of n draws without replacement from a finite pool; the correction gives sigma / sqrt(n)."
    values = torch.randn(400, generator=stream(1))
    images = values.view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    monkeypatch.setattr(metrics, "evaluate", lambda s, items, reference, batch=None, seen=None: {"KID": s[:, 0, 0, 0].mean().item()})
    table = calibration.spread(None, images, list(range(400)), (16, 200, 201), draws=600).set_index("n")
    assert list(table.index) == [16, 200]                                # more than half says nothing
    for n in (16, 200):
        assert table.sd[n] == pytest.approx(values.std().item() / n**0.5, rel=0.12)
        assert table["mean"][n] == pytest.approx(values.mean().item(), abs=0.05)


def test_seed_spread_pools_variances(tmp_path):
    rng, truth = np.random.default_rng(0), []
    for variant, count in (("a", 3), ("b", 2), ("lonely", 1)):
        values = rng.normal(size=count)
        truth += [(values.var(ddof=1) * (count - 1), count - 1)] if count > 1 else []
        for seed, value in enumerate(values):
            write_json(tmp_path / "records" / f"{variant}-s{seed}.json", {"variant": variant, "metrics": {"KID": value}})
    total, free = np.sum(truth, 0)
    assert calibration.seed_spread(tmp_path) == {"KID": pytest.approx(math.sqrt(total / free))}
    assert calibration.seed_spread(tmp_path / "nothing") == {}


# --- the table on disk

def write(folder, text):
    path = folder / "published" / "calibration" / "calibration.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_known_reads_what_is_there(tmp_path):
    assert calibration.known(tmp_path) is None
    write(tmp_path, "metric,damage,verdict,rho,change,why\nKID[x],blur,notices,1,2.5,\nKID[x],noise,not monotonic,.5,1,cannot tell 0 and 1\n")
    found = calibration.known(tmp_path)
    assert list(found.verdict) == ["notices", "not monotonic"] and list(found.why) == ["", "cannot tell 0 and 1"]
    calibration.known(str(tmp_path))


@pytest.mark.parametrize("text, words", [
    ("", "cannot be read"),
    ("metric,damage\nKID,blur\n", "no column 'verdict'; its columns are metric, damage"),
    ("metric,damage,verdict\nKID,blur,notices\nKID,noise,maybe\n", "line 3: verdict 'maybe'; there are notices"),
    ("metric,damage,verdict\nKID,blur,\n", "line 2: verdict ''"),
    ('metric,damage,verdict\n"KID,blur', "cannot be read"),
    ("a,b\n1,2,3,4\n1\n", "no column 'metric'"),
])
def test_a_malformed_table_is_one_clear_error(tmp_path, text, words):
    path = write(tmp_path, text)
    with pytest.raises(calibration.CalibrationError, match="calibration.csv") as error:
        calibration.known(tmp_path)
    assert words in str(error.value) and str(path) in str(error.value)


def test_binary_rubbish(tmp_path):
    write(tmp_path, "").write_bytes(bytes(range(256)) * 4)
    with pytest.raises(calibration.CalibrationError, match="calibration.csv"):
        calibration.known(tmp_path)


def test_the_published_calibration_is_of_these_metrics():
    "What the repository holds can be read, names metrics that exist, and has a verdict for each damage."
    from pathlib import Path
    found = calibration.known(Path(__file__).parents[1] / "outputs")
    if found is None:
        pytest.skip("not published yet")
    assert set(found.damage) == set(calibration.DAMAGES) and (found.groupby("metric").size() == 5).all()
    for metric in found.metric:
        metrics.higher_is_better(metric)
    rows = found.set_index(["metric", "damage"]).verdict
    assert (rows[[i for i in rows.index if i[0].startswith("KID") and i[1] == "wrong captions"]] == "does not notice").all()


# --- with the real metrics

def test_features_seen_before_are_not_computed_again(monkeypatch):
    from prx_nb.core.data import Split
    from prx_nb.core.images import Images
    g = np.random.default_rng(0)
    pixels = g.integers(0, 255, (16, 24, 24, 3), dtype=np.uint8)
    items = [replace(i, key=f"k{n}", style=("s", "t")[n % 2]) for n, i in enumerate(world(16, 8, 4)[1])]
    images = Images(pixels, items, f"test-calibration-{g.integers(1 << 60)}", [], "")
    index = torch.arange(16)
    encoder = metrics.load_vision_encoder("effnet-lite0", size=32, device="cpu")
    monkeypatch.setattr(metrics, "pooled_features", lambda e, im, i, taps, progress=False: {t: v for t, v in e.means(im.batch(i), taps).items()})
    reference = metrics.Reference(images, Split(index[:8], index[8:], index[:0]), encoder)
    met, means = [], encoder.means
    monkeypatch.setattr(type(encoder), "means", lambda self, x, taps: met.append(len(x)) or means(x, taps))
    real, seen = images.batch(index[8:]), {}
    first = metrics.evaluate(real, items[8:], reference, seen=seen)
    assert met == [8] and len(seen) == 8
    order = torch.randperm(8, generator=stream())
    shuffled = metrics.evaluate(real[order], [items[8:][k] for k in order], reference, seen=seen)
    assert met == [8]
    for name, value in first.items():                                    # KID draws subsets by position
        assert shuffled[name] == pytest.approx(value, rel=1e-4, abs=1e-6)
    copies = metrics.evaluate(real[[0, 0, 1, 1]], [items[8 + k] for k in (0, 0, 1, 1)], reference)
    assert met == [8, 2] and copies["duplicates"] == 0.5
    metrics.evaluate(-real, items[8:], reference, seen=seen)
    assert met == [8, 2, 8] and len(seen) == 16
