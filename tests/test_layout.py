"""The house: floors, circles, banned packages, README tree, no unsafe calls, files that stay readable."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import house
import pytest
from util import ROOT

ROOMS = (  # a room imports from those before it only; inner imports and importlib count
    "system", "config", "aliases", "commandline", "files", "device", "diffusion", "weights", "models", "text", "output", "pipeline", "lora", "data", "training", "evaluation",
    "stories",
)  # fmt: skip
# where people look for a tool or begin; may look anywhere, nobody imports them
DOORS = {"corel", "captionset", "__init__"}
BANNED = {"diffusers", "transformers", "accelerate", "peft", "datasets", "torchvision", "einops", "timm", "lpips"}
ONLY_IN = {
    "matplotlib": "charts",
    "tensorboard": "watch",
    "wandb": "watch",
    "pyarrow": "sources",
    "huggingface_hub": "hub",
}
LIBRARY = sorted((ROOT / "nanodiff").rglob("*.py"))
SCRIPTS = sorted(ROOT.glob("*.py"))
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
SKIPPED = {".git", ".venv", "out", ".ruff_cache", ".pytest_cache", ".hypothesis"}
EVERY = [p for p in sorted(ROOT.rglob("*.py")) if ".venv" not in p.parts and "out" not in p.relative_to(ROOT).parts]


def imports(path):
    return imported(path.read_text())


def imported(source):
    """(top-level package, dotted name, is it at module level) of every import of a file; the last is None for one by importlib."""
    tree = ast.parse(source)
    top = set(tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and "import" in ast.unparse(node.func):
            name = node.args[0]  # importlib.import_module("a.b"), __import__("a"); of f"a.{b}" what is known
            name = name.values[0] if isinstance(name, ast.JoinedStr) else name
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield name.value.split(".")[0], name.value.rstrip("."), None  # nobody's statement: see DOORS
        if isinstance(node, ast.Import):
            yield from ((a.name.split(".")[0], a.name, node in top) for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield ".", "." * node.level + (node.module or ""), node in top
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module.split(".")[0], f"{node.module}.{a.name}", node in top) for a in node.names)


def door(path):
    return path.name == "__main__.py" or (path.parent.name == "nanodiff" and path.stem in DOORS)


def place(path):
    """(room, dotted module) of a library file."""
    parts = path.relative_to(ROOT / "nanodiff").with_suffix("").parts
    return parts[0], ".".join(("nanodiff", *parts)).removesuffix(".__init__")


def targets(path):
    """Dotted names inside nanodiff that a file imports, in whatever way."""
    for package, name, _ in imports(path):
        assert package != ".", f"{path.name} imports {name}: say where from"
        if package == "nanodiff" and name != "nanodiff":
            yield name


@pytest.mark.parametrize("path", [p for p in LIBRARY if not door(p)], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_arrows_run_down(path):
    room, _module = place(path)
    for name in targets(path):
        other = name.split(".")[1]
        assert other in ROOMS, f"{path} imports {name}, which is no room"
        assert ROOMS.index(other) <= ROOMS.index(room), f"{path} imports {name} from a room above its own"
        assert other != room or name.count(".") > 1 or path.name == "__init__.py", (
            f"{path} imports its own room's front"
        )


def test_no_circles():
    """Among the files of a room, fronts apart: a file is there before those that import it."""
    modules = {place(p)[1]: p for p in LIBRARY if p.name != "__init__.py" and not door(p)}
    arrows = {
        m: {n for t in targets(p) for n in (t, t.rpartition(".")[0]) if n in modules and n != m}
        for m, p in modules.items()
    }
    while free := [m for m, to in arrows.items() if not to & arrows.keys()]:
        for m in free:
            del arrows[m]
    assert not arrows, f"a circle among {', '.join(sorted(arrows))}"


def test_models_know_no_sibling_but_the_layers():
    for path in (ROOT / "nanodiff" / "models").glob("*.py"):
        for name in targets(path):
            if name.startswith("nanodiff.models."):
                other = name.split(".")[2]
                # the first part of it
                half = (path.stem, other) in (("controlnet", "unet"), ("control_mmdit", "mmdit"))
                assert other in ("layers", "upsample") or path.stem == "layers" or half, (
                    f"{path.name} imports a sibling model: {name}"
                )


def test_every_way_to_import_is_seen():
    found = [name for _, name, _ in imported(
        "import torch.nn\nfrom a import b\ndef f():\n import c\n importlib.import_module('nanodiff.pipeline')\n"
        " import_module(f'kernels.{x}')\n __import__('diffusers')\n from .here import y\nfrom . import z\n"
    )]  # fmt: skip
    assert sorted(found) == [".", ".here", "a.b", "c", "diffusers", "kernels", "nanodiff.pipeline", "torch.nn"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_no_script_imports_another(path):
    names = {p.stem for p in SCRIPTS}
    assert not {package for package, _, _ in imports(path)} & names


@pytest.mark.parametrize("path", EVERY, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_banned_and_optional_packages(path):
    for package, name, at_top in imports(path):
        assert package not in BANNED, f"{path}: imports {name}"
        if package in ONLY_IN and "tests" not in path.parts:
            assert path.stem == ONLY_IN[package] and not at_top, f"{path}: imports {name}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_scripts_import_no_torch_before_parsing(path):
    for package, name, at_top in imports(path):
        if at_top and package in {"torch", "numpy", "nanodiff"}:
            assert name.startswith(("nanodiff.config", "nanodiff.commandline", "nanodiff.training.options")), (
                f"{path}: imports {name} at the top"
            )


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.stem)
def test_kernels_know_torch_and_triton_alone(path):
    """The lowest floor: torch and triton, and triton by the switch only, so that machines without it can read the rest."""
    for package, name, at_top in imports(path):
        assert package != "nanodiff", f"{path.name} imports {name}"
        if package == "triton" and at_top:
            assert path.stem == "switch", f"{path.name} imports triton at its top"


def test_only_layers_enters_the_kernels():
    for path in [*LIBRARY, *SCRIPTS]:
        entered = [name for package, name, _ in imports(path) if package == "kernels"]
        assert not entered or path.name == "layers.py", f"{path.name} imports {entered}"


@pytest.mark.parametrize("path", [*LIBRARY, *SCRIPTS, *KERNELS], ids=lambda p: p.stem)
def test_nothing_unsafe(path):
    text = path.read_text()
    for pattern in (
        "weights_only=False",
        r"pickle\.load",
        r"(?<!\.)\beval\(",
        r"\bexec\(",
        "shell=True",
        "extractall",
        r"yaml\.load",
        r"except[^:]*:\s*pass",
    ):
        assert not re.search(pattern, text), f"{path}: {pattern}"


def test_the_maps_are_true():
    """README's rooms are those that there are, in their order; docs/files.md has every file."""
    readme = (ROOT / "README.md").read_text()
    shown = re.findall(r"^  (\w+)(?:/|\.py) ", readme, re.M)
    assert tuple(shown) == ROOMS
    assert (ROOT / "docs" / "files.md").read_text() == house.files(), "python -m tests.house files > docs/files.md"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text()) <= 12_000


