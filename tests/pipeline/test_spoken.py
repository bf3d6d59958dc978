"""Prompts that change on the way, compositions and ComfyUI's weights: against runs of fixed texts and their formulas."""

import pytest
import torch
from util import PIPELINE, TINY, max_error

from nanodiff import pipeline
from nanodiff.config import UserError
from nanodiff.diffusion import samplers
from nanodiff.pipeline import spoken
from nanodiff.pipeline.conditions import Extra
from nanodiff.pipeline.settings import Words
from nanodiff.text import prompt as prompts


@pytest.fixture(scope="module")
def models():
    return {
        name: pipeline.load(TINY / name).with_scheduler("ddim" if name != "sd35-medium" else None)
        for name in ("sd15", "sdxl", "sd35-medium")
    }


def drawn(sd, *texts, syntax=True, negative="blue", **more):
    return sd.generate(
        list(texts), negative, **{"steps": 4, "guidance_scale": 5.0, "seeds": range(len(texts)), "height": 64, "width": 64, "syntax": syntax} | more
    ).latents  # fmt: skip


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd35-medium"])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a cat", "a cat"),
        ("[a cat:a dog:0]", "a dog"),
        ("[a cat:a dog:4]", "a cat"),
        ("a[ cat| cat]", "a cat"),
        ("a cat AND a dog :0", "a cat"),
        ("a cat:0.25 AND a cat:0.75", "a cat"),
    ],
)
def test_what_comes_to_the_same(models, name, one, other):
    sd = models[name]
    assert max_error(drawn(sd, one), drawn(sd, other, syntax=False)) < PIPELINE


def test_clip_skip_is_every_texts_in_the_web_ui_and_comfyui(models):
    """In diffusers the negative prompt has its last layer; in the others every text is encoded alike, the empty one too."""
    sd = models["sd15"]
    skipped = lambda text: sd.encode([text], 1).states  # noqa: E731
    for negative in ("blue", None):
        for how, theirs in (({"syntax": True}, True), ({"weighted": "comfyui"}, True), ({}, False)):
            _, got = sd.conditions(["a cat"], negative, Words(clip_skip=1, **how))
            want = skipped(negative or "") if theirs else sd.encode([negative or ""]).states
            assert torch.equal(got.states, want), (negative, how)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_text_holds_in_its_steps(models, name):
    """The second half of a run from where the first one ended is the other text's."""
    sd = models[name]
    halves = {}
    for text in ("a cat", "a dog"):
        condition = sd.conditions([text], "blue")
        sizes = sd.size_ids(1, 64, 64, None)
        halves[text] = sd.denoiser(*condition, 5.0, extra=Extra(sizes))
    order = [halves["a cat"], halves["a cat"], halves["a dog"], halves["a dog"]]
    times = samplers.times(sd.schedule, 4)

    def model(x, t):
        return order[sum(u > t for u in times)](x, t)

    noise = pipeline.Noise([torch.Generator().manual_seed(0)], (1, 4, 8, 8), "cpu", torch.float32)
    x = samplers.begin(sd.schedule, 4, noise())
    with torch.no_grad():
        *_, last = samplers.of(sd.schedule).run(model, x, sd.schedule, 4, noise, 0)
    for prompt in ("a [cat:dog:0.5]", "[a cat:a dog:2]", "a [cat::2][dog:2]"):
        assert max_error(drawn(sd, prompt), last.x) < PIPELINE


def run_of(sd, prompts, times, monkeypatch):
    """[(time, texts)] that a run over `times` asks for."""
    held = []
    monkeypatch.setattr(sd, "conditions", lambda texts, *_: (texts, None), raising=False)
    model = spoken.Spoken(sd, prompts, None, Words(), True, times).model(
        lambda text, _: lambda x, t: held.append((t, text))
    )
    for t in times:
        model(None, t)
    return held


def test_turns_are_taken(models, monkeypatch):
    held = run_of(models["sd15"], ["[a|b]", "c"], [900, 600, 300, 0], monkeypatch)
    assert held == [(900, ["a", "c"]), (600, ["b", "c"]), (300, ["a", "c"]), (0, ["b", "c"])]


def test_a_time_that_comes_twice_is_one_step(models, monkeypatch):
    """PNDM visits its second timestep twice."""
    held = run_of(models["sd15"], ["[a|b]"], [900, 600, 600, 300], monkeypatch)
    assert [text for _, (text,) in held] == ["a", "b", "b", "a"]


