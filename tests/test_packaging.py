"""The wheel and the sdist build without a network from what the build asks for, and work where nothing
is installed but what they ask for.

Environments here are new virtual environments, into which the packages that a list of requirements needs are linked
from the environment of the tests: so a package that nobody has declared is not there.
"""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.thorough
ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CORE, EXTRAS = PROJECT["project"]["dependencies"], PROJECT["project"]["optional-dependencies"]
WANTED = {
    *(path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "scorelm").rglob("*") if path.is_file()),
    *(f"scorelm/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "recipes").iterdir()),
}
USES = {
    "tensorboard": "import torch.utils.tensorboard",
    "viz": "import scorelm.viz.figure, scorelm.viz.plots, scorelm.viz.chart",
    "serve": "import scorelm.serving.app",
    "ray": "import scorelm.serving.ray",
    "numbers": "from scorelm.text.normalization import normalize; assert normalize('21', ('numbers',)) == 'twenty-one'",
    "eval": "from scorelm.evaluation.diversity import mauve; assert mauve([[1.0], [2.0]], [[1.0], [2.0]]) == 1.0",
    "harness": "import scorelm.evaluation.harness",
}
"""What of ours needs an extra, as a line of Python, beside the packages of the extra themselves."""


class Built(NamedTuple):
    """What a release is."""

    wheel: Path
    sdist: Path


def needed(requirements: list[str]) -> set[str]:
    """The names of the distributions that these need, and those need in turn.

    Raises:
        PackageNotFoundError: one of them is not installed.
    """
    found, waiting = set[tuple[str, str]](), [(Requirement(line), "") for line in requirements]
    while waiting:
        wanted, extra = waiting.pop()
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": extra}):
            continue
        for one in {"", *wanted.extras}:
            key = (re.sub(r"[-_.]+", "-", wanted.name).lower(), one)
            if key not in found and key[0] != "scorelm":
                found.add(key)
                waiting += [(Requirement(line), one) for line in metadata.requires(key[0]) or []]
            elif key[0] == "scorelm" and one:
                waiting += [(Requirement(line), "") for line in EXTRAS[one]]
    return {name for name, _ in found}


def make_environment(place: Path, requirements: list[str]) -> Path:
    """The Python of a virtual environment that has what these need and nothing else."""
    venv.create(place, with_pip=False, symlinks=True)
    (site,) = place.glob("lib/python*/site-packages")
    for name in needed(requirements):
        here = metadata.distribution(name)
        for top in {file.parts[0] for file in here.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(here.locate_file(top))))
    return place / "bin" / "python"


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """What a command prints that succeeds."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    place = tmp_path_factory.mktemp("built")
    python = make_environment(place / "builder", ["build", *PROJECT["build-system"]["requires"]])
    run(python, "-m", "build", "--no-isolation", "--outdir", place, ROOT)
    (wheel,), (sdist,) = place.glob("*.whl"), place.glob("*.tar.gz")
    return Built(wheel, sdist)


def install(built: Built, place: Path, requirements: list[str]) -> Path:
    """The Python of an environment with the wheel, what these need, and nothing else."""
    python = make_environment(place, requirements)
    quiet = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-index")
    run(sys.executable, "-m", "pip", "--python", python, "install", *quiet, built.wheel)
    return python


def test_the_sdist_and_a_wheel_from_it_have_everything(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        found = {name for name in archive.namelist() if name.startswith("scorelm/")}
    assert found == {name for name in WANTED if "__pycache__" not in name}
    assert {"scorelm/assets/model/model.safetensors", "scorelm/recipes/demo.toml", "scorelm/viz/film.html"} <= found
    with tarfile.open(built.sdist) as archive:
        top = {name.split("/")[1] for name in archive.getnames()}
    assert {"src", "recipes", "tests", "docs", "benchmarks", "constraints.txt", "LICENSE", "README.md"} <= top
    assert not top & {".ci", ".gpu", ".git", ".venv", "runs"}


def test_the_wheel_works_where_only_its_own_dependencies_are(built: Built, tmp_path: Path) -> None:
    python = install(built, tmp_path / "core", CORE)
    absent = {"matplotlib", "fastapi", "transformers", "pytest", "sacrebleu"}
    code = f"from importlib.util import find_spec; assert not [name for name in {absent!r} if find_spec(name)]"
    run(python, "-c", f"{code}; from scorelm import ScoreLM, Tokenizer, price, train", cwd=tmp_path)
    command = python.with_name("scorelm")
    assert run(command, "--version", cwd=tmp_path).strip() == PROJECT["project"]["version"]
    assert len(run(command, "sample", "-n", "2", "--steps", "4", "--device", "cpu", cwd=tmp_path).splitlines()) == 2


@pytest.mark.parametrize("extra", sorted(set(EXTRAS) - {"dev", "ci"}))
def test_every_extra_brings_what_it_is_for(built: Built, extra: str, tmp_path: Path) -> None:
    try:
        python = install(built, tmp_path / extra, [*CORE, *EXTRAS[extra]])
    except metadata.PackageNotFoundError as absent:
        pytest.skip(f"not installed: {absent}")
    names = {Requirement(line).name for line in EXTRAS[extra]} - {"scorelm"}
    tops = {top for top, owners in metadata.packages_distributions().items() if names & set(owners)}
    lines = [*(f"import {top}" for top in sorted(tops) if top.isidentifier() and top[0] != "_"), USES.get(extra, "")]
    run(python, "-c", "\n".join(lines), cwd=tmp_path)
