"""The house in numbers:   python -m tests.house          (and its map, docs/files.md:   python -m tests.house files > docs/files.md)

Proportions beside those of codebases that are read gladly (measured by the same rules, at commits of 2025); what stands out is named. A
feeling, never a gate: a file is split because it holds two trades, not because it is long. What is right or wrong is in test_layout.py.
"""

import ast
import io
import re
import sys
import tokenize
from collections import Counter, defaultdict
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
ANCHORS = [  # name, lines, share of lines that explain, lines of a function: median and longest
    ("nanoGPT", 1220, 37, 10, 55),
    ("nanochat", 7775, 32, 9, 147),
    ("EDM2", 5008, 31, 6, 185),
    ("DiT", 2224, 30, 11, 141),
    ("gpt-fast", 3588, 13, 6, 166),
    ("k-diffusion", 4665, 6, 5, 489),
]
LIMITS = {
    "script": 400,
    "train.py": 500,
    "file": 450,
    "function": 60,
    "parameters": 10,
    "neighbours": 12,
}
EXPLAINED = {"models": 25, "diffusion": 25, "kernels": 25}


def explained(path):
    """(lines that are comments or docstrings, lines that are not empty) of a file."""
    text = path.read_text()
    told = {t.start[0] for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT}
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node, clean=False) is not None
        ):
            told |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    full = {i for i, line in enumerate(text.splitlines(), 1) if line.strip()}
    return len(told & full), len(full)


def functions(path):
    """(name, lines, parameters) of every function of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            a = node.args
            own = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs) if x.arg not in ("self", "cls")]
            yield node.name, node.end_lineno - node.lineno + 1, len(own)


def imports(path):
    """{room that a library file or script imports from}, inner imports and importlib's dotted names included."""
    text = path.read_text()
    found = set(re.findall(r"[\"']nanodiff\.(\w+)", text))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "nanodiff":
            found |= {node.module.split(".")[1]} if "." in node.module else {a.name for a in node.names}
    return found


def meets(script):
    """Functions that take the script's whole options, `cfg`, by room: of what the script imports, and what that imports."""
    seen, todo, found = set(), [ROOT / script], Counter()
    while todo:
        path = todo.pop()
        if path in seen or not path.exists():
            continue
        seen.add(path)
        tree = ast.parse(path.read_text())
        where = path.parent.name if path.parent != ROOT else "script"
        if where in ("models", "weights", "diffusion", "text", "pipeline"):  # their cfg is a model's or a schedule's
            continue
        found[where] += sum(
            isinstance(n, ast.FunctionDef) and any(a.arg == "cfg" for a in n.args.args) for n in ast.walk(tree)
        )
        names = set(re.findall(r"nanodiff\.stories\.(\w+)", path.read_text()))
        todo += [ROOT / "nanodiff" / "stories" / f"{n}.py" for n in names]
        for n in ast.walk(tree):
            if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("nanodiff."):
                base = ROOT / n.module.replace(".", "/")
                todo += [base.with_suffix(".py"), *(base / f"{a.name}.py" for a in n.names)]
    return {k: v for k, v in found.items() if v}


def files():
    """docs/files.md: every file with the first sentence of its docstring, in the order of the rooms."""
    from test_layout import ROOMS

    lines = ["# Every file", "", "The first sentence of each; a room imports only from those before it.", ""]
    folders = [("The scripts", sorted(ROOT.glob("*.py"))), ("kernels/", sorted((ROOT / "kernels").glob("*.py")))]
    for room in ROOMS:
        single = ROOT / "nanodiff" / f"{room}.py"
        some = [single] if single.exists() else sorted((ROOT / "nanodiff" / room).glob("*.py"))
        folders.append((f"nanodiff/{single.name if single.exists() else room + '/'}", some))
    for name, paths in folders:
        lines += [f"## {name}", "", "| file | what is in it |", "|---|---|"]
        for path in paths:
            told = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].split())
            first = re.match(r".*?\.(?= [A-Z]|$)|.*", told)[0].rstrip(".:").replace("|", "\\|")
            if told:
                lines.append(f"| `{path.name}` | {first} |")
        lines.append("")
    return "\n".join(lines)


