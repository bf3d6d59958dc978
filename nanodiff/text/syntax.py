"""Prompts as other programs write them: wildcards, <lora:name:0.8>, [cat:dog:0.5], [cat|dog], AND.

The rules are those of AUTOMATIC1111's web UI (its wiki, "Features": prompt editing, alternating words, composable diffusion, extra
networks) and of the Dynamic Prompts extension ({a|b}, __file__), which most prompts that people exchange were written for. In
ComfyUI's prompts only weights mean something, by its own rule (prompt.py).

Explained in the book (docs/book): chapter 9.
"""

import math
import random
import re
from pathlib import Path
from typing import NamedTuple

from nanodiff.config import UserError, nearest, printable

DEEPEST = 150  # brackets in a prompt; each is a call that waits for those inside
NUMBER = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*")
PLAIN = re.compile(r"(?:[^\\\[\]():|]|\\.)+", re.DOTALL)
NETWORK = re.compile(r"<(\w+):([^<>]*)>")
WILDCARD = re.compile(r"__([\w./-]+?)__")
UNREAD = re.compile(
    r"__[\w./-]*\*[\w./*-]*__|\$\{[^{}]*\}|\{[~@!][^{}]*\}|__[~@!][\w./-]+__|__\w[\w./-]*?(?<!_)\([^()]*\)__"
)
AND = re.compile(r"\bAND\b")
WEIGHT = re.compile(r"(.*?)(?:\s*:\s*([-+]?(?:\d+\.?\d*|\.\d+)))?\s*", re.DOTALL)
# what a prompt may hold that means nothing without prompt_syntax: (mark, what it is elsewhere)
MARKS = (
    (NETWORK, "a LoRA's tag"),
    (re.compile(r"\{[^{}]*\|[^{}]*\}"), "a choice {a|b}"),
    (WILDCARD, "a wildcard"),
    (re.compile(r"\[[^\[\]]*:[^\[\]]*:?\s*(\d+\.?\d*|\.\d+)\s*\]"), "prompt editing [a:b:0.5]"),
    (re.compile(r"\[[^\[\]]+\|[^\[\]]*\]"), "alternating words [a|b]"),
    (AND, "AND"),
    (re.compile(r"\bBREAK\b"), "BREAK"),
    (re.compile(r"(?<!\\)\([^()]*:\s*[-+]?(\d+\.?\d*|\.\d+)\s*\)"), "a weight (a:1.2)"),
)


class Part(NamedTuple):
    """One text of a composition, and the step before which it holds."""

    text: str
    until: int


# -- choices -------------------------------------------------------------------------------------------------


def chosen(prompt, seed, folder=None, dynamic=True):
    """A prompt with one of each {a|b} and __name__ chosen, by `seed` alone.

    {3::red|blue} is red three times in four, {2$$a|b|c} two of them with a comma between ({1-2$$…} one or two, {-2$$…} at most, {2-$$…} at least), {2$$ and $$a|b|c} with " and ". __name__ is a line of
    folder/name.txt, in which there may be choices again. dynamic: globs, variables and samplers of Dynamic Prompts are refused, which otherwise are
    plain text. Raises UserError for a file that is not there, and for one that holds itself.
    """
    rng = random.Random(seed)
    if dynamic and (strange := UNREAD.search(prompt)):
        raise UserError(
            f"{printable(strange[0])} in a prompt: globs, variables and samplers of Dynamic Prompts are not supported"
        )
    return _chosen(prompt, rng, Path(folder) if folder else None, ())


def _chosen(text, rng, folder, inside):
    def lines_of(name):
        if folder is None:
            raise UserError(f"__{printable(name)}__ needs a folder of wildcards (`wildcards`)")
        if name in inside:
            raise UserError(f"{folder / name}.txt: holds __{printable(name)}__ itself")
        path = folder / f"{name}.txt"
        if ".." in name.split("/") or name.startswith("/") or not path.is_file():
            there = sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.txt"))
            raise UserError(f"{path}: no such wildcard{nearest(name, there)}")
        lines = [s for s in _lines(path) if not s.startswith("#")]
        if not lines:
            raise UserError(f"{path}: is empty")
        return lines

    def resolved(name, line):
        return _chosen(line, rng, folder, (*inside, name))

    while match := re.search(r"\{([^{}]*)\}", text):  # the innermost first
        text = text[: match.start()] + _one_of(match[1], rng, lines_of, resolved) + text[match.end() :]
    return WILDCARD.sub(lambda m: resolved(m[1], rng.choice(lines_of(m[1]))), text)


