"""The repository of the operators alone is built, loaded by `kernels`, and used beside the package."""

import json
import os
import re
import runpy
import subprocess
import sys

import pytest
import yaml
from helpers import CASES, DATA, ROOT

from flashkat_hf.hub.card import LOCAL_PATH

SCRIPT = ROOT / "scripts/build_kernel_repository.py"


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    out = tmp_path_factory.mktemp("kernel") / "flashkat-rational"
    runpy.run_path(str(SCRIPT))["build"](out)
    return out


def test_layout(repository):
    """The library's own parsers read the repository; its code is the package's to the byte."""
    pytest.importorskip("kernels")
    from kernels._rust import Build, Metadata

    backends = [str(backend).lower() for backend in Build.open(repository).general.backends]
    assert [backend.rpartition(".")[2] for backend in backends] == ["cpu", "cuda", "rocm"]
    variants = sorted((repository / "build").iterdir())
    assert [variant.name for variant in variants] == ["torch-cpu", "torch-cuda", "torch-rocm"]
    identifiers = set()
    for variant in variants:
        metadata = Metadata.read_from_file(variant / "metadata.json")
        assert (str(metadata.name), metadata.version, metadata.python_depends) == ("flashkat-rational", 1, [])
        assert re.fullmatch(rf"_flashkat_rational_{variant.name[6:]}_[0-9a-f]{{7}}", metadata.id)
        identifiers.add(metadata.id)
        for path in variant.glob("*.py"):
            source = ROOT / "flashkat_hf/model" / path.name
            if path.name in ("__init__.py", "layers.py"):
                source = ROOT / "scripts/kernel_repository" / path.name
            assert path.read_bytes() == source.read_bytes()
            assert path.read_bytes() == (repository / "torch-ext/flashkat_rational" / path.name).read_bytes()
    assert len(identifiers) == 3


def test_card(repository):
    text = (repository / "README.md").read_text()
    data = yaml.safe_load(text.split("---")[1])
    assert (data["library_name"], data["license"]) == ("kernels", "mit")
    assert "{" not in text, "a word was not filled in"
    assert not LOCAL_PATH.search(text)


def test_use(repository, tmp_path):
    """The repository works in a process of its own, first without the package and then with it."""
    pytest.importorskip("kernels")
    test = {
        "path": [path for path in sys.path if "site-packages" in path],
        "package": str(ROOT),
        "repository": str(repository),
        "data": str(DATA / "rational_reference.safetensors"),
        "case": CASES[0],
        "names": ["x", "numerator", "denominator", "grad_output", "y", "dx", "d_numerator", "d_denominator"],
    }
    names = os.environ.keys() & {"PATH", "OMP_NUM_THREADS", "OMP_WAIT_POLICY"}
    environment = {name: os.environ[name] for name in names}
    result = subprocess.run(
        [sys.executable, "-I", "-S", ROOT / "tests/support/isolated_kernel.py", json.dumps(test)],
        env=environment | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.endswith("done\n"), result.stdout + result.stderr


def test_existing_folder_is_left_alone(repository, monkeypatch):
    before = json.dumps(sorted(str(path) for path in repository.rglob("*")))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(repository)])
    with pytest.raises(SystemExit, match="is not an empty folder"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert before == json.dumps(sorted(str(path) for path in repository.rglob("*")))
