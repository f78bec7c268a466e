"""Build a repository of the operators alone, in the layout of the `kernels` library (noarch, Triton).

    python scripts/build_kernel_repository.py OUT

OUT gets `build/torch-{cpu,cuda,rocm}/`, which `kernels.get_kernel` and `get_local_kernel` load, the sources
in `torch-ext/` with `build.toml`, as kernel-builder takes them, and a card. The code is the package's own,
copied.
"""

import argparse
import hashlib
import json
import runpy
import shutil
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

ROOT = Path(__file__).parent.parent
SOURCES = Path(__file__).parent / "kernel_repository"
NAME = "flashkat-rational"
VERSION = 1  # the Hub's branches v1, v2, ...: raise it when a caller's code may break
BACKENDS = ("cpu", "cuda", "rocm")
BUILD = f"""\
[general]
name = "{NAME}"
edition = 5
version = {VERSION}
license = "mit"
backends = {json.dumps(BACKENDS)}

[torch-noarch]
"""


def code() -> dict[str, bytes]:
    """Return the files of a variant by name: operators, their imports, and what stands around them."""
    operators = (ROOT / "flashkat_hf/model").glob("op_*.py")
    imported = (file for operator in operators for file in (operator, *get_relative_import_files(operator)))
    paths = [*map(Path, imported), *SOURCES.glob("*.py")]
    return {path.name: path.read_bytes() for path in sorted(set(paths))}


def build(out: Path) -> None:
    """Write the repository into a new or empty folder.

    Raises:
        ValueError: there is something in `out`, or it cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder")
    files, version = code(), runpy.run_path(str(ROOT / "flashkat_hf/_version.py"))["__version__"]
    digest = hashlib.sha256(b"".join(name.encode() + content for name, content in files.items())).hexdigest()
    python_name = NAME.replace("-", "_")
    card = (SOURCES / "README.md").read_text(encoding="utf-8")
    for word, value in {"version": version, "kernel_version": VERSION, "folder": NAME}.items():
        card = card.replace(f"{{{word}}}", str(value))
    texts = {"README.md": card, "build.toml": BUILD}
    for name, content in files.items():
        texts[f"torch-ext/{python_name}/{name}"] = content.decode()
    for backend in BACKENDS:
        variant = f"build/torch-{backend}"
        metadata = {
            "name": NAME,
            "id": f"_{python_name}_{backend}_{digest[:7]}",  # names the module and the operators' namespace
            "version": VERSION,
            "license": "mit",
            "python-depends": [],
            "backend": {"type": backend},
        }
        texts[f"{variant}/metadata.json"] = json.dumps(metadata, indent=2) + "\n"
        texts |= {f"{variant}/{name}": content.decode() for name, content in files.items()}
    try:
        for name, text in texts.items():
            path = out / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        shutil.copyfile(ROOT / "LICENSE", out / "LICENSE")
    except OSError as error:
        raise ValueError(f"cannot write {out}: {error.strerror or error}") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="new or empty folder")
    out = parser.parse_args().out
    try:
        build(out)
    except ValueError as error:
        raise SystemExit(f"build_kernel_repository.py: {error}") from error
    print(f"{out}: {NAME} for {', '.join(BACKENDS)}")


if __name__ == "__main__":
    main()
