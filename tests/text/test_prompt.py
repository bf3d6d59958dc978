"""Prompts: weights and chunks by A1111's rules, learned words equal to the recording; parity when all is off."""

import numpy as np
import pytest
import torch
from util import GOLDEN, TINY, golden, max_error

from nanodiff import pipeline, weights
from nanodiff.config import UserError
from nanodiff.text import prompt
from nanodiff.text.tokenizer import END, clip_from_merges


@pytest.fixture(scope="module")
def clip():
    return clip_from_merges(END, 77)


@pytest.fixture
def sd15():
    return pipeline.load(TINY / "sd15")


# The examples of A1111's own documentation of prompt_parser.parse_prompt_attention, as (text, weight).
A1111 = [
    ("normal text", [("normal text", 1.0)]),
    ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
    ("(unbalanced", [("unbalanced", 1.1)]),
    (r"\(literal\]", [("(literal]", 1.0)]),
    ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
    (
        "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
        [
            ("a ", 1.0),
            ("house", 1.5730000000000004),
            (" ", 1.1),
            ("on", 1.0),
            (" a ", 1.1),
            ("hill", 0.55),
            (", sun, ", 1.1),
            ("sky", 1.4641000000000006),
            (".", 1.1),
        ],
    ),
    ("red: green", [("red: green", 1.0)]),
    ("one BREAK two BREAKER", [("one ", 1.0), ("BREAK", None), (" two BREAKER", 1.0)]),
    ("", []),
]


@pytest.mark.parametrize(("text", "want"), A1111)
def test_weights(text, want):
    got = prompt.weighted_parts(text)
    assert [t for t, _ in got] == [t for t, _ in want]
    assert [w for _, w in got] == pytest.approx([w for _, w in want])


def test_one_chunk_is_what_the_tokenizer_gives(clip):
    """With everything off a prompt becomes exactly the ids that diffusers gives it."""
    for text in ("", "a cat", "word " * 200, "(a:1.2) [b]"):
        ((ids, weights_),) = prompt.chunks(clip, text)
        assert ids == clip([text])[0] and set(weights_) == {1.0}


def test_the_pooled_vector_is_the_first_chunks(sd15):
    """Of a long prompt, and of a short one beside it."""
    tokenizer, model = sd15.tokenizers[0], sd15.encoders[0]
    texts = ["a cat, " * 60, "a dog"]
    states, pooled = prompt.encode_clip(tokenizer, model, texts, lambda states: states[-1], long=True)
    assert states.shape[1] >= 2 * tokenizer.length
    first = torch.tensor([prompt.chunks(tokenizer, text, True, False)[0][0] for text in texts])
    want = model(first)[1]
    assert max_error(pooled, want) < 1e-6 and not torch.allclose(want[0], want[1])


def test_long_prompts_lose_nothing(clip):
    text = " ".join(f"word{i}" for i in range(120))
    rows = prompt.chunks(clip, text, long=True)
    assert len(rows) > 1 and all(len(ids) == 77 == len(w) for ids, w in rows)
    inside = [i for ids, _ in rows for i in ids[1 : ids.index(clip.eos)]]
    assert inside == clip.pieces(text)
    assert prompt.chunks(clip, "a cat", long=True) == prompt.chunks(clip, "a cat")


def test_chunks_end_at_a_near_comma(clip):
    text = "cat " * 60 + "end, " + "dog " * 40
    first, second = (ids[1 : ids.index(clip.eos)] for ids, _ in prompt.chunks(clip, text, long=True))
    assert len(first) == 62 and clip.decode(first).endswith(",") and len(second) == 40
    far = "cat " * 30 + "end, " + "dog " * 70
    first = prompt.chunks(clip, far, long=True)[0][0]
    assert first.index(clip.eos) == 76, "a comma more than 20 tokens back is too far"


