"""The benchmark of the trainer: which cases run, which updates are profiled, and its two tables."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import bench_training
import gpu_trace
import render


def training_arguments(tmp_path, **options) -> bench_training.Arguments:
    return bench_training.Arguments(tmp_path / "r.jsonl", **options)


def test_cases_that_are_unknown_or_cannot_run(tmp_path, monkeypatch):
    """Said before any file is made."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit, match="--cases: png unknown; known are synthetic; jpeg; synthetic fsdp2"):
        training_arguments(tmp_path, cases=["jpeg", "png"])
    for size in ("huge", "65x3", "64x0"):
        with pytest.raises(
            SystemExit, match=rf"--size: {size} is none of micro, .*a multiple of 64\) x layers"
        ):
            training_arguments(tmp_path, size=size)
    assert training_arguments(tmp_path, size="1280x32", processes=[1]).size == "1280x32"
    with pytest.raises(SystemExit, match="--processes: 4; there are 0 GPUs"):
        training_arguments(tmp_path, processes=[1, 4])
    with pytest.raises(SystemExit, match="--cases: resume needs several processes; --processes 1"):
        training_arguments(tmp_path, cases=["resume"], processes=[1])
    with pytest.raises(SystemExit, match="--cases: synthetic fsdp2 needs several GPUs; --processes 2"):
        training_arguments(tmp_path, cases=["synthetic fsdp2"], processes=[1, 2])
    assert not (tmp_path / "r.jsonl").exists()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    arguments = training_arguments(tmp_path)
    counts = [arguments.counts(case) for case in bench_training.CASES]
    assert counts == [[1, 2, 4, 8], [1, 2, 4, 8], [2, 4, 8], [2, 4, 8]]


def test_cases_run_alone_and_are_added(tmp_path, monkeypatch):
    """Many files are made for the case that reads them only, and enough for 30 steps."""
    made = []
    monkeypatch.setattr(bench_training, "make_folder", lambda root, settings: made.append(settings))
    rates = dict.fromkeys(bench_training.RATES, 1.0)
    monkeypatch.setattr(
        bench_training,
        "measure",
        lambda case, processes, *_: {"case": case, "processes": processes, "device": "GPU", **rates},
    )
    for case, processes in (("synthetic", [1, 2]), ("jpeg", [1])):
        bench_training.main(training_arguments(tmp_path, cases=[case], processes=processes, append=True))
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    found = [(line["case"], line["processes"]) for line in lines]
    assert found == [("synthetic", 1), ("synthetic", 2), ("jpeg", 1)]
    assert made[0].images * made[0].copies == 2 * 512
    assert made[1].images * made[1].copies >= 30 * 512
    bench_training.main(training_arguments(tmp_path, cases=["synthetic"], processes=[1]))
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 1


def test_gpu_times():
    """The times are those of one update. A moment counts once, and as computing if NCCL is not alone."""

    def event(cat, name, begin, end):
        return {"ph": "X", "cat": cat, "name": name, "ts": 1e9 + 1e3 * begin, "dur": 1e3 * (end - begin)}

    events = [
        event("kernel", "matmul", 0, 10),
        event("kernel", "decode", 2, 4),  # within the first
        event("kernel", "rational", 8, 12),  # overlaps its end
        event("kernel", "ncclDevKernel_AllReduce_Sum_f32_RING_LL", 11, 20),
        event("gpu_memcpy", "Memcpy DtoD", 16, 17),
        event("cpu_op", "aten::add", 20, 90),
        event("kernel", "adam", 24, 30),
    ]
    times = gpu_trace.gpu_times({"traceEvents": events[::-1]}, updates=2)
    # computing 0-12, 16-17 and 24-30; NCCL alone 12-16 and 17-20; idle 20-24
    assert times == {"compute_ms": 9.5, "nccl_ms": 3.5, "idle_ms": 2.0}
    assert gpu_trace.gpu_times({"traceEvents": events[5:6]}, updates=2) == {}


