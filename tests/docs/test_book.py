"""The book: its page, its numbers, its code references, its exercises, the map from papers to lines."""

import ast
import json
import os
import re
import subprocess
import sys

import pytest
from util import ROOT

from docs.book import exercise, figures, make, markdown, papers, wrong
from docs.book.solutions import SOLUTIONS
from nanodiff.config import UserError
from nanodiff.text import tokenizer

FOLDER = ROOT / "docs/book"
CHAPTERS = markdown.chapters(FOLDER)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_a_chapter_is_complete(path):
    text = path.read_text()
    number = int(path.name[:2])
    assert text.startswith(f"# {number} ") and "*You need: " in text and "**The question.**" in text
    assert "## What goes wrong" in text and "## Exercises" in text and "## Further reading" in text
    assert f"make exercise N={number}" in text and len(re.findall(r"(?m)^\d\. `", text)) >= 3
    assert len(markdown.references(text)) >= 2 and "](figures/" in text
    assert f"({path.name})" in (FOLDER / "README.md").read_text()
    for name in re.findall(r"`(\w+)\(", text.partition("## Exercises")[2]):
        assert name in SOLUTIONS[number], name


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_numbers_and_figures_of_a_chapter_are_the_results(path):
    numbers = json.loads(figures.NUMBERS.read_text())
    text = path.read_text()
    assert figures.fill(text, numbers) == text
    for picture in re.findall(r"\]\(figures/([\w-]+)\.png\)", text):
        assert picture in figures.FIGURES and (FOLDER / f"figures/{picture}.png").is_file()
    for name, value in re.findall(r"<!--=([\w.-]+)-->(.*?)<!--/-->", text):
        assert value, name
    assert not re.search(r"<!--=[\w.-]+-->(?![^<]*<!--/-->)", text)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_a_module_names_the_chapters_that_show_it(path):
    for file, _ in markdown.references(path.read_text()):
        doc = ast.get_docstring(ast.parse((ROOT / file).read_text()))
        named = re.search(r"Explained in the book \(docs/book\): chapters? ([\d, and]+)\.", doc)
        assert named and str(int(path.name[:2])) in re.findall(r"\d+", named[1]), file


def test_figures_are_all_in_the_text():
    shown = {p for path in CHAPTERS for p in re.findall(r"figures/([\w-]+)\.png", path.read_text())}
    assert shown == set(figures.FIGURES) == {p.stem for p in (FOLDER / "figures").glob("*.png")}


CLOSED = [
    "01-noising",
    "01-schedules",
    "01-brightness",
    "02-errors",
    "03-orders",
    "03-no-noise",
    "04-bells",
    "05-times",
    "06-memory",
    "06-online",
    "07-variance",
    "07-wrong",
    "09-pieces",
    "11-shift",
    "12-rank",
    "12-begin",
    "10-sizes",
    "13-few",
    "14-bias",
    "14-ssim",
    "15-cache",
    "16-formats",
    "16-resume",
    "04-dropout",
    "10-joined",
    "15-place",
]


@pytest.mark.parametrize("name", CLOSED)
def test_figures_in_closed_form_give_the_numbers(name):
    plt = pytest.importorskip("matplotlib.pyplot")
    kept = json.loads(figures.NUMBERS.read_text())[name]
    drawn, numbers = figures.FIGURES[name](plt)
    plt.close(drawn)
    assert numbers.keys() == kept.keys()
    for key, text in numbers.items():  # rounded: the last digit may differ between machines
        digits = len(text.partition(".")[2])
        assert abs(float(text) - float(kept[key])) <= 1.01 * 10**-digits, key


