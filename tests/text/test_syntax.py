"""Prompts as other programs write them: AUTOMATIC1111's own examples, choices, tags, what is no mark at all."""

from collections import Counter

import pytest

from nanodiff.config import UserError
from nanodiff.text import prompt as prompts
from nanodiff.text import syntax

STEPS = 10


def schedule(prompt, steps=STEPS):
    return [(part.until, part.text) for part in syntax.scheduled(prompt, steps)]


@pytest.mark.parametrize(
    ("prompt", "want"),
    [  # the examples of the web UI's modules/prompt_parser.py
        ("test", [(10, "test")]),
        ("a [b:3]", [(3, "a "), (10, "a b")]),
        ("a [b: 3]", [(3, "a "), (10, "a b")]),
        ("a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]),
        ("[(a:2):3]", [(3, ""), (10, "(a:2)")]),
        ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
        ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
        ("a [unbalanced", [(10, "a [unbalanced")]),
        ("a [b:.5] c", [(5, "a  c"), (10, "a b c")]),
        ("a [{b|d{:.5] c", [(5, "a  c"), (10, "a {b|d{ c")]),
        ("((a][:b:c [d:3]", [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
        ("a [b:c:-1]", [(10, "a c")]),
        ("a [b:c:+3]", [(3, "a b"), (10, "a c")]),
        ("a | b [c:3]", [(10, "a | b [c:3]")]),
        ("(a|b) [c:3]", [(10, "(a|b) [c:3]")]),
    ],
)
def test_examples(prompt, want):
    assert schedule(prompt) == want


@pytest.mark.parametrize(
    ("prompt", "first", "second"),
    [  # a run of 10 steps, then a larger pass of 20 (get_learned_conditioning_prompt_schedules with hires_steps)
        ("[a:b:0.5]", [(5, "a"), (10, "b")], [(20, "b")]),
        ("[a:b:1.5]", [(10, "a")], [(10, "a"), (20, "b")]),
        ("[a:b:4]", [(4, "a"), (10, "b")], [(20, "b")]),
        ("[a:b:14]", [(10, "a")], [(4, "a"), (20, "b")]),
        ("[b:1.25] c", [(10, " c")], [(5, " c"), (20, "b c")]),
    ],
)
def test_a_second_pass_counts_on(prompt, first, second):
    assert schedule(prompt) == first
    assert [(part.until, part.text) for part in syntax.scheduled(prompt, 20, earlier=10)] == second


@pytest.mark.parametrize(
    ("prompt", "want"),
    [
        ("[a|(b:1.1)]", ["a", "(b:1.1)"]),
        ("[fe|]male", ["female", "male"]),
        ("[a|b|c]", ["a", "b", "c"]),
    ],
)
def test_turns(prompt, want):
    texts = dict(schedule(prompt))
    assert [texts[i + 1] for i in range(STEPS)] == [want[i % len(want)] for i in range(STEPS)]


@pytest.mark.parametrize(
    ("prompt", "want"),
    [
        ("[cat::3] b", [(3, "cat b"), (10, " b")]),
        ("[cat:dog:0]", [(10, "dog")]),
        ("[cat:dog:40]", [(10, "cat")]),
        ("[cat:dog:1.0]", [(10, "cat")]),
        ("a (b [c:d:0.2]:1.2)", [(2, "a (b c:1.2)"), (10, "a (b d:1.2)")]),
        (r"a \[b:c:0.5\]", [(10, r"a \[b:c:0.5\]")]),
        ("at 12:30", [(10, "at 12:30")]),
        ("[a:b]", [(10, "[a:b]")]),
        ("[a|b", [(10, "[a|b")]),
        ("", [(10, "")]),
    ],
)
def test_edges(prompt, want):
    assert schedule(prompt) == want


def test_every_step_has_one_text():
    for prompt in ("[a|b] [c:d:0.3] [e:2] [[f|g]:h:7]", "[[a:b:2]|c]", "((([x:y:0.99"):
        for steps in (1, 2, 7, 50):
            untils = [until for until, _ in schedule(prompt, steps)]
            assert untils == sorted(set(untils)) and untils[-1] == steps and untils[0] >= 1


@pytest.mark.parametrize(
    ("prompt", "want"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("a cat AND a dog", [("a cat", 1.0), (" a dog", 1.0)]),
        ("a :0.5 AND b:-1.25 AND c", [("a", 0.5), (" b", -1.25), (" c", 1.0)]),
        ("BRAND ANDES", [("BRAND ANDES", 1.0)]),
        ("(a:1.2) AND b", [("(a:1.2)", 1.0), (" b", 1.0)]),
    ],
)
def test_compositions(prompt, want):
    assert syntax.composed(prompt) == want


def test_tags():
    assert syntax.networks("a <lora:x:0.5>b<lora:y y>") == ("a b", [("x", 0.5), ("y y", 1.0)])
    assert syntax.networks("a < b > c") == ("a < b > c", [])
    with pytest.raises(UserError, match="'strong' is no scale"):
        syntax.networks("<lora:x:strong>")
    with pytest.raises(UserError, match="'nan' is no scale"):
        syntax.networks("<lora:x:nan>")
    with pytest.raises(UserError, match="only <lora:name:scale>"):
        syntax.networks("<hypernet:x:1>")


def test_choices_are_the_seeds(tmp_path):
    (tmp_path / "animals").mkdir()
    (tmp_path / "animals" / "small.txt").write_text("# comment\nmouse\n\n{vole|shrew}\n")
    prompt = "{red|green} {{a|b} c|d} __animals/small__"
    texts = [syntax.chosen(prompt, seed, tmp_path) for seed in range(300)]
    assert texts == [syntax.chosen(prompt, seed, tmp_path) for seed in range(300)]
    parts = [Counter(words) for words in zip(*(t.replace(" c", "c").split() for t in texts), strict=True)]
    assert [sorted(p) for p in parts] == [["green", "red"], ["ac", "bc", "d"], ["mouse", "shrew", "vole"]]
    assert 100 < parts[0]["red"] < 200 and 100 < parts[1]["d"] < 200 and 100 < parts[2]["mouse"] < 200


def test_weights_and_numbers_of_choices():
    counted = Counter(syntax.chosen("{3::a|b}", seed) for seed in range(400))
    assert 260 < counted["a"] < 340
    assert {syntax.chosen("{2$$a|b}", seed) for seed in range(40)} == {"a, b", "b, a"}
    assert syntax.chosen("{2$$ and $$a|a}", 0) == "a and a"
    assert {syntax.chosen("{1-2$$a|a}", seed) for seed in range(40)} == {"a", "a, a"}
    assert syntax.chosen("{}", 0) == "" and syntax.chosen("a } b {", 0) == "a } b {"


@pytest.mark.parametrize(
    ("prompt", "says"),
    [("__colou__", "no such wildcard; did you mean colour"), ("__empty__", "is empty"), ("__me__", "holds __me__ itself"), ("__../x__", "no such wildcard")],
)  # fmt: skip
def test_wildcards_that_cannot_be(tmp_path, prompt, says):
    for name, text in (("colour", "red"), ("empty", "\n#x\n"), ("me", "a __me__")):
        (tmp_path / f"{name}.txt").write_text(text)
    with pytest.raises(UserError, match=says):
        syntax.chosen(prompt, 0, tmp_path)
    (tmp_path / "odd.txt").write_bytes("gr\xfcn".encode("latin-1"))
    with pytest.raises(UserError, match=r"odd\.txt: is no text in UTF-8"):
        syntax.chosen("__odd__", 0, tmp_path)
    (tmp_path / "mark.txt").write_text("# comment\nred", "utf-8-sig")
    assert syntax.chosen("__mark__", 0, tmp_path) == "red"
    with pytest.raises(UserError, match="no such wildcard"):
        syntax.chosen(f"__{tmp_path}/colour__", 0, tmp_path)
    with pytest.raises(UserError, match="needs a folder"):
        syntax.chosen(prompt, 0)


@pytest.mark.parametrize(
    ("prompt", "want"),
    [
        ("a red apple", ""),
        ("a (small) [grey] cat, 16:9, {x}", ""),
        ("a (cat:1.2)", "a weight (a:1.2)"),
        ("<lora:x:1> {a|b}", "a LoRA's tag, a choice {a|b}"),
        (
            "[a:b:0.5] [c|d] AND BREAK __x__",
            "a wildcard, prompt editing [a:b:0.5], alternating words [a|b], AND, BREAK",
        ),
    ],
)
def test_marks_are_noticed(prompt, want):
    assert syntax.marks(prompt) == want


def test_known_marks_are_not_named():
    assert syntax.marks("(a:1.2) BREAK b", weighted=True) == ""


@pytest.mark.parametrize("text", ["(" * 5000, "[" * 5000 + "a" + "]" * 5000, "(" * 800 + "a" + ")" * 800])
def test_brackets_without_end(text):
    with pytest.raises(UserError, match="opening brackets"):
        syntax.scheduled(text, 10)
    with pytest.raises(UserError, match="opening brackets"):
        prompts.parts_of(text, "comfyui")
    assert schedule("(" * 100 + "[a:b:0.5]" + ")" * 100)[0][0] == 5


@pytest.mark.parametrize("prompt", ["x __*__ y", "x __sub/*__ y", "${x=a} y"])
def test_marks_of_dynamic_prompts_that_are_not_read(tmp_path, prompt):
    (tmp_path / "a.txt").write_text("red")
    with pytest.raises(UserError, match="globs, variables and samplers of Dynamic Prompts are not supported"):
        syntax.chosen(prompt, 0, tmp_path)
    assert syntax.chosen("x __a__ y {b}", 0, tmp_path) == "x red y b"
    assert syntax.chosen("x __*__ y", 0, dynamic=False) == "x __*__ y"  # plain text in ComfyUI


def test_wildcards_in_choices_and_open_bounds(tmp_path):
    """As Dynamic Prompts' documents have them."""
    (tmp_path / "flavours.txt").write_text("vanilla\nmint\nplum\n")
    made = lambda text: {syntax.chosen(text, seed, tmp_path) for seed in range(80)}  # noqa: E731
    pairs = {f"{a} and {b}" for a in ("vanilla", "mint", "plum") for b in ("vanilla", "mint", "plum") if a != b}
    assert made("{2$$ and $$__flavours__}") == pairs
    assert {len(t.split(", ")) for t in made("{-2$$a|b|c}")} == {1, 2}
    assert {len(t.split(", ")) for t in made("{2-$$a|b|c}")} == {2, 3}
    assert made("{$$a|b}") == {"$$a", "b"}, "no bounds, no mark"


@pytest.mark.parametrize("text", ["{~red|green}", "{@red|green}", "__~flavours__", "__clothes(season=winter)__"])
def test_samplers_of_dynamic_prompts_are_named(tmp_path, text):
    with pytest.raises(UserError, match="globs, variables and samplers of Dynamic Prompts are not supported"):
        syntax.chosen(text, 1, tmp_path)


def test_wildcards_that_hold_themselves_in_a_choice(tmp_path):
    (tmp_path / "f.txt").write_text("{2$$__f__}\nx\n")
    (tmp_path / "a.txt").write_text("{2$$__b__}\nx\n")
    (tmp_path / "b.txt").write_text("{2$$__a__}\ny\n")
    for name in "fab":
        with pytest.raises(UserError, match=r"holds __\w__ itself"):
            syntax.chosen(f"a {{2$$__{name}__}}", 0, tmp_path)
    (tmp_path / "c.txt").write_text("{p|q} __d__\nz\n")
    (tmp_path / "d.txt").write_text("w\n")
    assert {syntax.chosen("{2$$ & $$__c__}", seed, tmp_path) for seed in range(40)} == {
        "p w & z",
        "q w & z",
        "z & p w",
        "z & q w",
    }
    assert syntax.chosen("__d__(red)__d__", 0, tmp_path) == "w(red)w"
