"""A run that is killed again and again ends with the bits of one that was not; see killing.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small_runs import metrics

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
