"""One run writes into a folder; what a dead one held is free."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from helpers import ROOT
from small_runs import after_step

from flashkat_hf.training import run_lock
from flashkat_hf.training.run_lock import NAME, locked

HOLD = """
import sys, time
from pathlib import Path
from flashkat_hf.training.run_lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of the folder "run"."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def refused(folder) -> str:
    with pytest.raises(ValueError, match=r"^--output: [^\n]* is being written by ") as caught, locked(folder):
        pass
    return str(caught.value)


def rewritten(folder, **values) -> None:
    lock = folder / NAME
    lock.write_text(json.dumps({**json.loads(lock.read_text()), **values}))


def test_another_process_is_named_and_its_death_noticed(tmp_path, holder):
    folder = tmp_path / "run"
    assert f"process {holder.pid} on {socket.gethostname()}, which started at 20" in refused(folder)
    holder.kill()
    holder.wait()
    with locked(folder):
        assert json.loads((folder / NAME).read_text())["process"] == os.getpid()
    assert list(folder.iterdir()) == []


def test_the_second_run_is_stopped_and_the_first_goes_on(run, monkeypatch, tmp_path):
    results = []

    def second(trainer) -> None:
        for flag in ("--overwrite", "--resume"):
            command = [sys.executable, ROOT / "examples/finetune.py", "--output", tmp_path / "run", flag]
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
            results.append(
                subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            )

    after_step(monkeypatch, 2, second)
    output = run()
    for result in results:
        assert result.returncode == 1
        line = result.stderr.splitlines()[-1]
        assert f"--output: {output} is being written by process {os.getpid()} on" in line
    assert (output / "summary.json").exists()
    assert not list(output.glob(".*"))


def test_a_process_with_the_number_of_a_dead_one_does_not_hold_its_lock(tmp_path, holder, monkeypatch):
    """As in a container that is started again: no sign of life comes."""
    monkeypatch.setattr(run_lock, "PATIENCE", 0.2)
    rewritten(tmp_path / "run", start=1000)
    with locked(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / NAME).read_text())["process"] == os.getpid()


@pytest.mark.parametrize("alive", [True, False])
def test_a_process_of_another_machine_is_watched(tmp_path, monkeypatch, alive):
    monkeypatch.setattr(run_lock, "PATIENCE", 3.0)
    monkeypatch.setattr(run_lock, "BEAT", 0.2 if alive else 60.0)
    with monkeypatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: "elsewhere")
        first = locked(tmp_path / "run")
        first.__enter__()
    if alive:
        assert f"process {os.getpid()} on elsewhere" in refused(tmp_path / "run")
        first.__exit__(None, None, None)
        assert not (tmp_path / "run").exists()
        return
    (tmp_path / "run" / "mine").touch()
    with locked(tmp_path / "run"):
        lock = (tmp_path / "run" / NAME).read_text()
        first.__exit__(None, None, None)  # the dead one cannot take it away
        assert (tmp_path / "run" / NAME).read_text() == lock
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine"]


def test_of_many_at_once_one_has_it(tmp_path, holder):
    """All find the lock of a dead process, and all but one then find the one that has taken it."""
    holder.kill()
    holder.wait()
    dead = (tmp_path / "run" / ".lock").read_text()
    held, refusals, ready = [], [], threading.Barrier(8)

    def take() -> None:
        ready.wait()
        try:
            with locked(tmp_path / "run"):
                held.append(1)
                time.sleep(0.2)
        except ValueError as error:
            refusals.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # seconds, so that each is interrupted between any two steps
    try:
        for number in range(1, 11):
            (tmp_path / "run").mkdir(exist_ok=True)
            (tmp_path / "run" / ".lock").write_text(dead)
            threads = [threading.Thread(target=take) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert (len(held), len(refusals)) == (number, 7 * number)
    finally:
        sys.setswitchinterval(interval)


def test_a_file_system_without_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no links")))
    with locked(tmp_path / "run"):
        assert f"process {os.getpid()}" in refused(tmp_path / "run")
    assert not (tmp_path / "run").exists()
