"""Replies in the manner of small instruction-tuned models: what of them is a caption, and what is talk."""

import pytest

from nanodiff.data.captionset import variations

ORIGINAL = "Tofu Soup"
A, B, C = "Spicy tofu soup with chili", "Cold tofu soup with cucumber", "Tofu stew with ginger"
THREE = [A, B, C]
FORMS = [  # how an item is written
    "- {}", "* {}", "• {}", "– {}", "+ {}", "1. {}", "2) {}", "(3) {}", "[1] {}", "a) {}", "B. {}", "1: {}", "- **{}**", "* *{}*", "1. **{}**", '- "{}"',
    "1. “{}”", "- '{}'", "- `{}`", "Variation 1: {}", "**Variation 2:** {}", "Option 1 (Simple): {}", "**Option 1 (Simple):** {}", "Option A: {}",
    "Caption #3: {}", "Version 2 - {}", "Alternative 1) {}", "* **Simple:** {}", "- **Bold & fresh:** {}", "1. **Option 1:** {}", "> - {}", "- {}.",
    "- {},", "  -   {}  ", "-{}", "●{}", "1.{}", "| 1. {} |", '- "{}" – a fiery twist', '1. "{}" (adds heat)', '- "{}".', "- _{}_",
]  # fmt: skip
TALK = [  # what is said around a list
    ("Sure! Here are 3 variations:\n\n{}", ""),
    ("Okay, here are three variations of the caption:\n{}", "\n\nLet me know if you'd like more!"),
    ("{}", "\n\nWould you like me to try a different style?"),
    ("Of course! Below are the captions you asked for.\n{}", "\nI hope these help"),
    ("## Variations\n\n{}", "\n\n**Explanation:** Each adds an ingredient."),
    ("```\n{}", "\n```"),
    ("Original caption: Tofu Soup\nVariations:\n{}", ""),
    ("{}", "\nThese captions keep the dish and change its style"),
    ("<start_of_turn>model\n{}", "<end_of_turn>"),
    ("Certainly!\n{}", "\n\nFeel free to use them"),
]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_an_item(form):
    assert variations("\n".join(form.format(c) for c in THREE), ORIGINAL) == THREE


@pytest.mark.parametrize(("before", "after"), TALK)
def test_talk_is_no_caption(before, after):
    for form in ("- {}", "2. {}", "{}"):
        reply = before.format("\n".join(form.format(c) for c in THREE)) + after
        assert variations(reply, ORIGINAL) == THREE, reply


@pytest.mark.parametrize(
    ("reply", "want"),
    [
        (f'["{A}", "{B}"]', [A, B]),
        (f'```json\n{{"variations": ["{A}", "{B}"]}}\n```', [A, B]),
        (f"1. {A} 2. {B} 3. {C}", THREE),
        (f"{A}\r\n{B}", [A, B]),
        (f"- {A}\n\n  (a hot one)\n- {B}", [A, B]),
        (f"- {A}\n- TOFU SOUP\n- tofu  soup.\n- {A.upper()}", [A]),
        (
            "- 2% milk shake\n- 3.5 ounces of tofu\n- 7-grain bread",
            ["2% milk shake", "3.5 ounces of tofu", "7-grain bread"],
        ),
        ("- Mom's tofu soup\n- Rock 'n' roll sushi", ["Mom's tofu soup", "Rock 'n' roll sushi"]),
        ("- Soup\n- one two three four five six seven eight nine ten eleven", []),
        ("Sure! Here are 3 variations", []),
        ("I'm sorry, I cannot help with that.", []),
        ("Here's a caption for you", []),
        ("- \N{REPLACEMENT CHARACTER} soup bowl\n- !!! ???\n- 12 34", []),
        ("", []),
    ],
)
def test_whole_replies(reply, want):
    assert variations(reply, ORIGINAL) == want


def test_a_last_line_that_the_limit_cut():
    reply = f"- {A}\n- {B}\n- Tofu stew with gin"
    assert variations(reply, ORIGINAL, cut=True) == [A, B] and len(variations(reply, ORIGINAL)) == 3
    assert variations(f"- {A}\n- {B}\n", ORIGINAL, cut=True) == [A, B]


def test_there_are_sixty():
    assert len(FORMS) + len(TALK) + 14 >= 60
