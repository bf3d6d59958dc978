"""From papers to lines: what every docstring and comment cites, as docs/papers.md.      python -m docs.book.papers > docs/papers.md

A citation is "Authors YEAR", with an arXiv number where the source gives one, and what it points to there (eq., Alg., §, App., table, figure). A
paper that is cited again by name and year alone is the same paper.
"""

import ast
import io
import re
import sys
import tokenize
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
WHERE = (
    "nanodiff",
    "kernels",
    "assets",
    "benchmarks",
    "docs/book/figures.py",
    "train.py",
    "sample.py",
    "distill.py",
    "caption.py",
    "eval.py",
)
NAME = r"(?<!\w)[A-Z][\w'’-]+"
CITATION = re.compile(
    rf"(?P<who>{NAME}(?: et al\.|(?: (?:&|and) {NAME})?(?:, {NAME})*))?,? ?\(?(?P<year>(?:19|20)\d\d)[a-z]?\b(?!\.\d)"
)
ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")
PLACE = re.compile(
    r"(?:eq\.|equations?|Alg\.|Algorithm|§|App\.|appendix|table|figure|Theorem|section)\s?[A-Z]?[\d.]*\w(?:(?:[-–]|, | and )\d[\d.]*\w?)*"
)


class Entry(NamedTuple):
    paper: str  # "Ho et al. 2020, arXiv 2006.11239"
    place: str  # "eq. 4", or ""
    path: str
    line: int
    name: str  # of the function, class or module


def told(path):
    """(line, enclosing name, text) of every docstring and every run of comments."""
    text = path.read_text(encoding="utf-8")
    tree, spans = ast.parse(text), []

    def walk(node, name):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inner = f"{name}.{child.name}".lstrip(".")
                spans.append((child.lineno, child.end_lineno, inner))
                if (doc := ast.get_docstring(child)) is not None:
                    yield child.body[0].lineno, inner, doc
                yield from walk(child, inner)

    if (doc := ast.get_docstring(tree)) is not None:
        yield 1, "", doc
    yield from walk(tree, "")
    for t in tokenize.generate_tokens(io.StringIO(text).readline):
        if t.type == tokenize.COMMENT:
            line = t.start[0]
            inside = [s for s in spans if s[0] <= line <= s[1]]
            yield line, max(inside)[2] if inside else "", t.string


def cited(text):
    """[(who and year, arXiv number or None, place)] in a text."""
    text = re.sub(r"(?<!\n)\n[ #]*(?!\n)", " ", text)
    found = [
        m
        for m in CITATION.finditer(text)
        if m["who"] and m["who"] not in ("In", "Since", "Python", "Triton", "Copyright")
    ]
    for i, m in enumerate(found):
        after = text[m.end() : found[i + 1].start() if i + 1 < len(found) else m.end() + 90]
        after = re.split(r"[)\n]\s|\. [A-Z]", " ".join(after.split("\n\n")[0].split()) + " ")[0]
        number, places = ARXIV.search(after), PLACE.findall(after)
        yield " ".join(f"{m['who']} {m['year']}".split()), number and number[1], ", ".join(places)


def entries():
    """Every Entry, by paper and file."""
    raw, numbers = [], {}
    files = [p for w in WHERE for p in (sorted((ROOT / w).rglob("*.py")) if (ROOT / w).is_dir() else [ROOT / w])]
    for path in files:
        for line, name, text in told(path):
            for who, number, place in cited(text):
                raw.append((who, number, place, path.relative_to(ROOT).as_posix(), line, name))
                if number:
                    numbers.setdefault(who, number)
    out = []
    for who, number, *rest in raw:
        number = number or numbers.get(who)
        if number or rest[0]:  # a year alone is no citation
            out.append(Entry(f"{who}, arXiv {number}" if number else who, *rest))
    return sorted(set(out))


def page():
    """docs/papers.md."""
    by_paper = defaultdict(list)
    for e in entries():
        by_paper[e.paper].append(e)
    lines = ["# From papers to lines", "",
             "What the code cites, and where. Made by `python -m docs.book.papers > docs/papers.md` from docstrings and comments.", ""]  # fmt: skip
    lines += ["| paper | there | here |", "|---|---|---|"]
    for paper, some in by_paper.items():
        number = ARXIV.search(paper)
        shown = paper.replace(number[0], f"[{number[0]}](https://arxiv.org/abs/{number[1]})") if number else paper
        for e in some:
            lines.append(
                f"| {shown} | {e.place} | [{e.path}](../{e.path}#L{e.line}) {f'`{e.name}`' if e.name else ''} |"
            )
            shown = ""
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
