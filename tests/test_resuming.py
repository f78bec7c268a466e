"""A run that is killed again and again ends with the bits of one that was not; see killing.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from small_runs import make_images, metrics, small_run

from flashkat_hf.augmentation import Augmentation
from flashkat_hf.training import train

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("kills", "workers", "device"),
    [(20, 0, "cpu"), (4, 1, "cpu"), pytest.param(4, 1, "cuda", marks=pytest.mark.gpu)],
)
def test_killed_at_any_point_and_resumed_to_the_bit(tmp_path, kills, workers, device):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["ACCELERATE_USE_CPU"] = str(device == "cpu").lower()
    command = [sys.executable, ROOT / "tests" / "killing.py", tmp_path, str(kills), str(workers)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    done = json.loads(result.stdout.splitlines()[-1])
    assert done["killed"] >= kills
    assert done["during_a_save"] >= kills // 4
    assert done["resumed"] >= kills // 4
    expected = metrics(tmp_path / "whole")
    assert len(expected) == 3 * 3 + 3  # a line for each update and each epoch
    for run in range(1, done["runs"] + 1):
        output = tmp_path / f"killed-{run}"
        assert metrics(output) == expected
        assert {path.name for path in output.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}
        for name in ("best", "last"):
            weights, others = (
                load_file(folder / name / "model.safetensors") for folder in (tmp_path / "whole", output)
            )
            assert weights.keys() == others.keys()
            assert all(weights[key].equal(others[key]) for key in weights)


def test_a_run_saves_and_compares_what_auto_became(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    images, output = make_images(tmp_path / "images"), tmp_path / "run"

    def settings(on_device: str):
        made = small_run(images, output, epochs=1, resume=True)
        made.augmentation = Augmentation(rand_augment=None, erasing=0.5, on_device=on_device)
        return made

    try:
        train(settings("auto"))
        assert json.loads((output / "settings.json").read_text())["on_device"] == "nothing"
        assert train(settings("auto")) is None  # the same run, and complete
        with pytest.raises(ValueError, match=r"other settings: on_device was nothing and is augmentation$"):
            train(settings("augmentation"))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