def _lines(path):
    """A file's lines that are not empty. Raises UserError for one that is no UTF-8."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: is no text in UTF-8: {e}") from None
    return [s for s in map(str.strip, text.split("\n")) if s]


def _one_of(body, rng, lines_of, resolved):
    """What becomes of the inside of {…}; lines_of(name): of a wildcard; resolved(name, line): one of them, with what it asks for chosen."""
    count, between = 1, ", "
    match = re.match(r"(\d*)(-?)(\d*)\$\$(?:([^|$]*)\$\$)?", body)
    if match and (match[1] or match[3]):
        between, body = match[4] if match[4] is not None else between, body[match.end() :]
    written = body.split("|")
    name = WILDCARD.fullmatch(body.strip()) if match and len(written) == 1 else None
    if name:  # {2$$__name__}: two of its lines
        written = lines_of(name[1])
    if match and (match[1] or match[3]):
        least, most = int(match[1] or 1), int(match[3] or (len(written) if match[2] else match[1]))
        count = rng.randint(min(least, most), max(least, most)) if match[2] else least
    options, weights = [], []
    for option in written:
        match = re.match(r"\s*(\d+\.?\d*|\.\d+)::", option)
        options.append(option[match.end() :] if match else option)
        weights.append(float(match[1]) if match else 1.0)
    picked = []
    for _ in range(min(count, len(options))):
        at = rng.choices(range(len(options)), weights)[0] if any(weights) else rng.randrange(len(options))
        picked.append(options.pop(at))
        weights.pop(at)
    return between.join([resolved(name[1], line) for line in picked] if name else picked)


# -- LoRAs ---------------------------------------------------------------------------------------------------


def networks(prompt):
    """(prompt without its tags, [(name, scale)]) of <lora:name:0.8> (<lora:name> is 1). Raises UserError for another kind of tag, and for a
    scale that is no number."""
    found = []
    for kind, body in NETWORK.findall(prompt):
        name, _, scale = body.partition(":")
        if kind != "lora":
            raise UserError(f"<{kind}:…> in a prompt: only <lora:name:scale> is supported")
        try:
            found.append((name.strip(), float(scale or 1)))
            if not math.isfinite(found[-1][1]):
                raise ValueError
        except ValueError:
            raise UserError(f"<lora:{printable(body)}>: {printable(scale)!r} is no scale") from None
    return NETWORK.sub("", prompt), found


# -- what holds when -----------------------------------------------------------------------------------------


def composed(prompt):
    """[(text, weight)] of "a AND b :1.2 AND c :-1": what is drawn together (Liu et al. 2022, arXiv 2206.01714, conjunction)."""
    parts = []
    for part in AND.split(prompt):
        text, weight = WEIGHT.fullmatch(part).groups()
        parts.append((text, float(weight) if weight else 1.0))
    return parts


def scheduled(prompt, steps, earlier=0):
    """[Part] of a prompt with [from:to:when], [to:when], [from::when] and [a|b|c] for a run of `steps`: which text holds before which step.

    when: steps, or with a point in it a part of them (0.5: after half). [a|b|c]: another one at every step. What is no such thing, such as an
    unclosed bracket or [a] alone, stays in the text. earlier: steps of a pass before this one (hires), from which it counts on: parts
    from 1 to 2 and steps beyond `earlier` are this pass's, and what was to change before has changed (the web UI since 1.6). (The web UI
    itself counts from one, so that its first text holds a step longer.)
    """
    tree, marks, at, run = [], {steps}, 0, (steps, earlier)
    check_depth(prompt)
    while at < len(prompt):
        node, after = _node(prompt, at, run, marks)
        if (
            node is None and prompt[at] == "|"
        ):  # the web UI's grammar has none outside brackets, and takes it all as words
            return [Part(prompt, steps)]
        tree.append(prompt[at] if node is None else node)  # a bracket that begins nothing is itself
        at = at + 1 if node is None else after
    parts = []
    for until in sorted(m for m in marks if 1 <= m <= steps):
        text = "".join(_at(node, until) for node in tree)
        if parts and parts[-1].text == text:
            parts.pop()
        parts.append(Part(text, until))
    return parts


def check_depth(prompt):
    """Raise UserError for brackets in brackets without end."""
    if max(prompt.count("("), prompt.count("[")) > DEEPEST:
        raise UserError(f"a prompt with more than {DEEPEST} opening brackets")


def _at(node, until):
    """The text of a node in the steps that end with number `until` (counted from 1)."""
    if isinstance(node, str):
        return node
    kind, branches, when = node
    if kind == "joined":
        chosen_ = branches
    elif kind == "turns":
        chosen_ = branches[(until - 1) % len(branches)]
    else:
        chosen_ = branches[0 if until <= when else 1]
    return "".join(_at(n, until) for n in chosen_)


def _nodes(prompt, at, run, marks):
    """([node], place after them): as far as what stands there is words, or a bracket that is closed. run: scheduled()'s (steps, earlier)."""
    nodes = []
    while at < len(prompt):
        node, after = _node(prompt, at, run, marks)
        if node is None:
            break
        nodes.append(node)
        at = after
    return nodes, at