def test_where_chunks_end_in_the_web_ui_and_in_comfyui(clip):
    """AUTOMATIC1111's tokenize_line: its comma is one of the last 20 of the 75, and a comma as the next token ends the chunk where it stands. ComfyUI keeps
    parts of one weight of fewer than eight tokens whole, and knows no commas."""

    def lengths(text, weighted=True):
        return [ids.index(clip.eos) - 1 for ids, _ in prompt.chunks(clip, text, True, weighted)]

    def theirs(text):  # the same rule, written as they write it
        chunks, chunk, last = [], [], -1
        for token in clip.pieces(text):
            if token == clip.pieces(",")[-1]:
                last = len(chunk)
            elif len(chunk) == 75 and last != -1 and len(chunk) - last <= 20:
                chunks, chunk, last = [*chunks, chunk[: last + 1]], chunk[last + 1 :], -1
            if len(chunk) == 75:
                chunks, chunk, last = [*chunks, chunk], [], -1
            chunk = [*chunk, token]
        return [len(c) for c in [*chunks, chunk]]

    rng = np.random.default_rng(0)
    for _ in range(300):
        text = " ".join(
            rng.choice(["cat", "dog,", "red", "blue"], p=(0.5, 0.1, 0.2, 0.2)) for _ in range(rng.integers(60, 200))
        )
        assert lengths(text) == theirs(text), text
    assert lengths("cat " * 75 + ", dog") == [75, 2]
    assert lengths("cat " * 60 + "end, " + "dog " * 40, "comfyui") == [75, 27]
    assert lengths("cat " * 73 + "xqzxqz", "comfyui")[0] == 75, "a long part is divided"
    short = clip.pieces("xqzxqz")
    assert 2 < len(short) < 8 and lengths("cat " * 73 + "(xqzxqz:1.2)", "comfyui") == [73, len(short)]


def test_a_weight_may_end_in_its_point_and_a_lone_backslash_is_nothing():
    assert prompt.weighted_parts("(cat:1.)") == [("cat", 1.0)] and prompt.weighted_parts("(cat:.5)") == [("cat", 0.5)]
    assert prompt.weighted_parts("a \\ b \\( c") == [("a  b ( c", 1.0)]


def test_break_begins_a_chunk_and_weights_follow_their_words(clip):
    rows = prompt.chunks(clip, "a (red:1.5) cat BREAK dog", long=True, weighted=True)
    assert len(rows) == 2 and rows[0][1][:5] == [1.0, 1.0, 1.5, 1.0, 1.0]
    assert clip.decode(rows[1][0][1:2]) == "dog"


def test_weigh_keeps_the_mean():
    states = torch.randn(77, 16) + 0.3
    got = prompt.weigh(states, [1.0] * 3 + [1.4] * 2 + [1.0] * 72)
    assert got.mean().item() == pytest.approx(states.mean().item(), rel=1e-4)
    ratio = (got[3] / states[3]).mean() / (got[0] / states[0]).mean()
    assert ratio.item() == pytest.approx(1.4, rel=1e-4)
    assert prompt.weigh(states, [1.0] * 77) is states


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd35-medium"])
def test_pictures_change_with_weights_and_chunks_only(name):
    sd = pipeline.load(TINY / name)
    make = lambda text, **o: sd.generate([text], steps=1, seeds=[0], guidance_scale=3.0, **o).latents  # noqa: E731
    plain = make("a red cat")
    assert max_error(make("a red cat", weighted=True, long_prompts=True), plain) < 1e-5
    assert not torch.allclose(make("a (red:1.5) cat", weighted=True), plain)
    long = "a red cat " * 40
    assert not torch.allclose(make(long, long_prompts=True), make(long))


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd35-medium"])
def test_chunk_counts_of_prompt_and_negative_may_differ(name):
    """The shorter text is filled with the empty prompt; a picture alone is the picture of the batch."""
    sd = pipeline.load(TINY / name)
    long, options = "a red cat " * 40, {"steps": 1, "guidance_scale": 3.0, "long_prompts": True}
    together = sd.generate([long, "a dog"], "blurry", seeds=[0, 1], **options).latents
    assert max_error(together[:1], sd.generate([long], "blurry", seeds=[0], **options).latents) < 1e-4
    filled = sd.generate(["a dog"], long, seeds=[1], **options).latents
    assert torch.isfinite(filled).all()


def test_sdxl_prompts_of_different_length():
    sd = pipeline.load(TINY / "sdxl")
    text = sd.encode([("a cat", "a dog " * 60)], long_prompts=True)
    assert text.states.shape[1] == 3 * 77
    first, _ = sd.clip(0, ["a cat"], 0, True, False)
    assert max_error(text.states[:, :77, : first.shape[-1]], first) < 1e-6


def test_t5_weights(capsys):
    sd = pipeline.load(TINY / "sd35-medium")
    plain = prompt.encode_t5(sd.tokenizers[2], sd.encoders[2], ["a (red:1.5) cat"], 32)
    weighted = prompt.encode_t5(sd.tokenizers[2], sd.encoders[2], ["a (red:1.5) cat"], 32, weighted=True)
    bare = prompt.encode_t5(sd.tokenizers[2], sd.encoders[2], ["a red cat"], 32)
    assert weighted.shape == plain.shape and not torch.allclose(weighted, plain) and not torch.allclose(weighted, bare)


