"""The rooms' rules: imports point one way, every module imports alone, and nothing heavy loads before it is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "scorelm"
MODULES = sorted(p for p in SOURCE.rglob("*.py") if p.name != "__main__.py")
ALLOWED = {
    "text": {"text"},
    "noise": {"noise", "config"},
    "model": {"model", "noise", "text", "config"},
    "sampling": {"sampling", "model", "noise", "text", "config", "device"},
    "training": {"training", "baselines", "model", "noise", "text", "config", "device"},
    "baselines": {"baselines", "training", "sampling", "model", "noise", "text", "config", "device"},
    "evaluation": {"evaluation", "baselines", "sampling", "model", "noise", "text", "config", "device"},
}


def dotted(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def module_level_imports(path: Path) -> set[str]:
    """Rooms of scorelm that a module imports when it is itself imported."""
    rooms = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("scorelm."):
            rooms.add(node.module.split(".")[1])
    return rooms


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_point_downwards(path: Path) -> None:
    room = path.relative_to(SOURCE).parts[0]
    if room in ALLOWED:
        assert module_level_imports(path) <= ALLOWED[room] | {"untrusted"}  # which imports nothing of scorelm


def test_noise_and_model_never_import_training() -> None:
    """Not even inside functions."""
    for path in MODULES:
        if path.relative_to(SOURCE).parts[0] in ("noise", "model", "text"):
            assert "scorelm.training" not in path.read_text()


def test_every_module_imports() -> None:
    names = ", ".join(repr(dotted(p)) for p in MODULES)
    code = f"import importlib\nfor name in [{names}]: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_help_loads_neither_torch_nor_datasets() -> None:
    code = (
        "import sys\ntry:\n  from scorelm.cli import main; main(['--help'])\n"
        "except SystemExit: assert not {'torch', 'datasets', 'grain'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout
