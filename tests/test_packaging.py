"""The wheel and the sdist build from the tree, without a network, and have in them what a user needs."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WANTED = {
    *(path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "scorelm").rglob("*") if path.is_file()),
    *(f"scorelm/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "recipes").iterdir()),
}


@pytest.mark.thorough
def test_the_sdist_and_a_wheel_from_it_have_everything(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if name.startswith("scorelm/")}
    assert found == {name for name in WANTED if "__pycache__" not in name}
    assert {"scorelm/assets/model/model.safetensors", "scorelm/recipes/demo.toml", "scorelm/viz/film.html"} <= found
    with tarfile.open(sdist) as archive:
        top = {name.split("/")[1] for name in archive.getnames()}
    assert {"src", "recipes", "tests", "docs", "benchmarks", "constraints.txt", "LICENSE", "README.md"} <= top
    assert not top & {".ci", ".gpu", ".git", ".venv", "runs"}
