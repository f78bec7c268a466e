"""The rules of docs/architecture.md, read off the imports, and the paths in the repository's files."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "flashkat_hf"
LAYERS = {
    name: int(layer)
    for layer, name in re.findall(r"^\| (\d) \| `(\w+)\.py`", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
}
FILES = sorted(PACKAGE.glob("*.py"))


def imports(path: Path) -> list[tuple[str, bool]]:
    """Each imported module ("." in front of a sibling's name), and whether its absence is caught."""
    tree = ast.parse(path.read_text())
    caught = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.Try) and any(ast.unparse(h.type or h) == "ImportError" for h in block.handlers)
        for statement in block.body
        for node in ast.walk(statement)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node in caught) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(("." * node.level + (node.module or ""), node in caught))
    return found


def test_every_file_has_a_layer():
    assert LAYERS.keys() == {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_point_downwards(path):
    for module, caught in imports(path):
        first, _, sibling = module.partition(".")
        if first == "":
            assert sibling in LAYERS, f"{path.name}: the Hub only follows `from .sibling import name`"
            assert LAYERS[sibling] <= LAYERS[path.stem], f"{path.name} imports {module}"
            if sibling.startswith("triton_") and not path.name.startswith("triton_"):
                assert path.name in ("ops.py", "fused_ops.py", "batch_decoding.py", "batch_augmentation.py"), (
                    f"{path.name} imports {module}: kernels are reached by operators, those of images by batch_*.py"
                )
                assert caught, f"{path.name} must work without triton"
        else:
            assert first != "flashkat_hf", f"{path.name}: siblings are imported by relative names"
            assert first != "triton" or path.name.startswith("triton_"), f"{path.name} imports {module}"
            assert first != "transformers" or LAYERS[path.stem] >= 4, f"{path.name} imports {module}"


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
