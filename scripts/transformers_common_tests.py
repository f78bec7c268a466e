"""Run transformers' own common test suite against FlashKAT's classes.

    pip install parameterized pytest
    python scripts/transformers_common_tests.py                   # the installed version's suite
    python scripts/transformers_common_tests.py -k backbone -x    # further arguments go to pytest
    python scripts/transformers_common_tests.py --sdist transformers-5.24.0.tar.gz

The suite is a part of transformers' source distribution, which pip downloads unless `--sdist` names it; none
of it is kept here. `transformers_common_suite.py` beside this file says how the suite makes our models. The
source distribution lacks three files that the suite imports, for exporters, generation and configs: empty
classes stand for the first two (their tests are not run; exporting has tests of our own), a dictionary for
the third.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
SUITE = Path(__file__).with_name("transformers_common_suite.py")
ABSENT = {  # files of the suite that its source distribution lacks
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": (
        'config_common_kwargs = {"return_dict": False, "output_hidden_states": True, '
        '"output_attentions": True, "dtype": "float16", "chunk_size_feed_forward": 5, '
        '"architectures": ["BertModel"], '
        '"id2label": {0: "label"}, "label2id": {"label": "0"}, "problem_type": "regression"}\n'
    ),
}


def main() -> int:
    """Make a folder with the suite and our file, run pytest there, and return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--sdist", type=Path, help="transformers-VERSION.tar.gz; default: pip downloads it")
    options, arguments = parser.parse_known_args()
    if find_spec("parameterized") is None:
        raise SystemExit("the suite needs parameterized: pip install parameterized")
    installed = version("transformers")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sdist = options.sdist or download(installed, folder)
        try:
            unpack(sdist, folder)
        except (OSError, tarfile.TarError) as error:
            raise SystemExit(f"{sdist} cannot be read: {error}") from error
        if not (folder / "tests/test_modeling_common.py").is_file():
            raise SystemExit(f"{sdist} has no tests/test_modeling_common.py: no source of transformers 5")
        if (found := re.search(r"-(\d[\w.]*)\.tar\.gz$", sdist.name)) and found[1] != installed:
            print(f"the suite of {found[1]} runs with transformers {installed}", file=sys.stderr)
        for path, content in ABSENT.items():
            place = folder / "tests" / path
            place.parent.mkdir(exist_ok=True)
            (place.parent / "__init__.py").touch()
            place.write_text(content)
        (folder / "tests/__init__.py").touch()
        shutil.copyfile(SUITE, folder / "tests/test_flashkat.py")
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        settings = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-W", "ignore::pytest.PytestUnknownMarkWarning", "tests/test_flashkat.py"]
        done = subprocess.run([*command, *arguments], cwd=folder, env={**os.environ, **settings}, check=False)
        return done.returncode


def download(number: str, folder: Path) -> Path:
    """Let pip download the source distribution of a version of transformers, and return its path."""
    what = ["--no-deps", "--no-binary", "transformers", "--dest", str(folder), f"transformers=={number}"]
    done = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *what], check=False)
    found = sorted(folder.glob("transformers-*.tar.gz"))
    if done.returncode or not found:
        raise SystemExit(f"pip cannot download the source of transformers {number}; name a file by --sdist")
    return found[0]


def unpack(sdist: Path, folder: Path) -> None:
    """Unpack the tests at the top of a source distribution into `folder/tests`."""
    (folder / "tests").mkdir()
    with tarfile.open(sdist) as archive:
        for member in archive:
            if re.fullmatch(r"[^/]+/tests/\w+\.py", member.name):
                (folder / "tests" / Path(member.name).name).write_bytes(archive.extractfile(member).read())


if __name__ == "__main__":
    raise SystemExit(main())
