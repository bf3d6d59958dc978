"""The book as one page that needs nothing else: formulas, code, pictures and style in one file.

python -m docs.book.make --output out/book/book.html
"""

import argparse
import re
import sys
from pathlib import Path

from docs.book import markdown
from nanodiff.commandline import tool
from nanodiff.config import UserError
from nanodiff.files import out_dir, write_bytes

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
STYLE = """
:root{color-scheme:light dark;--ink:#1c1c1e;--paper:#fdfcfa;--soft:#6b6b70;--line:#d9d6d0;--box:#f3f1ec;--link:#0060a8;--k:#9a3412;--s:#166534;--d:#1d4ed8}
@media (prefers-color-scheme:dark){:root{--ink:#e6e4df;--paper:#17181a;--soft:#9a9a9f;--line:#3a3b3f;--box:#202226;--link:#7ab8ee;--k:#f0a57a;--s:#8fd0a0;--d:#93b8ff}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:17px/1.62 Georgia,'Times New Roman',serif}
main,nav{max-width:46rem;margin:0 auto;padding:1rem}
nav ol{columns:2;font-size:.95rem}nav li{break-inside:avoid}
h1,h2,h3{line-height:1.25;font-family:system-ui,sans-serif;text-wrap:balance}h1{margin-top:4rem;border-top:1px solid var(--line);padding-top:2rem}
a{color:var(--link)}
code,pre{font:.82em/1.5 ui-monospace,'DejaVu Sans Mono',Menlo,monospace}
code{background:var(--box);padding:.1em .25em;border-radius:.2em;overflow-wrap:anywhere}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--box);padding:.8rem 1rem;border-radius:.4rem;overflow-x:auto;margin:.6rem 0}
figure{margin:1.4rem 0}figcaption{color:var(--soft);font-size:.88rem;font-family:system-ui,sans-serif}
figure.code figcaption code{background:none}
img{max-width:100%;height:auto;background:#fff;border-radius:.4rem}
.wide{overflow-x:auto;margin:1rem 0}.formula{text-align:center;padding:.3rem 0;font-size:1.05em}
svg.m{fill:currentColor;overflow:visible}.formula svg{margin:0 auto;display:block;flex:none;max-width:100%;height:auto!important}
table{border-collapse:collapse;font-size:.92rem}th,td{border-bottom:1px solid var(--line);padding:.35rem .6rem;text-align:left;vertical-align:top}
blockquote{margin:1rem 0;padding:.1rem 1rem;border-left:3px solid var(--line);color:var(--soft)}
.k{color:var(--k)}.s{color:var(--s)}.c{color:var(--soft);font-style:italic}.d{color:var(--d)}
details{margin:1rem 0}summary{cursor:pointer;color:var(--link)}
@media (max-width:640px){body{font-size:16px}nav ol{columns:1}}
"""


def book():
    """The page's text."""
    texts = {p: p.read_text(encoding="utf-8") for p in markdown.chapters(FOLDER)}
    if not texts:
        raise UserError(f"{FOLDER}: no chapters")
    titles = {p: re.match(r"# (.*)", text) for p, text in texts.items()}
    if wrong := [p for p, m in titles.items() if not m]:
        raise UserError(f"{wrong[0]}: does not begin with a title")
    contents = "".join(
        f'<li><a href="#ch{p.name[:2]}">{re.sub(r"^[0-9]+ ", "", m[1])}</a></li>' for p, m in titles.items()
    )
    bodies = []
    for p, text in texts.items():
        try:
            bodies.append(f'<section id="ch{p.name[:2]}">{markdown.to_html(text, ROOT, FOLDER)}</section>')
        except UserError as e:
            raise UserError(f"{p.name}: {e}") from None
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>nanodiff, the book</title><style>{STYLE}</style><nav><h2>nanodiff, the book</h2><ol>{contents}</ol></nav><main>"
        + "\n".join(bodies)
        + "</main></html>"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/book/book.html"))
    args = parser.parse_args()

    def run():
        out_dir(args.output.parent)
        page = book()
        write_bytes(args.output, page.encode())
        print(f"the book: {args.output} ({len(page) >> 10} kB, {len(markdown.chapters(FOLDER))} chapters)")

    return tool(run)


if __name__ == "__main__":
    sys.exit(main())