def test_which_updates_are_profiled(tmp_path, monkeypatch):
    """Eight updates are profiled after two of warm-up, fewer in a short epoch, none in one of three."""
    calls, acts = [], {}
    profiler = SimpleNamespace(
        start=lambda: calls.append("start"),
        step=lambda: calls.append("step"),
        stop=lambda: calls.append("stop"),
        export_chrome_trace=lambda path: Path(path).write_text(json.dumps({"traceEvents": [event]})),
    )
    event = {"cat": "kernel", "name": "adam", "ts": 5.0, "dur": 16e3}
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: profiler)
    monkeypatch.setattr(bench_training, "after_update", acts.__setitem__)
    for updates, expected in ((30, [91, 93, 101]), (6, [19, 21, 24]), (3, [])):
        acts.clear()
        trainer = SimpleNamespace(feed=SimpleNamespace(updates_per_epoch=updates))
        bench_training.watch_updates(trainer, 3, tmp_path / f"{updates}.json")
        assert list(acts) == expected
        for act in acts.values():
            act(trainer)
    assert calls == ["start", "step", "stop"] * 2
    assert json.loads((tmp_path / "30.json").read_text())["compute_ms"] == 2.0
    assert json.loads((tmp_path / "6.json").read_text())["compute_ms"] == 5.33
    assert not (tmp_path / "3.json").exists()


def test_training_table():
    """A row's share is of as many times the synthetic rate of one GPU, of its own size and commit."""
    about = {"batch_size": 8, "precision": "bf16", "device": "GPU", "compiled": False, "peak_memory_gib": 1.0}
    about["versions"] = {"torch": "2", "accelerate": "1"}
    cases = [
        ("synthetic", "small", 1, 200, "a"),
        ("jpeg", "small", 2, 300, "a"),
        ("synthetic", "small", 1, 100, "b"),
        ("synthetic", "small", 4, 380, "b"),
        ("synthetic fsdp2", "base", 2, 180, "b"),
    ]
    names = "case", "size", "processes", "images_per_second", "commit"
    results = [about | dict(zip(names, case, strict=True)) for case in cases]
    results[0] |= {"start_up_s": 12.34, "checkpoint_s": 0.56}
    checked = {"case": "resume", "processes": 4, "same_bits": True, "commit": "b"}
    *rows, note = render.training_table([*results, checked]).splitlines()
    assert [row.split(" | ")[4] for row in rows[2:7]] == ["1.00", "0.75", "1.00", "0.95", ""]
    assert [row.split(" | ")[1] for row in rows[2:7]] == ["a", "a", "b", "b", "b"]
    assert rows[2].endswith("| 12.3 s | 0.6 s |")
    assert "CUDA graphs, torch 2, accelerate 1, commit a, b; then GPU, bf16, not compiled, torch 2" in note
    assert "After SIGTERM to the launcher on 4 GPUs a resumed run" in note


def test_update_table():
    """Milliseconds of an update; the columns of the profile are there once a run was profiled."""
    about = {"case": "synthetic", "size": "small", "batch_size": 8, "commit": "0123456789"}
    rates = {"images_per_second": 160.0, "step_images_per_second": 200.0}
    one = about | rates | {"processes": 1}
    two = about | rates | {"processes": 2, "compute_ms": 70.04, "nccl_ms": 6.0, "idle_ms": 3.96}
    resume = {"case": "resume", "processes": 2}
    head, _, row, _, note = render.update_table([one, resume]).splitlines()
    assert head == "| milliseconds of an update | commit | GPUs | whole | on the device | between updates |"
    assert row == "| small, 8 a GPU: synthetic | 0123456 | 1 | 50.0 | 40.0 | 10.0 |"
    assert "profile" not in note
    head, _, first, second, _, note = render.update_table([one, two]).splitlines()
    assert head.endswith("| between updates | computing | NCCL alone | idle |")
    assert first == "| small, 8 a GPU: synthetic | 0123456 | 1 | 50.0 | 40.0 | 10.0 |  |  |  |"
    assert second == "| small, 8 a GPU: synthetic | 0123456 | 2 | 100.0 | 80.0 | 20.0 | 70.0 | 6.0 | 4.0 |"
    assert "a profile of some updates of the first GPU" in note
