"""`import flashkat_hf` is quick, and transformers' Auto classes know FlashKAT whatever is imported first."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT

USE = """
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
config = AutoConfig.from_pretrained(sys.argv[1])
models = [kind.from_config(config) for kind in (AutoModel, AutoModelForImageClassification)]
print(*(f"{type(one).__module__}.{type(one).__name__}" for one in [config, *models]))
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
processor = AutoImageProcessor.from_pretrained(sys.argv[1])
print(type(config) in IMAGE_PROCESSOR_MAPPING, processor.crop_size["height"])
"""


def run(program: str, *arguments) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "first",
    [
        "import flashkat_hf",
        "from transformers import AutoModelForImageClassification, AutoImageProcessor\nimport flashkat_hf",
        "import transformers\nimport flashkat_hf",
        "import flashkat_hf\nfrom transformers import pipeline",
        "from flashkat_hf import *",
        "from flashkat_hf import FlashKATConfig",
        "import flashkat_hf.model.modeling_flashkat",  # which makes transformers import its Auto classes
        "import flashkat_hf.checkpoints.image_processor",
        "import flashkat_hf.training.run",
    ],
)
def test_auto_classes(bare_folder, first):
    """Without the folder's own code, so that the registered classes alone can serve."""
    classes, processor = run(f"import sys\n{first}\n{USE}", bare_folder).splitlines()
    assert classes.split() == [
        "flashkat_hf.model.configuration_flashkat.FlashKATConfig",
        "flashkat_hf.model.modeling_flashkat.FlashKATModel",
        "flashkat_hf.model.modeling_flashkat.FlashKATForImageClassification",
    ]
    assert processor == "True 32"


def test_importing_the_package_imports_no_other():
    program = "import sys, flashkat_hf, flashkat_hf.training, flashkat_hf.data\nprint(*sys.modules)"
    packages = {name.partition(".")[0] for name in run(program).split()}
    assert packages - {"flashkat_hf", "__main__"} <= set(sys.stdlib_module_names) | site_packages()


def site_packages() -> set[str]:
    """Return what Python imports at its start, such as the files of editable installations."""
    return {name.partition(".")[0] for name in run("import sys; print(*sys.modules)").split()}


def test_public_names():
    program = """
import flashkat_hf
assert set(flashkat_hf.__all__) <= set(dir(flashkat_hf))
assert all(getattr(flashkat_hf, name) is not None for name in flashkat_hf.__all__)
assert vars(flashkat_hf).keys() >= set(flashkat_hf.__all__)  # looked up once
try:
    flashkat_hf.rationale
except AttributeError as error:
    print(error)
"""
    assert run(program) == "module 'flashkat_hf' has no attribute 'rationale'\n"
