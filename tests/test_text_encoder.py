"Layers of frozen encoders against hooks and shortened networks, words that are learnt, and one word changed."
import copy

import numpy as np
import pytest
import torch
from runs import Stops
from test_text import TEXTS, own_cache, tiny, wordlevel  # noqa: F401

from prx_nb.choices import text_encoder as choice
from prx_nb.core import batch, captions, interop, text
from prx_nb.core.denoiser import PRX, WORDS
from prx_nb.core.images import PALETTE, Item
from prx_nb.core.recipe import RecipeError, preset
from prx_nb.core.seeds import stream
from prx_nb.core.train import Run, train
from prx_nb.lab import ablations

SMALL = dict(in_channels=3, patch_size=4, context_in_dim=24, hidden_size=32, num_heads=2, depth=2)
SMOKE = preset("smoke").replace({"train.steps": 4, "train.checkpoint_every": 2})


def layers_of(part):
    "The layers of an encoder, wherever its class keeps them."
    return next(m for m in part.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2)


@pytest.mark.parametrize("kind", ["t5", "t5gemma", "qwen3", "clip"])
def test_an_inner_layer_of_a_hub_encoder_is_what_that_layer_hands_on(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, part, end = tiny(kind)
    model.eval().save_pretrained(tmp_path)
    wordlevel(tmp_path, end=end)
    seen, first = [], layers_of(part)[0]
    last, inner = (text.load_text_encoder(str(tmp_path), "cpu", layer) for layer in (None, 1))
    assert len({last.key, inner.key, text.encoder_key(str(tmp_path), "mean")}) == 3 and inner.dim == 16
    states, mask = inner.encode(TEXTS[:1], 8)
    first.register_forward_hook(lambda module, given, out: seen.append(out[0] if isinstance(out, tuple) else out))
    ids = torch.tensor(inner.tokenize(TEXTS[:1], 8))
    with torch.no_grad():
        part(input_ids=ids, attention_mask=torch.ones_like(ids))
    torch.testing.assert_close(states[mask], seen[0][0], rtol=1e-4, atol=1e-5)
    assert not states.allclose(last.encode(TEXTS[:1], 8)[0])
    with pytest.raises(text.TextError, match="text.layer = 3: this text encoder has hidden states 0 to 2"):
        text.load_text_encoder(str(tmp_path), "cpu", 3)


def test_layer_three_is_the_encoder_cut_off_after_three():
    inner = text.load_text_encoder("minilm-l6", "cpu", 3)
    short = copy.deepcopy(inner.model)
    short.encoder.layer = short.encoder.layer[:3]
    cut = text.TextEncoder("cut", "0", short, inner.tokenizer)
    for a, b in zip(inner.ragged(TEXTS, 12), cut.ragged(TEXTS, 12)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_layers_are_never_mixed_up_on_disk_or_in_a_pack(own_cache, tmp_path):  # noqa: F811
    from safetensors.torch import save_file
    found = {layer: text.text_states("static", TEXTS[:2], 8, False, layer=layer) for layer in (None, 0)}
    assert len({s.key for s in found.values()}) == 2 == len(list((own_cache / "text").iterdir()))
    tensors, meta = found[0].export(TEXTS[:2])
    save_file(tensors, tmp_path / "of.pack", meta)
    assert text._in_pack(tmp_path / "of.pack", text._named("static", 0), 8) == found[0].key
    assert text._in_pack(tmp_path / "of.pack", "static", 8) is None is text._in_pack(tmp_path / "of.pack", text._named("static", 1), 8)


def test_a_learnt_table_is_the_frozen_network_given_that_table():
    net = PRX(**SMALL, words="table").initialise(stream(3, "w"))
    for p in net.parameters():
        p.data.normal_(0, 0.3, generator=stream(0, "p", p.numel()))
    plain = PRX(**SMALL)
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("words.")}, strict=True)
    digits, mask = text.load_text_encoder("pieces", "cpu").encode(TEXTS[:3], 9)
    ids = text.load_text_encoder("static", "cpu").tokenize(TEXTS[:3], 9)
    rows = torch.zeros(3, 9, 24)
    for n, row in enumerate(ids):
        rows[n, :len(row)] = net.words.table.weight[row]
    x, t = torch.randn(3, 3, 8, 8, generator=stream(0, "x")), torch.rand(3, generator=stream(0, "t"))
    torch.testing.assert_close(net(x, t, digits, mask).prediction, plain(x, t, rows, mask).prediction)


@pytest.mark.parametrize("words, order", [("table", False), ("transformer", True)])
def test_only_words_with_positions_know_the_order(words, order):
    net = PRX(**SMALL, words=words)
    for p in net.parameters():
        p.data.normal_(0, 0.3, generator=stream(0, "p", p.numel()))
    a, b = (text.load_text_encoder("pieces", "cpu").encode([s], 9) for s in ("a red square on blue", "a blue square on red"))
    x, t = torch.randn(1, 3, 8, 8, generator=stream(0, "x")), torch.tensor([0.5])
    assert net(x, t, *a).prediction.allclose(net(x, t, *b).prediction, atol=1e-5) != order


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    r = SMOKE.replace({"text.encoder": "pieces", "denoiser.words": "transformer", "denoiser.context_in_dim": 24})
    prepared = batch.prepare(r, progress=False)
    return r, prepared, train(r, tmp_path_factory.mktemp("whole"), progress=False, prepared=prepared, device="cpu")