def test_a_run_that_begins_late_counts_from_there(models):
    """Of six steps at a strength of 0.5 three are taken: the first text has the first of them."""
    sd, image = models["sd15"], torch.zeros(1, 3, 64, 64)
    more = {"image": image, "strength": 0.5, "steps": 6}
    both, first, second = (drawn(sd, text, **more) for text in ("[a cat:a dog:1]", "a cat", "a dog"))
    assert not torch.equal(both, first) and not torch.equal(both, second)
    assert max_error(drawn(sd, "[a cat:a dog:3]", **more), first) < PIPELINE


@pytest.mark.parametrize("name", ["sd15", "sd35-medium"])
def test_all_texts_are_encoded_before_the_denoiser_works(models, name, monkeypatch):
    sd, working = models[name], []
    hook = sd.net.register_forward_pre_hook(lambda *_: working.append(1))
    encode = sd.encode_uniques
    monkeypatch.setattr(sd, "encode_uniques", lambda *a: (working and pytest.fail("too late")) or encode(*a))
    sd.kept.clear()
    try:
        drawn(sd, "[one|two] AND [three:four:0.5]")
    finally:
        hook.remove()
    assert working


def test_the_negative_prompt_changes_too(models):
    sd = models["sd15"]
    assert (
        max_error(drawn(sd, "a cat", negative="[blue:red:0]"), drawn(sd, "a cat", syntax=False, negative="red"))
        < PIPELINE
    )


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_composition_is_its_formula(models, name):
    """One step: out = ∅ + scale (1.0 (cat - ∅) - 0.5 (dog - ∅))."""
    sd = models[name]
    sizes = sd.size_ids(1, 64, 64, None)
    x, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)), 500
    with torch.no_grad():
        (cat, empty), (dog, _) = (sd.conditions([text], "blue") for text in ("a cat", "a dog"))
        plain = {}
        for key, text in (("cat", cat), ("dog", dog)):
            both = (
                sd.denoiser(text, empty, 1.0, extra=Extra(sizes))(x, t),
                sd.denoiser(text, empty, 0.0, extra=Extra(sizes))(x, t),
            )
            plain[key], plain["none"] = both
        want = plain["none"] + 3.0 * ((plain["cat"] - plain["none"]) - 0.5 * (plain["dog"] - plain["none"]))
        parts = [(cat, torch.tensor([1.0])), (dog, torch.tensor([-0.5]))]
        got = sd.denoiser(parts, empty, 3.0, extra=Extra(sizes))(x, t)
    assert max_error(got, want) < 1e-5


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_pictures_of_a_batch_do_not_mind_each_other(models, name):
    sd = models[name]
    texts = ["a cat AND a dog :0.5", "[a|b] cup", "red"]
    both = drawn(sd, *texts)
    for i, text in enumerate(texts):
        assert max_error(both[i : i + 1], drawn(sd, text, seeds=[i])) < PIPELINE


def test_compositions_need_guidance(models):
    with pytest.raises(UserError, match="AND in a prompt needs guidance"):
        drawn(models["sd15"], "a AND b", guidance_scale=1.0)
    drawn(models["sd15"], "[a:b:2]", guidance_scale=1.0)


# -- ComfyUI's weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("a (cat)", [("a ", 1.0), ("cat", 1.1)]),
        ("((cat))", [("cat", 1.1 * 1.1)]),
        ("((cat:1.5))", [("cat", 1.5)]),  # whatever is around it
        ("((a) cat:1.5)", [("a", 1.5 * 1.1), (" cat", 1.5)]),
        (r"\(cat\) [dog]", [("(cat) [dog]", 1.0)]),
        ("(a: b)", [("a: b", 1.1)]),
        ("a (cat", [("a ", 1.0), ("(cat", 1.0)]),
        ("a) (b:0.5)", [("a) (b:0.5)", 1.0)]),  # a bracket that closes nothing: the next opens none
        ("BREAK", [("BREAK", 1.0)]),
    ],
)
def test_comfyui_parts(text, want):
    got = prompts.comfyui_parts(text)
    assert [t for t, _ in got] == [t for t, _ in want] and [w for _, w in got] == pytest.approx([w for _, w in want])


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd35-medium"])
def test_comfyui_weights_are_ways_from_the_empty_prompt(models, name):
    sd = models[name]
    plain, empty, got = (
        sd.encode([text], weighted=w).states
        for text, w in (("red cup", False), ("", False), ("(red cup:1.5)", "comfyui"))
    )
    words = slice(1, 1 + len(sd.tokenizer.pieces("red cup")))
    assert max_error(got[:, words], (empty + 1.5 * (plain - empty))[:, words]) < 1e-5
    others = torch.ones(plain.shape[1], dtype=bool)
    others[words] = False
    if name != "sd35-medium":  # which has T5's words behind the CLIPs'
        assert torch.equal(got[:, others], plain[:, others])
    assert torch.equal(sd.encode(["red (cup:1)"], weighted="comfyui").states, plain)