# -- learned words -----------------------------------------------------------------------------------------


def test_a_learned_word_is_the_recording(sd15):
    tensors, facts = golden("sd15.textual_inversion")
    args = facts["args"]
    assert sd15.learn(GOLDEN / "lora" / args["file"]) == "<corgi>"
    ids = torch.tensor(sd15.tokenizer([args["prompt"]]))
    assert torch.equal(ids.clamp(max=999), tensors["input_ids"].clamp(max=999)), "three vectors, three tokens"
    states = sd15.encode_ids(ids)
    assert max_error(states, tensors["last_hidden_state"]) < 1e-5
    got = sd15.generate(
        [args["prompt"]], steps=args["num_inference_steps"], guidance_scale=args["guidance_scale"], seeds=[args["seed"]]
    )
    assert max_error(got.latents, tensors["final_latents"]) < 1e-4


def test_file_forms(sd15, tmp_path):
    vectors = torch.randn(2, 32)
    forms = {
        "emb.safetensors": {"emb_params": vectors},
        "one.safetensors": {"<one>": vectors[0]},
    }
    for name, tensors in forms.items():
        weights.save_tensors(tmp_path / name, tensors)
    torch.save({"string_to_param": {"*": vectors}, "name": "x"}, tmp_path / "old.pt")
    assert sd15.learn(tmp_path / "emb.safetensors") == "emb"
    assert sd15.learn(tmp_path / "one.safetensors") == "<one>"
    with pytest.raises(UserError, match="`allow_pickle`"):
        sd15.learn(tmp_path / "old.pt")
    assert sd15.learn(tmp_path / "old.pt", allow_pickle=True) == "old"
    assert len(sd15.tokenizer.pieces("emb and <one> and old")) == 2 + 1 + 2 + 2 * len(sd15.tokenizer.pieces("and"))


def test_two_encoders_need_two_words(tmp_path):
    sd = pipeline.load(TINY / "sdxl")
    before = sd.encode(["a word"]).states
    weights.save_tensors(tmp_path / "word.safetensors", {"clip_l": torch.randn(2, 32), "clip_g": torch.randn(2, 48)})
    assert sd.learn(tmp_path / "word.safetensors") == "word"
    states, pooled = sd.encode(["a word"])
    assert not torch.allclose(states, before) and torch.isfinite(pooled).all()
    for tokenizer, encoder in zip(sd.tokenizers, sd.encoders, strict=True):
        ids = torch.tensor(tokenizer(["a word"]))
        assert ids.max() >= 1000 and encoder.cfg.eos_token_id == tokenizer.eos, "pooling still finds the end"


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"<x>": torch.randn(2, 31)}, "width 31"),
        ({"<x>": torch.randn(2, 3, 4)}, "not a learned word"),
        ({"<x>": torch.full((1, 32), float("nan"))}, "not a learned word"),
        ({"a": torch.randn(1, 32), "b": torch.randn(1, 32)}, "2 tensors"),
        ({"clip_g": torch.randn(1, 32)}, "one text encoder"),
        ({"cat</w>": torch.randn(1, 32)}, "already"),
    ],
)
def test_refusals(sd15, tmp_path, tensors, says):
    if says == "already":
        sd15.tokenizer.backend.add_tokens(["cat</w>"])
    weights.save_tensors(tmp_path / "word.safetensors", tensors)
    with pytest.raises(UserError, match=says):
        sd15.learn(tmp_path / "word.safetensors")


@pytest.mark.parametrize(
    ("text", "want"),
    [  # by ComfyUI's parse_parentheses and token_weights (comfy/sd1_clip.py)
        ("a smile :), (red:1.3) hair", [("a smile :), (red:1.3) hair", 1.0)]),
        ("a) (b) ((c:2))", [("a) (b) (", 1.0), ("c", 2.0), (")", 1.0)]),
        ("(:0.5)", [(":0.5", 1.1)]),
        ("(a) b (c:0.5)", [("a", 1.1), (" b ", 1.0), ("c", 0.5)]),
        ("a (b", [("a ", 1.0), ("(b", 1.0)]),
    ],
)
def test_comfyui_brackets_that_do_not_match(text, want):
    assert prompt.parts_of(text, "comfyui") == want
