"""The rules of docs/architecture.md, read off the imports."""

import ast
import re
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
    """Each imported module ("." in front of a sibling's name), and whether it stands inside a `try`."""
    tree = ast.parse(path.read_text())
    guarded = {node for block in ast.walk(tree) if isinstance(block, ast.Try) for node in ast.walk(block)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node in guarded) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(("." * node.level + (node.module or ""), node in guarded))
    return found


def test_every_file_has_a_layer():
    assert LAYERS.keys() == {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_point_downwards(path):
    for module, guarded in imports(path):
        if module.startswith("."):
            assert LAYERS[module[1:]] <= LAYERS[path.stem], f"{path.name} imports {module}"
            if path.name == "ops.py" and module.startswith(".triton"):
                assert guarded, "ops.py must work without triton"
        elif module.split(".")[0] == "triton":
            assert path.name.startswith("triton_")
        elif module.split(".")[0] == "transformers":
            assert LAYERS[path.stem] >= 4


def test_no_path_of_one_machine():
    folders = [PACKAGE, *(ROOT / name for name in ("benchmarks", "docs", "examples", "scripts"))]
    paths = [path for folder in folders for path in folder.rglob("*") if path.suffix in {".py", ".md", ".jsonl"}]
    for path in [*paths, *ROOT.glob("*.*")]:
        if path.is_file():
            assert not re.search(r"(?<![\w.])/(home|root|work|Users)/", path.read_text()), path
