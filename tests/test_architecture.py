"""Who may import whom in the package, read off the imports; and what stands in the repository's files."""

import ast
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import ROOT

from flashkat_hf.checkpoints.remote_code import CODE_FILES

PACKAGE = ROOT / "flashkat_hf"
SHARED = {"_version", "files", "messages"}  # files beside the folders that every folder but model may use
MAY_IMPORT = {  # which other folders each folder may import
    "model": set(),
    "data": set(),
    "checkpoints": {"model"},
    "conversion": {"checkpoints", "model", "data"},
    "hub": {"conversion", "checkpoints", "model"},
    "training": {"hub", "conversion", "checkpoints", "model", "data"},
}
ORDER = (  # of model/: a file imports what stands before it
    "coefficients",
    "mimetic",
    "reference",
    "triton_",
    "operators",
    "op_rational",
    "op_",
    "fusing",
    "layers",
    "configuration_flashkat",
    "modeling_flashkat",  # the config imports it for type checkers alone
)
FILES = sorted(PACKAGE.rglob("*.py"))


class Import(NamedTuple):
    """A module that is imported, and whether its absence is caught; `bare` is `from . import module`."""

    level: int
    module: str
    bare: bool
    caught: bool

    def __str__(self) -> str:
        return f"{'.' * self.level}{' import ' if self.bare else ''}{self.module}"


def imports(source: str) -> list[Import]:
    """Return the imports of a file, those inside functions and `if` too."""
    tree = ast.parse(source)
    caught = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.Try)
        and any(ast.unparse(h.type or h) == "ImportError" for h in block.handlers)
        for statement in block.body
        for node in ast.walk(statement)
    }
    found: list[Import] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [Import(0, alias.name, False, node in caught) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module] if node.module else [alias.name for alias in node.names]
            found += [Import(node.level, module, not node.module, node in caught) for module in modules]
    return found


def rank(name: str) -> int:
    return next(
        i for i, stem in enumerate(ORDER) if name == stem or (stem.endswith("_") and name.startswith(stem))
    )


def objections(path: Path, source: str) -> list[str]:
    """Return what is wrong with the imports of a file of the package, given by its path below `flashkat_hf`."""
    *folders, stem = path.with_suffix("").parts
    folder = folders[0] if folders else ""
    wrong = []
    for found in imports(source):
        if found.level == 0:
            first = found.module.partition(".")[0]
            if first == "flashkat_hf":
                wrong.append(
                    f"{path}: {found} belongs to the package, whose files are imported by relative names"
                )
            if first == "triton" and not stem.startswith("triton_"):
                wrong.append(f"{path} imports {found}: kernels stand in triton_*.py")
            if first == "transformers" and folder == "model" and rank(stem) < rank("configuration_flashkat"):
                wrong.append(
                    f"{path} imports {found}: formula, kernels, operators and layers need PyTorch alone"
                )
            continue
        target = [*folders, stem][: -found.level] + found.module.split(".")
        name = target[-1]
        if name.startswith("triton_") and not stem.startswith("triton_") and not found.caught:
            wrong.append(f"{path} imports {found} and must work without triton")
        if folder == "model":
            if found.level != 1 or found.bare or len(target) != 2:
                wrong.append(f"{path} imports {found}: the Hub only follows `from .sibling import name`")
            elif name not in ("modeling_flashkat", stem) and rank(name) > rank(stem):
                wrong.append(f"{path} imports {found}, which builds on it")
        elif folder and len(target) == 1 and name not in SHARED | MAY_IMPORT.keys():
            wrong.append(
                f"{path} imports {found}: of these only {', '.join(sorted(SHARED))} are for every folder"
            )
        elif (
            folder
            and not (len(target) == 1 and name in SHARED)
            and target[0] not in {folder} | MAY_IMPORT[folder]
        ):
            allowed = ", ".join(sorted(MAY_IMPORT[folder])) or "no folder"
            wrong.append(f"{path} imports {found}: {folder}/ may use {allowed}")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports(path):
    assert objections(path.relative_to(PACKAGE), path.read_text()) == []


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("data/samples.py", "from ..training.recipe import Settings", "data/ may use no folder"),
        ("data/gpu/decoding.py", "from ...model.op_rational import rational", "data/ may use no folder"),
        ("hub/card.py", "from ..data import open_data", "hub/ may use checkpoints, conversion, model"),
        ("checkpoints/loading.py", "from ..conversion.source import Source", "checkpoints/ may use model"),
        ("conversion/proof.py", "def f():\n    from ..hub import push", "conversion/ may use"),
        ("training/run.py", "from ..cli import main", "are for every folder"),
        ("training/run.py", "from .. import cli", "are for every folder"),
        ("training/run.py", "import flashkat_hf.hub", "by relative names"),
        ("model/layers.py", "from ..messages import warn", "the Hub only follows"),
        ("model/layers.py", "from . import operators", "the Hub only follows"),
        ("model/op_rational.py", "from .layers import GroupRational", "which builds on it"),
        ("model/reference.py", "from .op_rational import rational", "which builds on it"),
        ("model/layers.py", "import transformers", "need PyTorch alone"),
        ("model/operators.py", "import triton", "kernels stand in"),
        ("model/op_rational.py", "from .triton_rational import rational_forward", "must work without triton"),
        ("data/gpu/decoding.py", "from .triton_crops import resized_crops", "must work without triton"),
    ],
)
def test_a_wrong_import_is_found(path, source, message):
    (wrong,) = objections(Path(path), source)
    assert message in wrong


def test_folders():
    """Every folder is known here and has a README of 5 to 20 lines; a checkpoint brings the files of model/."""
    folders = {path.parent for path in FILES} - {PACKAGE}
    assert {str(folder.relative_to(PACKAGE)) for folder in folders} == MAY_IMPORT.keys() | {"data/gpu"}
    for folder in folders:
        lines = (folder / "README.md").read_text().splitlines()
        assert 5 <= len(lines) <= 20, f"{folder}/README.md has {len(lines)} lines"
        names = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
        missing = [name for name in sorted(names) if f"`{name}`" not in "\n".join(lines)]
        assert not missing, f"{folder}/README.md does not name {missing}"
    assert set(CODE_FILES) == {path.name for path in (PACKAGE / "model").glob("*.py")} - {"__init__.py"}


def test_no_path_of_one_machine():
    listing = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    git = subprocess.run(listing, capture_output=True, check=False)
    if git.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in git.stdout.decode().split("\0") if name]
    for path in paths:
        if path.is_file():
            text = path.read_text(errors="replace")
            assert not re.search(r"(?<![\w.])/(home|root|work|Users|mnt|opt|tmp)/\w", text), path