def test_pieces_by_the_tables_order_are_the_tokenizers():
    lines = (ROOT / "assets/clip/merges.txt").read_text(encoding="utf-8").splitlines()
    ranks = {tuple(line.split()): i for i, line in enumerate(lines) if len(line.split()) == 2 and line[0] != "#"}
    tok = tokenizer.clip_from_merges("!", 77)
    for word in ("apples", "butterfly", "telescope", "untranslatable", "x"):
        assert wrong.merged(word, ranks) == [tok.backend.id_to_token(i).removesuffix("</w>") for i in tok.pieces(word)]
    assert wrong.merged("apples", ranks, by_rank=False) != wrong.merged("apples", ranks)


def test_a_number_or_function_that_is_not_there(tmp_path):
    assert figures.fill("a <!--=x.y-->1<!--/--> b", {"x": {"y": "2"}}) == "a <!--=x.y-->2<!--/--> b"
    with pytest.raises(UserError, match=r"x\.z: no such number"):
        figures.fill("<!--=x.z-->1<!--/-->", {"x": {"y": "2"}})
    (tmp_path / "a.py").write_text("class A:\n    @property\n    def b(self):\n        return 1\n\n\nC = {1: 2}\n")
    assert markdown.source_of(tmp_path / "a.py", "A.b") == (2, "    @property\n    def b(self):\n        return 1")
    assert markdown.source_of(tmp_path / "a.py", "C") == (7, "C = {1: 2}")
    with pytest.raises(UserError, match="has no A"):
        markdown.source_of(tmp_path / "a.py", "A.c")
    with pytest.raises(UserError, match="no such file"):
        markdown.to_html("[`b.py: f`](b.py)", tmp_path, tmp_path)
    with pytest.raises(UserError, match="no such picture"):
        markdown.to_html("![a](b.png)", tmp_path, tmp_path)


def test_markdown():
    html = lambda text: markdown.to_html(text, ROOT, FOLDER)  # noqa: E731
    assert html("# 1 A `b`\ntext *a* **b** x_t 2*3*4 <5") == (
        '<h1 id="1-a-b-">1 A <code>b</code></h1>\n<p>text <em>a</em> <strong>b</strong> x_t 2*3*4 &lt;5</p>'
    ).replace("b-", "b")
    assert html("- a\n- b\n  c") == "<ul><li>a</li><li>b c</li></ul>"
    assert html("1. a\n2. b") == "<ol><li>a</li><li>b</li></ol>"
    assert "<th>a</th><th>b</th>" in html("| a | b |\n|---|---|\n| 1 | `x \\| y` |") and "<td>1</td>" in html(
        "| a |\n|---|\n| 1 |"
    )
    assert html("```python\nif a:  # c\n    return 's'\n```") == (
        '<pre><span class="k">if</span> a:  <span class="c"># c</span>\n    <span class="k">return</span> <span class="s">&#x27;s&#x27;</span></pre>'
    )
    assert html("a <!-- no\nno --> b") == "<p>a  b</p>" and html("[a](02-b.md)") == '<p><a href="#ch02">a</a></p>'
    with pytest.raises(UserError, match="a fence"):
        html("```\nx")
    pytest.importorskip("matplotlib")
    assert re.fullmatch(
        r'<p>so <svg class="m" role="img" aria-label="a\^2"[^>]*><path d="M[^"]+"/></svg>, 3\$</p>',
        html("so $a^2$, 3$"),
    )
    with pytest.raises(UserError, match="formula"):
        html(r"$\nothing{x}$")


def test_a_formula_is_drawn_on_the_line():
    pytest.importorskip("matplotlib")
    from nanodiff.output import charts

    outline, width, height, depth = charts.formula("x")
    low, wide = charts.formula("x_t"), charts.formula("x + x")
    assert 0.3 < width < 0.8 and 0.3 < height < 0.8 and depth < 0.1 < low[3] and wide[1] > 2 * width
    ys = [float(y) for y in re.findall(r"[\d.-]+ ([\d.-]+)", outline)]
    assert min(ys) > -0.05 and max(ys) < height + 0.05  # y down, inside the box


