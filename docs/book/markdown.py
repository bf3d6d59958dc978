"""Markdown to HTML, as much of it as the book uses, with formulas as pictures of lines and code taken from the source.

    html = to_html(text, root, folder)

Headings, paragraphs, lists, tables, quotes, fenced code, pictures (they come along, as data), links, `code`, *emphasis*, **strong**, formulas
between $ and between $$ (drawn by matplotlib's mathtext: no network, no font to load), <details>. A paragraph that is nothing but a link named
`path: function` becomes that function's source. Comments are left out.
"""

import ast
import base64
import html
import io
import keyword
import re
import tokenize
from functools import lru_cache
from pathlib import Path

from nanodiff.config import UserError
from nanodiff.output import charts

REFERENCE = re.compile(r"\[`([\w/.]+\.py): ([\w.]+)`\]\(([^)\s]+)\)")  # path, name, link
FORMULA = re.compile(r"(?<![\\$\w])\$(?!\s)([^$\n]+?)(?<!\s)\$(?!\w)")


def source_of(path, name):
    """(first line's number, text) of a function, class or method in a file, as Class.method; decorators with it. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    text = path.read_text(encoding="utf-8")
    scope, node = ast.parse(text), None
    for part in name.split("."):
        found = [n for n in scope.body if getattr(n, "name", None) == part]
        found += [n for n in scope.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", None) == part]
        if not found:
            raise UserError(f"{path}: has no {name}")
        scope = node = found[0]
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    return first, "\n".join(text.splitlines()[first - 1 : node.end_lineno])


def highlighted(code):
    """Python with <span>s: k keywords, s strings, c comments, d what is defined."""
    out, at, before = [], (1, 0), ""
    lines = code.splitlines(keepends=True)
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(code).readline))
    except (tokenize.TokenError, IndentationError):  # a method, or a piece
        return html.escape(code)

    def between(start, end):
        if start[0] == end[0]:
            return lines[start[0] - 1][start[1] : end[1]] if start[0] <= len(lines) else ""
        return (
            lines[start[0] - 1][start[1] :]
            + "".join(lines[start[0] : end[0] - 1])
            + (lines[end[0] - 1][: end[1]] if end[0] <= len(lines) else "")
        )

    for t in tokens:
        if t.type == tokenize.ENDMARKER:
            break
        out.append(html.escape(between(at, t.start)))
        kind = {tokenize.COMMENT: "c", tokenize.STRING: "s"}.get(t.type)
        if t.type == tokenize.NAME:
            kind = "k" if keyword.iskeyword(t.string) else "d" if before in ("def", "class") else None
        text = html.escape(between(t.start, t.end))
        out.append(f'<span class="{kind}">{text}</span>' if kind else text)
        at, before = t.end, t.string
    return "".join(out)


@lru_cache(maxsize=4096)
def formula(latex, block=False):
    """A formula as inline SVG in the colour of the text. Raises UserError for what mathtext does not know."""
    outline, width, height, depth = charts.formula(latex)
    style = f"width:{width:.3f}em;height:{height:.3f}em;" + ("" if block else f"vertical-align:-{depth:.3f}em;")
    return (
        f'<svg class="m" role="img" aria-label="{html.escape(latex, quote=True)}" viewBox="0 0 {width:.3f} {height:.3f}" style="{style}">'
        f'<path d="{outline}"/></svg>'
    )


def inline(text, folder):
    """A line of Markdown: code, formulas, pictures, links, emphasis."""
    kept = []

    def keep(made):
        kept.append(made)
        return f"\x00{len(kept) - 1}\x00"

    def picture(m):
        path = folder / m[2]
        if not path.is_file():
            raise UserError(f"{path}: no such picture")
        data = base64.b64encode(path.read_bytes()).decode()
        return keep(f'<img alt="{html.escape(m[1], quote=True)}" src="data:image/png;base64,{data}">')

    text = re.sub(r"`([^`]+)`", lambda m: keep(f"<code>{html.escape(m[1])}</code>"), text)
    text = FORMULA.sub(lambda m: keep(formula(m[1])), text)
    text = re.sub(r"!\[([^\]]*)\]\(([^)\s]+)\)", picture, text)
    text = html.escape(text, quote=False)
    text = re.sub(
        r"\[([^\]]+)\]\(([^)\s]+)\)", lambda m: f'<a href="{html.escape(address(m[2]), quote=True)}">{m[1]}</a>', text
    )
    text = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
    text = re.sub(r"(?<![\w*])\*([^*\s][^*]*)\*(?!\w)", r"<em>\1</em>", text)
    while "\x00" in text:  # what was kept may stand in what was kept
        text = re.sub(r"\x00(\d+)\x00", lambda m: kept[int(m[1])], text)
    return text


def address(link):
    """Where a link leads inside the one page: a chapter's anchor; what lies in the repository is left as it is."""
    chapter = re.fullmatch(r"(\d\d)-[\w-]+\.md(#.*)?", link)
    return f"#ch{chapter[1]}" if chapter else link


