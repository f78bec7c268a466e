"""The package's imports point where they may, its folders are complete, no file has one machine's paths."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import ROOT

from flashkat_hf.checkpoints.remote_code import CODE_FILES

PACKAGE = ROOT / "flashkat_hf"
# Files beside the folders; they may import every folder.
TOP = {"__init__", "__main__", "cli", "functions", "registration", "timm"}
SHARED = {
    "_version",
    "files",
    "graphs",
    "hub_errors",
    "lazy",
    "messages",
}  # beside the folders; every folder but model may import them
MAY_IMPORT = {  # which other folders a folder may import
    "model": set(),
    "data": set(),
    "checkpoints": {"model"},
    "foreign": {"model"},
    "conversion": {"checkpoints", "model", "data"},
    "deployment": {"conversion", "checkpoints", "model", "data"},
    "hub": {"conversion", "checkpoints", "model"},
    "training": {"hub", "conversion", "checkpoints", "model", "data"},
    "inference": {"training", "conversion", "checkpoints", "model", "data"},
}
PLACES = {"", "data/gpu", *MAY_IMPORT}
ORDER = (  # of model/: a file imports what stands before it; a new file needs a place here
    "coefficients",
    "mimetic",
    "reference",
    "native_rational",
    "fitting",
    "pytorch_attention",
    "triton_",
    "operators",
    "op_rational",
    "op_",
    "fusing",
    "layers",
    "configuration_flashkat",
    "embeddings_flashkat",
    "modeling_flashkat",  # the config imports it and what follows for type checkers alone
    "masked_image_flashkat",
    "backbone_flashkat",
)
OF_CHECKPOINTS = sys.stdlib_module_names | {"torch", "triton", "transformers", "huggingface_hub"}
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
        and any(ast.unparse(handler.type or handler) == "ImportError" for handler in block.handlers)
        for statement in block.body
        for node in ast.walk(statement)
    }
    result: list[Import] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            result += [Import(0, alias.name, False, node in caught) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            kernels = [f"{node.module}.{name}" for name in names if name.startswith("triton_")]
            modules = kernels or [node.module] if node.module else names
            result += [Import(node.level, module, not node.module, node in caught) for module in modules]
    return result


def rank(stem: str) -> int:
    """Return the place of a file of model/ in its order; a file without one comes last."""
    for place, name in enumerate(ORDER):
        if stem == name or (name.endswith("_") and stem.startswith(name)):
            return place
    return len(ORDER)


def objection(folders: list[str], stem: str, what: Import) -> str | None:
    """Return what is wrong with an import of the file `stem` in the given folders, or None."""
    folder = folders[0] if folders else ""
    if what.level == 0:
        name = what.module.partition(".")[0]
        if name == "flashkat_hf":
            return "the package's own files are imported by relative names"
        if name == "triton" and not stem.startswith("triton_"):
            return "kernels stand in triton_*.py"
        if folder == "model" and name not in OF_CHECKPOINTS:
            return "a checkpoint brings files that need PyTorch, triton and transformers alone"
        builds_on_torch = folder == "model" and rank(stem) < rank("configuration_flashkat")
        if builds_on_torch and name in ("transformers", "huggingface_hub"):
            return "formula, kernels, operators and layers need PyTorch alone"
        return None
    target = [*folders, stem][: -what.level] + what.module.split(".")
    name = target[-1]
    if name.startswith("triton_") and not stem.startswith("triton_") and not what.caught:
        return "the file must work without triton"
    if folder == "model":
        if what.level != 1 or what.bare or len(target) != 2:
            return "the Hub only follows `from .sibling import name`"
        wrong_order = name not in (*ORDER[-3:], stem) and rank(name) > rank(stem)
        return "it builds on this file" if wrong_order else None
    if len(target) == 1 and name not in MAY_IMPORT:
        known = name in SHARED or (not folder and stem in TOP and name in TOP)
        return None if known else f"beside the folders only {', '.join(sorted(SHARED))} may be imported"
    if not folder:
        return None if stem in TOP else "files that every folder may import use no folder"
    if target[0] not in {folder} | MAY_IMPORT[folder]:
        return f"{folder}/ may use {', '.join(sorted(MAY_IMPORT[folder])) or 'no folder'}"
    return None


def objections(path: Path, source: str) -> list[str]:
    """Return what is wrong with a file of the package and its imports; `path` is below `flashkat_hf`."""
    *folders, stem = path.with_suffix("").parts
    if "/".join(folders) not in PLACES:
        return [f"{path}: no such folder of the package, see PLACES in {Path(__file__).name}"]
    if not folders and stem not in TOP | SHARED:
        return [f"{path}: a new file belongs into a folder"]
    if folders == ["model"] and stem != "__init__" and rank(stem) == len(ORDER):
        return [f"{path}: a new file of model/ needs a place in ORDER in {Path(__file__).name}"]
    found = ((what, objection(folders, stem, what)) for what in imports(source))
    return [f"{path} imports {what}: {message}" for what, message in found if message]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports(path):
    assert objections(path.relative_to(PACKAGE), path.read_text()) == []


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        # between folders
        ("data/samples.py", "from ..training.recipe import Settings", "data/ may use no folder"),
        ("data/samples.py", "from ..checkpoints import loading", "data/ may use no folder"),
        ("data/gpu/decoding.py", "from ...model.op_rational import rational", "data/ may use no folder"),
        ("checkpoints/loading.py", "from ..conversion.source import Source", "checkpoints/ may use model"),
        ("checkpoints/loading.py", "from .. import data", "checkpoints/ may use model"),
        ("conversion/proof.py", "def f():\n    from ..hub import push", "conversion/ may use"),
        ("conversion/proof.py", "if TYPE_CHECKING:\n    from ..training import run", "conversion/ may use"),
        ("hub/card.py", "from ..data import open_data", "hub/ may use checkpoints, conversion, model"),
        ("hub/card.py", "try:\n    from ..training import run\nexcept ImportError: pass", "hub/ may use"),
        # beside the folders
        ("training/run.py", "from ..cli import main", "beside the folders only _version, files"),
        ("training/run.py", "from .. import cli", "beside the folders only"),
        ("training/run.py", "from .. import __version__", "beside the folders only"),
        ("messages.py", "from .cli import main", "beside the folders only"),
        ("files.py", "from .data import open_data", "use no folder"),
        ("files.py", "from . import model", "use no folder"),
        # by absolute names
        ("training/run.py", "import flashkat_hf.hub", "by relative names"),
        ("cli.py", "from flashkat_hf.hub import push", "by relative names"),
        ("model/layers.py", "import flashkat_hf", "by relative names"),
        # in model/
        ("model/layers.py", "from ..messages import warn", "the Hub only follows"),
        ("model/layers.py", "from ..model.op_rational import rational", "the Hub only follows"),
        ("model/layers.py", "from . import operators", "the Hub only follows"),
        ("model/layers.py", "from .kernels.op_rational import rational", "the Hub only follows"),
        ("model/op_rational.py", "from .layers import GroupRational", "it builds on this file"),
        ("model/reference.py", "from .op_rational import rational", "it builds on this file"),
        ("model/triton_math.py", "def f():\n    from .op_rational import rational", "it builds on this file"),
        ("model/layers.py", "import transformers", "need PyTorch alone"),
        ("model/coefficients.py", "from huggingface_hub.dataclasses import strict", "need PyTorch alone"),
        ("model/modeling_flashkat.py", "import timm", "a checkpoint brings files"),
        # without triton
        ("model/operators.py", "import triton", "kernels stand in"),
        ("data/gpu/decoding.py", "def f():\n    import triton.language as tl", "kernels stand in"),
        ("model/op_rational.py", "from .triton_rational import rational_forward", "must work without triton"),
        ("data/gpu/decoding.py", "from .triton_crops import resized_crops", "must work without triton"),
        ("training/run.py", "from ..model import triton_math", "must work without triton"),
        # new files
        ("helpers.py", "", "a new file belongs into a folder"),
        ("tools/helpers.py", "import torch", "no such folder"),
        ("data/cpu/decoding.py", "", "no such folder"),
        ("model/helpers.py", "", "needs a place in ORDER"),
        ("model/op_new.py", "from .fusing import fuses", "it builds on this file"),
    ],
)  # fmt: skip
def test_a_wrong_import_is_found(path, source, message):
    (wrong,) = objections(Path(path), source)
    assert message in wrong


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("cli.py", "from .training import train"),
        ("__init__.py", "from ._version import __version__"),
        ("files.py", "from .messages import one_line"),
        ("training/run.py", "import timm\nfrom ..hub import push\nfrom .. import data, files"),
        ("data/gpu/decoding.py", "from ..samples import Sample\nfrom ...messages import extra"),
        ("model/op_rational.py", "try:\n    from .triton_math import inverse\nexcept ImportError:\n    pass"),
        ("model/layers.py", "import torch\nfrom .fusing import fuses\nfrom .op_rational import rational"),
        ("model/triton_rational.py", "import triton\nfrom .triton_math import inverse"),
    ],
)  # fmt: skip
def test_a_right_import_is_let_pass(path, source):
    assert objections(Path(path), source) == []


def test_folders():
    """Every folder is known here, has tests, and has a README of 5 to 20 lines that names its files."""
    folders = {path.parent for path in FILES}
    assert {str(folder.relative_to(PACKAGE)) for folder in folders} == PLACES - {""} | {"."}
    assert {path.stem for path in PACKAGE.glob("*.py")} == TOP | SHARED
    tests = {str(path.parent.relative_to(ROOT / "tests")) for path in ROOT.glob("tests/*/**/test_*.py")}
    assert tests == PLACES - {""}
    for folder in folders - {PACKAGE}:
        readme = (folder / "README.md").read_text()
        assert 5 <= len(readme.splitlines()) <= 20, folder
        names = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
        assert {name for name in names if f"`{name}`" not in readme} == set(), folder


def test_each_file_of_tests_has_a_name_of_its_own():
    """Else pytest cannot collect the whole tree, as `pytest -m gpu` does."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_a_checkpoint_brings_the_files_of_model():
    assert set(CODE_FILES) == {path.name for path in (PACKAGE / "model").glob("*.py")} - {"__init__.py"}
    unused = [stem for stem in ORDER if not any(name.startswith(stem) for name in CODE_FILES)]
    assert not unused, f"{unused} of ORDER have no file"


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
