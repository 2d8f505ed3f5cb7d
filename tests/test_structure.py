"""The house's rules, on every module: imports point downwards, nobody reaches inside a model, extras stay optional."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

SOURCE = Path(__file__).parents[1] / "src" / "scorelm"
MODULES = sorted(SOURCE.rglob("*.py"))
ROOMS = (
    "errors", "device", "parallel", "config", "text", "noise", "model", "sampling", "objectives", "lm", "pipeline",
    "evaluation", "training", "viz", "serving", "transformers", "cli", "__init__", "__main__",
)  # fmt: skip
"""From the bottom to the top: a module imports from its own room and from those before it."""
INSIDE = {"trunk", "token_in", "prior", "context", "self_condition", "film"}
"""What only the model's own room knows of a denoiser."""


def room_of(dotted: str) -> str:
    """The room of a module by its full name; the package itself is ``__init__``."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def dotted(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def imports(tree: ast.AST) -> set[str]:
    """Every module of scorelm that is imported anywhere in a module, inside functions and for type checkers too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "scorelm":
            names = (
                [f"scorelm.{alias.name}" for alias in node.names if alias.name != "__version__"]
                if node.module == "scorelm"
                else [node.module]
            )
            found |= set(names)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "scorelm"}
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "import_module":
            found |= {a.value for a in node.args if isinstance(a, ast.Constant) and str(a.value).startswith("scorelm")}
    return found


def wrong_imports(path: Path, source: str) -> set[str]:
    """The imports of a module that do not point downwards."""
    own = room_of(dotted(path))
    level = ROOMS.index(own)
    known = {room: k for k, room in enumerate(ROOMS)}
    return {name for name in imports(ast.parse(source)) if known.get(room_of(name), len(ROOMS)) > level}


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_point_downwards(path: Path) -> None:
    if room_of(dotted(path)) != "assets":
        assert not wrong_imports(path, path.read_text())


def test_the_rule_sees_lazy_imports_and_rooms_that_there_are_not() -> None:
    path = SOURCE / "model" / "denoiser.py"
    for line in (
        "from scorelm.training import train", "import scorelm.cli", "from scorelm import lm",
        "from scorelm.attic import x", "import_module('scorelm.viz.film')",
    ):  # fmt: skip
        assert wrong_imports(path, f"def f():\n    {line}\n")
    assert not wrong_imports(path, "from scorelm.noise.schedule import Log\nimport torch\n")


def test_every_room_has_its_place() -> None:
    assert {room_of(dotted(path)) for path in MODULES} - {"assets"} == set(ROOMS)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_nobody_reaches_inside_a_denoiser_or_asks_which_objective_it_is(path: Path) -> None:
    room = room_of(dotted(path))
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and room != "model":
            inner = node.value
            owner = inner.attr if isinstance(inner, ast.Attribute) else getattr(inner, "id", "")
            assert not (node.attr in INSIDE and owner == "denoiser"), f"line {node.lineno}: denoiser.{node.attr}"
        if isinstance(node, ast.Compare):
            text = ast.unparse(node)
            assert not ("objective" in text and any(name in text for name in ("'score'", "'masked'", "'autoreg"))), text


def test_bad_input_is_an_input_error_everywhere() -> None:
    """The options' own validators raise ValueError, which pydantic asks for."""
    for path in MODULES:
        if room_of(dotted(path)) != "config":
            assert "raise ValueError" not in path.read_text(), path


def test_every_module_imports_without_the_extras() -> None:
    """In one process, in which what only an extra brings cannot be imported."""
    project = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text())["project"]
    extras = {
        "matplotlib",
        "plotext",
        "sacrebleu",
        "transformers",
        "mauve",
        "tensorboard",
        "threadpoolctl",
        "sklearn",
        "playwright",
        "fastapi",
        "uvicorn",
        "sse_starlette",
        "prometheus_client",
        "starlette",
        "axe_playwright_python",
        "openai",
        "schemathesis",
        "ray",
        "num2words",
        "wandb",
        "trackio",
        "lm_eval",
        "peft",
        "gguf",
        "accelerate",
    }
    optional = project["optional-dependencies"].items()
    lines = [line for key, lines in optional if key not in ("dev", "docs") for line in lines]
    brought = {Requirement(line).name.partition("-")[0] for line in lines} - {"scorelm"}
    assert brought <= {name.partition("_")[0] for name in extras}
    whole_rooms = ("serving", "transformers")  # need their extras
    names = [dotted(p) for p in MODULES if p.name != "__main__.py" and p.parent.name not in whole_rooms]
    code = f"""
import importlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {extras!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
for name in {names!r}:
    importlib.import_module(name.removesuffix(".__init__"))
import scorelm
assert set(dir(scorelm)) == set(scorelm.__all__) and all(getattr(scorelm, name) for name in dir(scorelm))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_help_loads_neither_torch_nor_datasets() -> None:
    code = (
        "import sys\ntry:\n  from scorelm.cli import main; main(['--help'])\n"
        "except SystemExit: assert not {'torch', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout


def test_the_readme_has_a_line_for_every_file() -> None:
    tree = (SOURCE.parents[1] / "README.md").read_text(encoding="utf-8").partition("src/scorelm/\n")[2]
    named = {word for line in tree.splitlines() for word in line.split() if word.endswith(".py")}
    found = {path.name for path in MODULES if path.name not in ("__init__.py", "__main__.py")}
    assert named - {"__init__.py"} == found
