"Text states against transformers' own forward pass, and what happens when a cache is interrupted or damaged."
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from prx_nb.core import files, text

TEXTS = ["a red apple", "the quick brown fox jumps over the lazy dog and runs on and on", "", "flag: Switzerland"]


@pytest.fixture(scope="session")
def l6():
    return text.load_text_encoder("minilm-l6", "cpu")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    "An empty cache folder that still finds the fetched packages."
    packages = files.cache_dir("packages")
    monkeypatch.setenv("PRX_NB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    os.symlink(packages, tmp_path / "cache" / "packages")
    return tmp_path / "cache"


def wordlevel(folder, **marks):
    "A tiny word tokenizer saved the transformers way, padding on the left to be awkward."
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    words = ["<pad>", "<eos>", "<unk>", *sorted({w for t in TEXTS for w in t.replace(":", " :").split()})]
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    if marks.pop("end", False):
        tok.post_processor = processors.TemplateProcessing("$A <eos>", special_tokens=[("<eos>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", padding_side="left")
    fast.save_pretrained(folder)
    return fast


def tiny(kind):
    "A tiny random model of a class that people use to condition images; returns (model, its encoder, ends with a mark)."
    import transformers as tr
    torch.manual_seed(0)
    small = dict(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    if kind == "t5":
        model = tr.T5ForConditionalGeneration(tr.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2))
        return model, model.encoder, True
    if kind == "t5gemma":
        part = dict(**small, num_key_value_heads=1, head_dim=8, sliding_window=64)
        config = tr.T5GemmaConfig(encoder=part, decoder=part, vocab_size=40)
        model = tr.T5GemmaForConditionalGeneration(config)
        return model, model.model.encoder, False
    if kind == "qwen3":
        model = tr.Qwen3ForCausalLM(tr.Qwen3Config(**small, num_key_value_heads=1, head_dim=8))
        return model, model.model, False
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
    model = tr.CLIPModel(tr.CLIPConfig(text_config=dict(**small, max_position_embeddings=12, eos_token_id=1), vision_config=vision))
    return model, model.text_model, True


def test_l6_equals_transformers(l6):
    pt = l6.tokenizer(TEXTS, padding="max_length", max_length=10, truncation=True, return_tensors="pt")
    with torch.no_grad():
        theirs = l6.model(**pt).last_hidden_state
    states, mask = l6.encode(TEXTS, 10, batch=2)
    assert torch.equal(mask, pt["attention_mask"].bool()) and mask.dtype == torch.bool and states.dtype == torch.float32
    torch.testing.assert_close(states[mask], theirs[mask], rtol=1e-4, atol=1e-5)
    assert not states[~mask].any() and not states.requires_grad
    assert (mask.long().diff(dim=1) <= 0).all()                       # padding on the right


def test_l3_loads_every_weight_and_knows_meaning():
    l3 = text.load_text_encoder("minilm-l3", "cpu")
    pooled = torch.stack([s.mean(0) for s in l3.ragged(["a man eats food", "someone is eating a meal", "stock prices fell"], 16)])
    a, b, c = torch.nn.functional.normalize(pooled, dim=-1)
    assert a @ b > 0.6 > 0.3 > a @ c


def test_static_is_a_table(l6):
    static = text.load_text_encoder("static", "cpu")
    table = l6.model.get_input_embeddings().weight
    ids = static.tokenize(["red apple"], 8)[0]
    rows = static.ragged(["red apple"], 8)[0]
    ratio = rows / table[ids]
    torch.testing.assert_close(ratio, torch.full_like(ratio, ratio[0, 0].item()), rtol=1e-3, atol=0)   # one factor for all


@pytest.mark.parametrize("kind", ["t5", "t5gemma", "qwen3", "clip"])
def test_any_transformers_model(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, part, end = tiny(kind)
    model.eval().save_pretrained(tmp_path)
    tokenizer = wordlevel(tmp_path, end=end)
    encoder = text.load_text_encoder(str(tmp_path), "cpu")
    states, mask = encoder.encode(TEXTS, 8, batch=3)
    assert encoder.dim == 16 and states.shape == (4, 8, 16)
    assert sum(p.numel() for p in encoder.model.parameters()) < sum(p.numel() for p in model.parameters()) or kind == "qwen3"
    for i, words in enumerate(TEXTS):
        ids = tokenizer(words, truncation=True, max_length=8, return_tensors="pt")["input_ids"].long()
        if ids.numel() == 0:
            ids = torch.tensor([[tokenizer.eos_token_id]])
        with torch.no_grad():
            theirs = part(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        assert mask[i].sum() == len(theirs)
        torch.testing.assert_close(states[i, :len(theirs)], theirs, rtol=1e-4, atol=1e-5)
    again = text.encoder_key(str(tmp_path))
    assert again == encoder.key
    torch.nn.init.normal_(next(model.parameters()))
    model.save_pretrained(tmp_path)
    assert text.encoder_key(str(tmp_path)) != again                    # other weights, other key


def test_positions_run_out(tmp_path):
    model, _, end = tiny("clip")
    model.save_pretrained(tmp_path)
    wordlevel(tmp_path, end=end)
    _, mask = text.load_text_encoder(str(tmp_path), "cpu").encode([" ".join(["fox"] * 30)], 20)
    assert mask.sum() == 12                                            # CLIP has 12 positions here


def test_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, words in {"minilm-l7": "did you mean 'minilm-l6'", "nobody/nothing": "nobody/nothing", str(tmp_path): "config.json",
                        "../no where": "allowed: minilm-l6", "": "allowed"}.items():
        for call in (text.encoder_key, text.load_text_encoder, lambda n: text.text_states(n, ["a"], 8)):
            with pytest.raises(text.TextError, match=words):
                call(name)


def test_cache_equals_encoding(l6, own_cache, monkeypatch):
    monkeypatch.setattr(text, "SHARD", 2)
    states = text.text_states("minilm-l6", TEXTS, 10, progress=False)
    fresh, mask = l6.encode([*TEXTS, "a red apple"], 10)
    kept, same = states.lookup([*TEXTS, "a red apple"])
    assert torch.equal(mask, same) and kept.dtype == torch.float32 and states.dim == 384
    torch.testing.assert_close(kept, fresh, rtol=2**-10, atol=1e-4)
    rows = states.rows(TEXTS)
    assert torch.equal(states.gather(rows.flip(0))[0], kept[:4].flip(0))
    null, null_mask = states.null(3)
    assert null.shape == (3, 10, 384) and torch.equal(null[2], kept[2]) and null_mask.sum().item() == 6
    with pytest.raises(text.TextError, match="never said"):
        states.lookup(["never said"])

    def refuse(*_):
        raise AssertionError("the encoder was loaded although all is cached")
    monkeypatch.setattr(text, "load_text_encoder", refuse)
    assert len(text.text_states("minilm-l6", TEXTS[::-1], 10, progress=False)) == 4
    with pytest.raises(AssertionError, match="was loaded"):            # another length is another state
        text.text_states("minilm-l6", TEXTS, 11, progress=False)


def test_only_what_is_missing(own_cache, monkeypatch):
    text.text_states("static", TEXTS, 10, progress=False)
    seen, real = [], text.TextEncoder.ragged
    monkeypatch.setattr(text.TextEncoder, "ragged", lambda self, t, *a: seen.extend(t) or real(self, t, *a))
    states = text.text_states("static", [*TEXTS, "new", "new"], 10, progress=False)
    assert [t for t in seen if t] == ["new"] and len(states) == 5


def test_pack_is_looked_at_first(own_cache, tmp_path, monkeypatch):
    from safetensors.torch import save_file
    states = text.text_states("static", TEXTS, 10, progress=False)
    tensors, meta = states.export(TEXTS[:2])
    save_file({**tensors, "images": torch.zeros(3)}, tmp_path / "pack.safetensors", {**meta, "other": "1"})
    monkeypatch.setattr(text, "encoder_key", lambda name: pytest.fail("looked beyond the pack"))
    packed = text.text_states("static", TEXTS[:2], 10, pack=tmp_path / "pack.safetensors")
    assert len(packed) == 3 and torch.equal(packed.lookup(TEXTS[:2])[0], states.lookup(TEXTS[:2])[0])


def test_damaged_shard_is_named(own_cache):
    text.text_states("static", TEXTS, 10, progress=False)
    shard, = own_cache.glob("text/*/*.safetensors")
    whole = shard.read_bytes()
    middle = len(whole) // 2                                           # inside the states
    for damaged in (whole[:-100], whole[:5], whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1:]):
        shard.write_bytes(damaged)
        with pytest.raises(text.TextError, match=shard.name):
            text.text_states("static", TEXTS, 10, progress=False)
    shard.unlink()
    assert len(text.text_states("static", TEXTS, 10, progress=False)) == 4


CHILD = """
import time
from prx_nb.core import text
text.SHARD = 8
real = text.TextEncoder.ragged
def slow(self, *a):
    time.sleep(0.2)
    return real(self, *a)
text.TextEncoder.ragged = slow
text.text_states("static", [f"caption number {i}" for i in range(400)], 10, progress=False)
"""


def test_killed_while_caching(own_cache, monkeypatch):
    child = subprocess.Popen([sys.executable, "-c", CHILD], env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
    try:
        deadline = time.monotonic() + 60
        while len(list(own_cache.glob("text/*/*.safetensors"))) < 3 and time.monotonic() < deadline and child.poll() is None:
            time.sleep(0.05)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    done = len(list(own_cache.glob("text/*/*.safetensors")))
    assert 3 <= done < 51
    seen, real = [], text.TextEncoder.ragged
    monkeypatch.setattr(text.TextEncoder, "ragged", lambda self, t, *a: seen.extend(t) or real(self, t, *a))
    texts = [f"caption number {i}" for i in range(400)]
    states = text.text_states("static", texts, 10, progress=False)
    assert len([t for t in seen if t]) == 401 - 8 * done               # every whole shard was used ("" is in the first)
    assert torch.isfinite(states.lookup(texts)[0]).all()
    assert len(text.text_states("static", texts, 10, progress=False)) == 401