def listing(path, name, link, root):
    first, code = source_of(root / path, name)
    body = highlighted(re.sub(r"(?m)^ {4}", "", code) if code.startswith("    ") else code)
    return (
        f'<figure class="code"><figcaption><a href="{html.escape(link)}">{html.escape(path)}</a>, line {first}: '
        f"<code>{html.escape(name)}</code></figcaption><pre>{body}</pre></figure>"
    )


def items(lines, folder):
    """A list, one level deep; a line that is indented goes on with the item before it."""
    ordered = bool(re.match(r"\d+\. ", lines[0]))
    texts = []
    for line in lines:
        if m := re.match(r"(?:[-*]|\d+\.) (.*)", line):
            texts.append(m[1])
        else:
            texts[-1] += " " + line.strip()
    tag = "ol" if ordered else "ul"
    return f"<{tag}>" + "".join(f"<li>{inline(t, folder)}</li>" for t in texts) + f"</{tag}>"


def table(lines, folder):
    rows = [[c.strip() for c in re.split(r"(?<!\\)\|", line.strip().strip("|"))] for line in lines]
    cell = lambda tag, text: f"<{tag}>{inline(text.replace(chr(92) + '|', '|'), folder)}</{tag}>"  # noqa: E731
    head = "".join(cell("th", c) for c in rows[0])
    body = "".join("<tr>" + "".join(cell("td", c) for c in row) + "</tr>" for row in rows[2:])
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def blocks(text):
    """The text's blocks: fenced code whole, the rest parted by empty lines."""
    block, fence = [], False
    for line in text.splitlines():
        if line.startswith("```"):
            if not fence and block:
                yield block
                block = []
            fence = not fence
            block.append(line)
            if not fence:
                yield block
                block = []
        elif not fence and (not line.strip() or line.startswith("#")):
            if block:
                yield block
            block = []
            if line.strip():
                yield [line]
        else:
            block.append(line)
    if fence:
        raise UserError("a fence of code is not closed")
    if block:
        yield block


def to_html(text, root, folder):
    """The body of a page. root: of the repository, from which code comes; folder: of the text, from which its pictures come. Raises UserError for
    a picture, function or file that is not there and for a formula that cannot be drawn."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    out = []
    for lines in blocks(text):
        first = lines[0]
        if first.startswith("```"):
            code = "\n".join(lines[1:-1])
            out.append(f"<pre>{highlighted(code) if first == '```python' else html.escape(code)}</pre>")
        elif m := re.match(r"(#+) (.*)", first):
            anchor = re.sub(r"[^\w]+", "-", m[2].lower()).strip("-")
            out.append(f'<h{len(m[1])} id="{anchor}">{inline(m[2], folder)}</h{len(m[1])}>')
        elif m := REFERENCE.fullmatch(" ".join(lines).strip()):
            out.append(listing(m[1], m[2], m[3], root))
        elif first.startswith("$$"):
            out.append(f'<div class="wide formula">{formula(" ".join(lines).strip().strip("$").strip(), True)}</div>')
        elif first.startswith("|"):
            out.append(table(lines, folder))
        elif re.match(r"(?:[-*]|\d+\.) ", first):
            out.append(items(lines, folder))
        elif first.startswith(">"):
            out.append(f"<blockquote>{inline(' '.join(line.lstrip('> ') for line in lines), folder)}</blockquote>")
        elif re.match(r"</?(details|summary)", first):
            out.append("\n".join(lines))
        elif m := re.fullmatch(r"!\[([^\]]*)\]\(\S+\)", first):
            out.append(f"<figure>{inline(first, folder)}<figcaption>{inline(m[1], folder)}</figcaption></figure>")
        else:
            out.append(f"<p>{inline(' '.join(lines), folder)}</p>")
    return "\n".join(out)


def references(text):
    """[(path, name)] of the code that a text shows."""
    return [(m[1], m[2]) for m in REFERENCE.finditer(text)]


def chapters(folder):
    """The chapters' files, in order."""
    return sorted(Path(folder).glob("[0-9][0-9]-*.md"))