def test_every_library_file_opens_with_a_docstring():
    for path in [*LIBRARY, *SCRIPTS, *KERNELS]:
        if path.name != "__init__.py":
            assert ast.get_docstring(ast.parse(path.read_text())), path


def test_no_path_of_a_machine():
    for path in ROOT.rglob("*"):
        inside = path.relative_to(ROOT).parts
        if path.suffix in {".py", ".md", ".toml", ".json", ".lock", ""} and path.is_file() and inside[0] not in SKIPPED:
            text = path.read_bytes().decode("utf-8", errors="ignore")
            assert not re.search(r"(?<![\w.])/(work|root|farm)/", text), path


def test_requirements_state_floors_and_lock():
    assert "torch>=2.10" in (ROOT / "pyproject.toml").read_text()
    lock = (ROOT / "requirements.lock").read_text()
    assert "torch==2.13.0" in lock and "triton==3.7.1" in lock
    assert not {line.split("==")[0].lower() for line in lock.splitlines()} & BANNED


def test_golden_files_stay_small():
    size = sum(p.stat().st_size for p in Path(ROOT / "tests" / "golden").rglob("*") if p.is_file())
    assert size < 42e6


@pytest.mark.parametrize(
    "front", ["nanodiff", "nanodiff.pipeline", "nanodiff.lora", "nanodiff.data", "nanodiff.weights"]
)
def test_what_a_front_offers_says_its_types(front):
    """Functions, and the methods of classes; SDXL and SD 3 answer what their bases ask."""
    offered = importlib.import_module(front)
    for name in offered.__all__:
        one = getattr(offered, name)
        own = inspect.isclass(one) and one.__module__.startswith("nanodiff") and name not in ("SD3", "SDXL", "Joint")
        methods = [f for k, f in vars(one).items() if inspect.isfunction(f) and k[0] != "_"] if own else []
        for function in [one] if inspect.isfunction(one) else methods:
            said = inspect.signature(function)
            bare = [
                p.name for p in said.parameters.values() if p.annotation is p.empty and p.name not in ("self", "cls")
            ]
            assert not bare and said.return_annotation is not said.empty, f"{function.__qualname__}: {', '.join(bare)}"


def test_trainings_read_the_librarys_options_alone():
    """Functions of nanodiff/training take options.Training, Noise and Adapters, and know nothing of the scripts' own classes."""
    from nanodiff.training import options

    classes = {c.__name__: set(dir(c)) for c in (options.Training, options.Noise, options.Adapters)}
    checked = 0
    for path in (ROOT / "nanodiff" / "training").glob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef) or (path.name == "options.py" and function.name == "decisive"):
                continue
            taken = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
            kinds = {a.arg: ast.unparse(a.annotation) if a.annotation else None for a in taken}
            assert "cfg" not in kinds or kinds["cfg"] in classes, f"{path.name}: {function.name}(cfg) of no class"
            if "cfg = self.cfg" in ast.unparse(function):
                kinds["cfg"] = "Training"
            for node in ast.walk(function):
                if isinstance(node, ast.Attribute):
                    owner, name = ast.unparse(node.value), node.attr
                elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr") and isinstance(node.args[1], ast.Constant):  # fmt: skip
                    owner, name = ast.unparse(node.args[0]), node.args[1].value
                else:
                    continue
                known = classes.get("Training" if owner.endswith(("self.cfg", "run.cfg")) else kinds.get(owner))
                assert known is None or name in known, f"{path.name}: {function.name} reads {owner}.{name}"
                checked += known is not None
    assert checked > 80