def main(what="numbers"):
    if what == "files":
        print(files(), end="")
        return 0
    library = sorted((ROOT / "nanodiff").rglob("*.py"))
    kernels, scripts = sorted((ROOT / "kernels").glob("*.py")), sorted(ROOT.glob("*.py"))
    every = [*library, *kernels, *scripts]
    by_room = defaultdict(list)
    for path in every:
        parts = path.relative_to(ROOT).parts
        doors = ("__init__.py", "__main__.py", "corel.py", "captionset.py")
        room = "scripts" if len(parts) == 1 else parts[0] if parts[0] == "kernels" else parts[1].removesuffix(".py")
        by_room["doors" if len(parts) == 2 and parts[1] in doors and parts[0] == "nanodiff" else room].append(path)
    print(f"{'room':<12}{'files':>6}{'lines':>8}{'explained':>11}{'function':>10}{'longest':>9}  imports from")
    for room, paths in by_room.items():
        told, full = (sum(column) for column in zip(*map(explained, paths), strict=True))
        lengths = [n for p in paths for _, n, _ in functions(p)] or [0]
        lines = sum(len(p.read_text().splitlines()) for p in paths)
        to = sorted({t for p in paths if p.name != "__main__.py" for t in imports(p)} - {room})
        print(
            f"{room:<12}{len(paths):>6}{lines:>8}{100 * told / max(full, 1):>10.0f}%{median(lengths):>10.0f}{max(lengths):>9}  {', '.join(to)}"
        )
    told, full = (sum(column) for column in zip(*map(explained, every), strict=True))
    lengths = [n for p in every for _, n, _ in functions(p)]
    lines = sum(len(p.read_text().splitlines()) for p in every)
    arrows = sum(
        len({t for p in paths if p.name != "__main__.py" for t in imports(p)} - {room})
        for room, paths in by_room.items()
    )
    print(
        f"{'all':<12}{len(every):>6}{lines:>8}{100 * told / full:>10.0f}%{median(lengths):>10.0f}{max(lengths):>9}  {arrows} arrows"
    )
    for name, n, share, middle, longest in ANCHORS:
        print(f"  {name:<16}{n:>8}{share:>10}%{middle:>10}{longest:>9}")
    print("\nwho meets a script's options:")
    for script in scripts:
        print(f"  {script.name:<11}" + ", ".join(f"{room} {n}" for room, n in meets(script.name).items()))
    inner = sum(isinstance(n, ast.Import | ast.ImportFrom) for p in every for f in ast.walk(ast.parse(p.read_text()))
                if isinstance(f, ast.FunctionDef) for n in ast.walk(f))  # fmt: skip
    readme = len((ROOT / "README.md").read_text())
    print(f"\nimports inside functions: {inner}; README: {readme} characters")
    print("\nwhat stands out:")
    for path in every:
        name, n = path.relative_to(ROOT).as_posix(), len(path.read_text().splitlines())
        kind = path.name if path.name in LIMITS else "script" if path.parent == ROOT else "file"
        if n > LIMITS[kind]:
            print(f"  {name}: {n} lines")
        for function, length, parameters in functions(path):
            if length > LIMITS["function"]:
                print(f"  {name}: {function}() has {length} lines")
            if parameters > LIMITS["parameters"] and "kernels" not in path.parts:
                print(f"  {name}: {function}() has {parameters} parameters")
    for room, paths in by_room.items():
        if len(paths) > LIMITS["neighbours"] + 1 and room != "models":
            print(f"  {room}: {len(paths)} files side by side")
    for room, least in EXPLAINED.items():
        told, full = (sum(column) for column in zip(*map(explained, by_room[room]), strict=True))
        if 100 * told / full < least:
            print(f"  {room}: {100 * told / full:.0f} % explained, {least} wanted")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    sys.exit(main(*sys.argv[1:]))