def _node(prompt, at, run, marks):
    """(node, place after it) of what begins at `at`; (None, at) for a bracket, a colon or a bar that begins nothing."""
    if match := PLAIN.match(prompt, at):
        return match[0], match.end()
    mine = set()  # the marks inside count only if this is closed
    if prompt[at] == "(":
        inner, end = _nodes(prompt, at + 1, run, mine)
        if prompt[end : end + 1] == ":":
            more, end = _nodes(prompt, end + 1, run, mine)
            inner = [*inner, ":", *more]
        if prompt[end : end + 1] == ")":
            marks |= mine
            return ("joined", ["(", *inner, ")"], None), end + 1
    elif prompt[at] == "[":
        first, end = _nodes(prompt, at + 1, run, mine)
        found = _bracket(prompt, first, end, run, mine)
        if found is not None:
            marks |= mine
            return found
    return None, at


def _bracket(prompt, first, end, run, marks):
    """(node, place after it) of a "[" whose first branch ends at `end`, or None."""
    mark = prompt[end : end + 1]
    if mark == "]":
        return ("joined", ["[", *first, "]"], None), end + 1
    if mark == "|":
        branches = [first]
        while prompt[end : end + 1] == "|":
            branch, end = _nodes(prompt, end + 1, run, marks)
            branches.append(branch)
        when = NUMBER.match(prompt, end + 1) if prompt[end : end + 1] == ":" else None
        if when and prompt[when.end() : when.end() + 1] == "]":  # bars that are words: [a|b:0.5]
            joined = [node for branch in branches[1:] for node in ("|", *branch)]
            return _changed([], [*first, *joined], when, run, marks)
        if prompt[end : end + 1] != "]":
            return None
        marks |= set(range(1, run[0] + 1))
        return ("turns", branches, None), end + 1
    if mark != ":":
        return None
    when = NUMBER.match(prompt, end + 1)
    if when and prompt[when.end() : when.end() + 1] == "]":
        return _changed([], first, when, run, marks)
    second, end = _nodes(prompt, end + 1, run, marks)
    when = NUMBER.match(prompt, end + 1)
    if prompt[end : end + 1] == ":" and when and prompt[when.end() : when.end() + 1] == "]":
        return _changed(first, second, when, run, marks)
    return None


def _changed(before, after, when, run, marks):
    steps, earlier = run
    number = (float(when[1]) - bool(earlier)) * steps if "." in when[1] else float(when[1]) - earlier
    step = min(steps, int(number))
    marks.add(step)
    return ("changes", [before, after], step), when.end() + 1


# -- without prompt_syntax -----------------------------------------------------------------------------------


def marks(prompt, weighted=False):
    """What of other programs' syntax a prompt seems to hold, in words; "" for nothing. weighted: weights and BREAK are understood."""
    known = ("BREAK", "a weight (a:1.2)") if weighted else ()
    return ", ".join(what for mark, what in MARKS if what not in known and mark.search(prompt))
