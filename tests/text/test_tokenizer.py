"""CLIP tokenizer: equal on every recorded string, for the real vocabulary and the tiny ones."""

import json
import shutil

import pytest
from util import GOLDEN, TINY

from nanodiff.config import UserError
from nanodiff.text import tokenizer
from nanodiff.text.tokenizer import END, CLIPTokenizer, T5Tokenizer, TextTokenizer, clip_from_merges, train_bpe

STRINGS = json.loads((GOLDEN / "goldens" / "tokenizers.json").read_text())
REAL = json.loads((GOLDEN / "tokenizers" / "tokenizer_goldens.json").read_text())


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The real 49,408-entry tokenizer, through the files of a Hub folder."""
    folder = tmp_path_factory.mktemp("clip")
    clip_from_merges(END, 77).save(folder)
    return CLIPTokenizer.load(folder)


def test_special_ids(clip):
    assert (clip.bos, clip.eos, clip.pad, clip.length) == (49406, 49407, 49407, 77)


@pytest.mark.parametrize("case", REAL["goldens"], ids=lambda c: ascii(c["text"][:20]))
def test_real_vocabulary(clip, case):
    assert clip.pieces(case["text"]) == case["ids"]
    assert clip([case["text"]])[0] == case["ids77"]


@pytest.mark.parametrize("case", REAL["decode"], ids=lambda c: ascii(c["text"][:20]))
def test_decode(clip, case):
    assert clip.decode(case["ids"]) == case["text"]


@pytest.mark.parametrize("name", ["clip_full", "tiny/sd15/tokenizer", "tiny/sdxl/tokenizer_2"])
def test_recorded_strings(clip, name):
    tokenizer = clip if name == "clip_full" else CLIPTokenizer.load(GOLDEN / name)
    for text, ids in zip(STRINGS["strings"], STRINGS["ids"][name], strict=True):
        assert [tokenizer.bos, *tokenizer.pieces(text), tokenizer.eos] == ids, text


def test_t5(tmp_path):
    tokenizer = T5Tokenizer.load(TINY / "sd35-medium" / "tokenizer_3")
    for text, ids in zip(STRINGS["strings"], STRINGS["ids"]["tiny/sd35-medium/tokenizer_3"], strict=True):
        assert [*tokenizer.pieces(text), tokenizer.eos] == ids, text
    tokenizer.save(tmp_path / "copy")
    assert T5Tokenizer.load(tmp_path / "copy")(STRINGS["strings"], 20) == tokenizer(STRINGS["strings"], 20)
    assert len(tokenizer(["word " * 50], 16)[0]) == 16 and tokenizer(["word " * 50], 16)[0][-1] == tokenizer.eos
    assert tokenizer.overflow("a photo of a corgi", 3) != "" == tokenizer.overflow("a", 3)


def test_t5_needs_tokenizer_json(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        T5Tokenizer.load(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"")
    with pytest.raises(UserError, match=r"spiece\.model"):
        T5Tokenizer.load(tmp_path)


def test_pad_rules():
    """SD 1.x pads with the end token, SD 2.1 with `!`: special_tokens_map.json wins over tokenizer_config.json."""
    sd1, sd2, turbo = (CLIPTokenizer.load(TINY / n / "tokenizer") for n in ("sd15", "sd21-v", "sd-turbo"))
    assert sd1.pad == sd1.eos and sd2.pad == turbo.pad == sd2.backend.token_to_id("!") == 0


def test_cut_keeps_the_end_and_overflow_says_what_went(clip):
    row = clip(["word " * 100])[0]
    assert len(row) == 77 and row[-1] == clip.eos
    assert clip.overflow("a cat") == ""
    assert clip.overflow("word " * 75 + "the end") == "the end"


def test_tokenizer_json_gives_the_same(clip, tmp_path):
    clip.backend.save(str(tmp_path / "tokenizer.json"))
    again = CLIPTokenizer.load(tmp_path)
    for case in REAL["goldens"][:30]:
        assert again.pieces(case["text"]) == case["ids"]


def test_save_and_load(tmp_path):
    tokenizer = CLIPTokenizer.load(TINY / "sd21-v" / "tokenizer")
    tokenizer.save(tmp_path)
    again = CLIPTokenizer.load(tmp_path)
    assert again(STRINGS["strings"]) == tokenizer(STRINGS["strings"])


def test_faults(tmp_path):
    with pytest.raises(UserError, match="no tokenizer"):
        CLIPTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer file"):
        CLIPTokenizer.load(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0}))
    (tmp_path / "merges.txt").write_text("b c\n")
    with pytest.raises(UserError, match="do not belong together"):
        CLIPTokenizer.load(tmp_path)
    (tmp_path / "vocab.json").write_text("[]")
    with pytest.raises(UserError, match=r"vocab\.json"):
        CLIPTokenizer.load(tmp_path)


def test_learned_vocabulary():
    texts = ["red apple", "green apple", "red heart", "Élan 日本"]
    a, b = train_bpe(texts, 540, 8), train_bpe(reversed(texts), 540, 8)
    assert a(texts) == b(texts), "a function of the set of texts"
    assert [a.decode(a.pieces(t)) for t in texts] == ["red apple", "green apple", "red heart", "élan 日本"]
    assert a.decode(a.pieces("never seen 🙂")) == "never seen 🙂"
    assert all(len(row) == 8 for row in a(texts))
    assert len(a.pieces("apple")) < 5, "frequent words become few pieces"


def test_a_learned_text_tokenizer(tmp_path):
    """Byte pairs from a few texts; any text comes back, in lower case, also one that it has not seen; written and read again."""
    from types import SimpleNamespace

    tok, end = TextTokenizer.learned(["red apple", "red pear", "piñata 🍎"], 560)
    assert end == tok.backend.token_to_id(END) and tok.begin != end
    for text in ("red apple", "Piñata", "🍎 green, grün", "zebra's 42"):
        assert "".join(tok.decode(tok.ids(text)).split()) == "".join(text.lower().split()), text
    assert len(tok.ids("red apple", begin=False)) < len(tok.ids("xqz vwk", begin=False))
    assert tok.ids("red apple")[0] == tok.begin and tok.decode([]) == ""
    tok.save(tmp_path)
    again = TextTokenizer.load(tmp_path, SimpleNamespace(vocab_size=600, bos_token_id=tok.begin))
    assert again.ids("red apple piñata") == tok.ids("red apple piñata") and again.decode(
        tok.ids("piñata")
    ) == tok.decode(tok.ids("piñata"))


@pytest.mark.parametrize("name", ["sd21-v/tokenizer", "sdxl/tokenizer_2", "gemma3"])
def test_what_the_last_call_left_in_tokenizer_json_is_no_part_of_it(tmp_path, name):
    """transformers >= 5 saves a tokenizer with the padding and the length of the call before, and sets both anew at each call."""
    folder = shutil.copytree(TINY / name, tmp_path / "tokenizer")
    texts = ["a red apple", "a", "a photo of an astronaut riding a horse, a cat and a dog"]

    def made():
        if name == "gemma3":
            found = TextTokenizer(tokenizer._from_json(folder / "tokenizer.json"))
            return [found.ids(text) for text in texts], found.backend
        found = CLIPTokenizer.load(folder, 77)
        return [found([text])[0] for text in texts] + [found.pieces(text) for text in texts], found.backend

    before, backend = made()
    backend.enable_truncation(6)
    backend.enable_padding(length=77, pad_id=0)
    backend.save(str(folder / "tokenizer.json"))
    assert made()[0] == before