def test_the_page_needs_nothing_else(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("sys.argv", ["make", "--output", str(tmp_path / "book.html")])
    assert make.main() == 0
    page = (tmp_path / "book.html").read_text()
    assert not re.search(r'src="(?!data:)|<script|<link|@import|url\(', page)
    assert (
        page.count("<section") == len(CHAPTERS) and "prefers-color-scheme:dark" in page and "width=device-width" in page
    )
    assert "$" not in re.sub(r"<pre>.*?</pre>|<code>.*?</code>|aria-label=\"[^\"]*\"", "", page, flags=re.DOTALL)
    assert "def add_noise" in re.sub(r"<[^>]+>", "", page)


def test_exercises_have_solutions_and_hints():
    assert set(exercise.chapters()) == set(SOLUTIONS) == {int(p.name[:2]) for p in CHAPTERS}
    for number, path in exercise.chapters().items():
        text = path.read_text()
        asked = re.findall(r"(?m)(?<!jit\n)^(?:def (?=\w+\()|class )(\w+)", text)
        assert asked == list(SOLUTIONS[number]) and text.count("raise NotImplementedError") == len(asked) >= 3
        assert "Hint: " in text
        tests = (ROOT / f"tests/docs/exercises/test_{path.name}").read_text()
        for name, (_, where) in SOLUTIONS[number].items():
            assert name in tests
            file, _, function = where.partition(": ")
            assert markdown.source_of(ROOT / file, function)


def test_every_exercise_fails_as_it_stands():
    env = os.environ | {"EXERCISES": str(FOLDER / "exercises")}
    env.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=line", "tests/docs/exercises"],
        cwd=ROOT, env=env, capture_output=True, text=True,
    )  # fmt: skip
    said = re.search(r"(\d+) passed, (\d+) failed, 0 skipped", done.stdout)
    assert done.returncode == 1 and said and said[1] == "0" and int(said[2]) >= 12, done.stdout[-2000:]


def test_make_exercise(tmp_path, monkeypatch, capfd):
    """First a skeleton; then what is wrong; then right; where the solution is; a chapter that is none."""

    def ask(*argv):
        monkeypatch.setattr("sys.argv", ["exercise", *argv, "--folder", str(tmp_path / "mine")])
        return exercise.main()

    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    assert ask("4") == 0 and "a skeleton is in" in capfd.readouterr().out
    mine = tmp_path / "mine/ch04.py"
    assert mine.read_bytes() == (FOLDER / "exercises/ch04.py").read_bytes()
    assert ask("4") == 1 and "NotImplementedError" in (out := capfd.readouterr().out) and "not yet" in out
    mine.write_text(
        "from docs.book.solutions import guided_bell, rescaled\n\n\ndef guided(without, with_text, scale):\n"
        "    return without + scale * (with_text - without)\n"
    )
    assert ask("4") == 0 and "all of them right" in capfd.readouterr().out
    assert ask("3", "--solution") == 0
    assert re.search(r"heun: nanodiff/diffusion/samplers\.py:\d+, heun", capfd.readouterr().out)
    assert ask("40") == 2 and "chapter 40 has no exercises" in capfd.readouterr().err


def test_the_map_from_papers_is_the_code_s():
    without_lines = lambda text: re.sub(r"#L\d+", "", text)  # noqa: E731
    kept = (ROOT / "docs/papers.md").read_text()
    assert without_lines(kept) == without_lines(papers.page()), "python -m docs.book.papers > docs/papers.md"
    assert len(papers.entries()) >= 120


def test_citations():
    cited = lambda text: list(papers.cited(text))  # noqa: E731
    assert cited("x (Ho et al. 2020, arXiv 2006.11239 Alg. 2, eq. 6-7), on") == [
        ("Ho et al. 2020", "2006.11239", "Alg. 2, eq. 6-7")
    ]
    assert cited("Kingma &\nWelling 2014 eq. 10).") == [("Kingma & Welling 2014", None, "eq. 10")]
    assert cited("arXiv 2006.11239 only") == [] and cited("in the year 2020") == []