def test_words_are_trained_averaged_kept_and_drawn_with(learnt):
    r, prepared, run = learnt
    fresh = PRX(**r.denoiser.model_dump()).initialise(stream(r.seed, "weights")).words
    moved = (run.model.words.table.weight - fresh.table.weight).abs().amax(1) > 0
    tokenize = text.load_text_encoder("pieces", "cpu").tokenize
    said = {n for ids in tokenize([t for rows in prepared.texts for t in rows], r.text.tokens) for n in ids}
    assert moved.any() and set(moved.nonzero().flatten().tolist()) <= said | {0, 101, 102}, "only what was said, and the marks"
    again = Run.load(run.dir)
    assert all(v.equal(run.model.state_dict()[k]) for k, v in again.model.state_dict().items())
    assert again.sample("a red apple").images.equal(run.sample("a red apple").images)


def test_words_go_on_to_the_bit(learnt, tmp_path):
    r, prepared, run = learnt
    with pytest.raises(KeyboardInterrupt):
        train(r, tmp_path, progress=False, prepared=prepared, device="cpu", techniques=[Stops(3)])
    halves = train(r, tmp_path, progress=False, prepared=prepared, device="cpu")
    assert all(v.equal(run.model.state_dict()[k]) for k, v in halves.model.state_dict().items())


def test_what_cannot_go_together_is_said(learnt, tmp_path):
    r, _, run = learnt
    with pytest.raises(RecipeError, match="text.encoder = 'pieces' gives the numbers of word pieces and no states; set denoiser.words"):
        SMOKE.replace("text.encoder", "pieces")
    with pytest.raises(RecipeError, match="denoiser.words = 'table' with text.encoder = 'static'"):
        SMOKE.replace("denoiser.words", "table")
    with pytest.raises(RecipeError, match="did you mean 'table'"):
        r.replace("denoiser.words", "tabel")
    model, _, end = tiny("t5")
    model.save_pretrained(tmp_path)
    wordlevel(tmp_path, end=end)
    with pytest.raises(text.TextError, match="gives 16 numbers a token, but denoiser.words = 'transformer' takes the 2 of a word piece's number"):
        batch.prepare(r.replace("text.encoder", str(tmp_path)), progress=False)
    with pytest.raises(interop.InteropError, match="denoiser.words = 'transformer' cannot be exported"):
        interop.to_diffusers(run, tmp_path / "out")
    with pytest.raises(interop.InteropError, match="text.layer = 0 cannot be exported"):
        interop.pipeline_for(SMOKE.replace("text.layer", 0))
    assert not (tmp_path / "out").exists()


def test_a_readers_own_words_are_found_by_name():
    WORDS["mine"] = lambda width: torch.nn.Linear(2, width)
    try:
        assert SMOKE.replace({"text.encoder": "pieces", "denoiser.words": "mine"}).denoiser.text_width == 2
    finally:
        del WORDS["mine"]


def item(n, ground, colour):
    return Item(f"noto/{n}", str(n), "noto", f"thing {n}", background=ground, facts={"colours": [(colour, 1.0)], "fill": 0.4})


def painted(items):
    "Pictures of a flat square in the first colour on the ground that each item names."
    pure = {"red": (225, 60, 60), "blue": (42, 111, 214), "green": (62, 155, 62), "yellow": (255, 217, 0)}
    page = np.stack([np.full((32, 32, 3), PALETTE[i.background], np.uint8) for i in items])
    for p, i in zip(page, items):
        p[8:24, 8:24] = pure[choice.fact(i, "colour")]
    return torch.from_numpy(page).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.mark.parametrize("what", ["ground", "colour"])
def test_a_painter_who_listens_follows_and_one_who_does_not_stays(what):
    items = [item(n, g, c) for n, (g, c) in enumerate([("white", "red"), ("grey", "blue"), ("white", "green"), ("purple", "yellow"), ("grey", "red")])]
    found = choice.pairs(items, what)
    assert len(found) == 5
    now = [i for *_, i in found]
    for row, _, new in found:
        assert captions.caption(new, "dense") != captions.caption(items[row], "dense")
    before = choice.away(painted(items), now, what, None)
    assert choice.followed(before, choice.away(painted(now), now, what, None)) > 0.8
    assert choice.followed(before, before) == 0


@pytest.mark.parametrize("variant", ["scratch", "scratch_table", "layer_mean"])
def test_variants_of_the_ablation_train(variant, tmp_path):
    r = ablations.recipe(ablations.get("text_encoder"), variant, "smoke", 0, {"train.steps": 2})
    assert train(r, tmp_path, progress=False, device="cpu").record["status"] == "done"
