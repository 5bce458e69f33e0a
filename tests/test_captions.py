"""prx_nb.core.captions: what must survive truncation, determinism, given captions."""
import pytest

from prx_nb.core import emoji
from prx_nb.core.captions import KINDS, caption, choices
from prx_nb.core.images import Item
from prx_nb.core.recipe import Data


@pytest.fixture(scope="module")
def items():
    "Every emoji in every style and tone, without drawing them."
    return [Item(**j["item"] | {"tags": tuple(j["item"]["tags"]), "facts": {"colours": [("red", 1.0)], "fill": 0.2, "centre": (0.2, 0.5)}})
            for j in emoji.emoji_jobs(Data(skin_tones=True))[0]]


def test_style_ground_and_label_survive_24_word_pieces(items):
    from prx_nb.core.text import load_text_encoder
    tokenizer = load_text_encoder("static").tokenizer
    items = [i for n, i in enumerate(items) if n % 5 == 0 or len(i.label) > 50]
    for kind in ("long", "dense"):
        kept = tokenizer([caption(i, kind) for i in items], truncation=True, max_length=24)["input_ids"]
        for item, text in zip(items, tokenizer.batch_decode(kept, skip_special_tokens=True)):
            squeeze = lambda s: "".join(s.lower().split())
            label = item.label.replace(" skin tone, ", ", ").replace("medium-", "medium ")
            head = tokenizer.decode(tokenizer(f"{item.style} on {item.background}: {label}")["input_ids"], skip_special_tokens=True)
            assert squeeze(text).startswith(squeeze(head)), (text, head)


def test_captions_hold_what_they_claim(items):
    for item in items[::37]:
        short, long, dense = choices(item, "mixed")
        assert short == item.label and long.startswith(f"{item.style} on {item.background}: ")
        assert "red, small, on the left" in dense and item.group in long and len(short) < len(long) < len(dense)
        assert choices(item, "long") == [long] and caption(item, "long") == long
        assert all(text.strip() == text and text.isprintable() and "; ;" not in text for text in (short, long, dense))


def test_long_captions_tell_images_apart(items):
    texts = {caption(i, "long") for i in items}
    assert len(texts) > 0.99 * len(items)


def test_given_captions_are_kept_word_for_word():
    text = "Ein Käfer auf einem Blatt. Im Hintergrund Regen – 雨."
    item = Item("a", "a", label="file 1", caption=text, facts={"colours": [("green", 0.5)]})
    assert caption(item, "long") == text and caption(item, "short") == "Ein Käfer auf einem Blatt"
    assert caption(item, "dense") == text, "colours are added only when they are asked for"
    assert caption(item, "measured").startswith(text[:-1]) and caption(item, "measured").endswith("green")
    assert len(caption(Item("a", "a", caption="word " * 50), "short").split()) == 10
    assert caption(Item("a", "a", caption="..."), "short") == "..."


def test_items_with_little_known():
    bare = Item("a", "a", label="lake")
    assert choices(bare, "mixed") == ["lake", "lake", "lake"]
    assert caption(Item("a", "a", "photo", "lake"), "long") == "photo: lake"


def test_unknown_kind():
    for kind in ("medium", "mixed", ""):
        with pytest.raises(ValueError, match="short, long, dense"):
            caption(Item("a", "a", label="x"), kind)
    assert KINDS == ("short", "long", "dense")
