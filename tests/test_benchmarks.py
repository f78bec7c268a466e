"""The pure parts of `benchmarks/`.

Byte counts and classes of kernels, settings, tables, pictures, the originals.
"""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import bench_model
import bench_runs
import bench_training
import gpu_trace
import peers
import plot
import profile_step
import render
import speed_tables

ABOUT = {
    "machine": "GPU",
    "precision": "bfloat16",
    "torch": "2",
    "triton": "3",
    "timm": "1",
    "commit": "0123456789",
}


def result(provider: str, images_per_s: float, **other) -> dict:
    case = {
        "task": "train",
        "size": "tiny",
        "mode": "compiled",
        "batch_size": 8,
        "image_size": 224,
        "turn": 5,
    }
    numbers = {"images_per_s": images_per_s, "ms": 8e3 / images_per_s, "peak_gib": 2.0}
    return {"provider": provider, **case, **numbers, **ABOUT, **other}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nvjet_sm90_tst_192x192_64x3_2x1_v_bz_coopB_NNN", "matrix products"),
        (
            "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>(cublasSplitKParams)",
            "matrix products",
        ),
        ("sm90_xmma_wgrad_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "matrix products"),
        ("packed_attention_keys_kernel", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26", "attention"),
        ("void cudnn::fusion::convert_dq_to_16bits<true>(void const*, void*)", "attention"),
        ("rational_mlp_backward_kernel", "rational"),
        ("rational_mlp_forward_kernel_2", "matrix products"),
        ("gather_sums_kernel", "rational"),
        ("rational_bwd_kernel_0", "rational"),
        ("triton_per_fused__to_copy_add_native_layer_norm_view_9", "norm"),
        ("void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float>(long)", "norm"),
        ("norm_backward_kernel", "norm"),
        ("add_norm_rational_backward_kernel", "norm"),
        ("triton_poi_fused_gelu_gelu_backward_view_10", "pointwise and reductions"),
        ("triton_poi_fused_convolution_0", "pointwise and reductions"),
        ("void at::native::reduce_kernel<128, 4, at::native::ReduceOp<float>>", "pointwise and reductions"),
        (
            "void at::native::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>, "
            "FusedAdamMathFunctor>",
            "optimiser",
        ),
        ("Memset (Device)", "other"),
    ],
)
def test_class_of_a_kernel(name, expected):
    assert profile_step.kernel_class(name) == expected


def test_kernel_times():
    """Of one step, the slowest first; what is not the GPU's own work does not count."""

    def event(cat, name, dur):
        return {"ph": "X", "cat": cat, "name": name, "dur": dur}

    events = [
        event("kernel", "rational_forward_kernel", 1000.0),
        event("kernel", "rational_forward_kernel", 3000.0),
        event("gpu_memset", "Memset (Device)", 500.0),
        event("gpu_user_annotation", "Optimizer.step", 9e6),
        event("cpu_op", "aten::add", 9e6),
        {"ph": "M", "name": "process_name"},
    ]
    assert profile_step.kernel_times({"traceEvents": events[::-1]}, steps=2) == [
        {"kernel": "rational_forward_kernel", "class": "rational", "calls": 1.0, "ms": 2.0},
        {"kernel": "Memset (Device)", "class": "other", "calls": 0.5, "ms": 0.25},
    ]


def test_gpu_times():
    """Of one update; work that runs beside NCCL is computing, and each moment counts once."""

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
    """After two updates of warm-up; fewer where the epoch is short, and none where it is too short."""
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


def test_work_of_a_kernel():
    """Against the tensors that the launchers' docstrings name, for two images at small."""

    def size(*tensors):
        return sum(tensor.nbytes for tensor in tensors)

    def half(channels):
        return torch.empty(2, 197, channels, dtype=torch.bfloat16, device="meta")

    row, lse = torch.empty(2, 197, device="meta"), torch.empty(2, 6, 197, device="meta")
    x, hidden, qkv = half(1536), half(384), half(3 * 384)
    product = 2 * 6 * 2 * 197 * 197 * 64  # images, heads, operations
    expected = {
        "rational_forward_kernel": (size(x, x), 0),
        "rational_backward_kernel": (size(x, x, x), 0),
        "rational_mlp_backward_kernel": (size(x, x, x, x), 0),
        "rational_mlp_forward_kernel": (size(hidden, x, x), 2 * 2 * 197 * 384 * 1536),
        "add_norm_rational_forward_kernel": (size(*[hidden] * 4, row, row), 0),
        "norm_forward_kernel": (size(*[hidden] * 2, row, row), 0),
        "norm_backward_kernel": (size(*[hidden] * 4, row, row), 0),
        "packed_attention_forward_kernel": (size(qkv, hidden, lse), 2 * product),
        "packed_attention_queries_kernel": (size(qkv, *[hidden] * 3, *[lse] * 3), 3 * product),
        "packed_attention_keys_kernel": (size(qkv, *[hidden] * 3, lse, lse), 4 * product),
    }
    for kernel, needed in expected.items():
        assert profile_step.work(kernel, "small", 2) == needed, kernel
    assert profile_step.work("rational_forward_kernel_0", "small", 2) == expected["rational_forward_kernel"]
    assert profile_step.work("nvjet_sm90", "small", 2) is None


def test_every_kernel_has_its_traffic():
    source = "".join(path.read_text() for path in (ROOT / "flashkat_hf").rglob("triton_*.py"))
    assert profile_step.TRAFFIC.keys() == set(re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE))


def test_model_table():
    results = [
        result("flashkat_hf", 1500.0),
        result("timm ViT", 1000.0, peak_gib=4.0),
        result("KAT, original", 10.0, mode="eager", batch_size=2),
        result("flashkat_hf", 600.0, mode="eager"),
        result("timm ViT", 300.0, mode="eager", machine="another GPU"),
    ]
    text = speed_tables.model_table(results)
    assert text.splitlines()[:9] == [
        "| training step, images/s | tiny, batch 8 |",
        "| --- | --- |",
        "| flashkat_hf, compiled | 1,500 (2.0 GiB) |",
        "| timm ViT, compiled | 1,000 (4.0 GiB) |",
        "| flashkat_hf, eager | 600 (2.0 GiB) |",
        "| timm ViT, eager | 300 (2.0 GiB) |",
        "| KAT, original, eager | 10 (2.0 GiB, batch 2) |",
        "| ours / timm ViT, compiled | 1.50 (memory 0.50) |",
        "| ours / KAT, original, eager | 60.00 |",  # timm's eager ran on another machine
    ]
    assert "timm ViT: another GPU, bfloat16, torch 2, triton 3, timm 1, commit 0123456" in text
    assert "the mean of 5 steps in a row" in text
    with pytest.raises(SystemExit, match="two results for compiled, timm ViT, tiny"):
        speed_tables.model_table([*results, results[1]])


def test_attention_table():
    case = {"batch_size": 8, "heads": 3, "backward_us": 2000.0, **ABOUT}
    results = [
        {**case, "tokens": tokens, "provider": name, "forward_us": time, "machine": "GPU"}
        for tokens in (577, 1025)
        for name, time in (("flashkat_hf", 500.0), ("cuDNN", 3000.0), ("flash", 4000.0))
    ]
    results += [{**result, "heads": 1} for result in results]  # not shown
    rows = speed_tables.attention_table(results).splitlines()
    assert (
        rows[0] == "| tokens | flashkat_hf, µs | cuDNN, µs | flash, µs | times as fast as the fastest other |"
    )
    assert rows[3] == "| 1,025 | 500 + 2,000 | 3,000 + 2,000 | 4,000 + 2,000 | 2.00 |"
    assert "8 sequences of 3 heads" in rows[5]


def test_tables_of_deployment_and_rationals():
    about = {
        "gpu": "GPU",
        "torch": "2",
        "triton": "3",
        "torchao": "1",
        "commit": "0123456789",
        "model": "small",
    }
    rates = {"predict_gpu": 500, "gpu_decoder": 1000, "model_graphed": 2000}
    text = speed_tables.predict_table([{"size": "small", "batch_size": 8, **rates, **about}])
    assert text.splitlines()[2] == "| small, batch 8 | 500 | 2,000 (0.25) | 1,000 (0.50) |"
    times = [("bfloat16", 1, 2.0), ("bfloat16", 32, 3.0), ("int8", 1, 4.0)]
    rows = [
        {"way": way, "batch_size": batch, "eager_ms": ms, "compiled_ms": ms / 2, **about}
        for way, batch, ms in times
    ]
    assert speed_tables.quantization_speed_table(rows).splitlines()[2:4] == [
        "| bfloat16 | 2.0 / 1.0 | 3.0 / 1.5 |",
        "| int8 | 4.0 / 2.0 |  |",
    ]
    shares = [
        {"case": "tokens", "dtype": dtype, "direction": direction, "of_copy": 0.5, **about}
        for dtype in ("bfloat16", "float32")
        for direction in ("forward", "backward")
    ]
    assert speed_tables.group_rational_table(shares).splitlines()[2] == "| tokens | 50% | 50% | 50% | 50% |"


def test_profile_tables():
    case = {"provider": "flashkat_hf", "mode": "compiled", "size": "tiny", "batch_size": 8, **ABOUT}
    rates = {"wall_ms": 8.0, "copy_gb_per_s": 1000.0, "product_tflops": 500.0}
    rows = [
        {"kernel": "total", "class": "total", "calls": 25, "ms": 6.0, **rates},
        {"kernel": "rational_forward_kernel", "class": "rational", "calls": 12, "ms": 2.0,
         "bytes": 10**8, "operations": 0, "floor_ms": 1.0},
        {"kernel": "packed", "class": "attention", "calls": 12, "ms": 3.5,
         "bytes": 10**6, "operations": 10**12, "floor_ms": 2.8},
        {"kernel": "nvjet", "class": "rational", "calls": 1, "ms": 0.5},
    ]  # fmt: skip
    results = [case | row for row in rows]
    assert speed_tables.profile_table(results).splitlines()[:7] == [
        "| ms of a training step | flashkat_hf, compiled |",
        "| --- | --- |",
        "| attention | 3.50 |",
        "| rational | 2.50 |",
        "| all kernels | 6.00 |",
        "| step, as measured without the profiler | 8.00 |",
        "| kernels | 25 |",
    ]
    assert speed_tables.roofline_table(results).splitlines()[2:5] == [
        "| `rational_forward_kernel` | 12 | 2.00 | 1.00 | memory | 50% |",
        "| `packed` | 12 | 3.50 | 2.80 | products | 80% |",
        "",
    ]
    assert "| `packed` | attention | 12 | 3.50 |\n| `rational_forward_kernel`" in speed_tables.kernel_table(
        results
    )


def test_precision_table():
    case = {"shape": [2, 3, 8], "draws": 4, "machine": "GPU", "torch": "2", "commit": "0123456789"}
    results = [
        {"method": method, "dtype": dtype, "mean_error": error, "largest_error": 2 * error, **case}
        for method, error in (("ours", 1e-7), ("theirs", 1e-5))
        for dtype in ("float32", "bfloat16")
    ]
    rows = speed_tables.precision_table(results).splitlines()
    assert rows[3] == "| theirs | 1.0e-05 | 2.0e-05 | 1.0e-05 | 2.0e-05 |"


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
    assert [row.split(" | ")[3] for row in rows[2:7]] == ["1.00", "0.75", "1.00", "0.95", ""]
    assert rows[2].endswith("| 12.3 s | 0.6 s |")
    assert "CUDA graphs, torch 2, accelerate 1, commit a, b; then GPU, bf16, not compiled, torch 2" in note
    assert "After SIGTERM to the launcher on 4 GPUs a resumed run" in note


def test_update_table():
    """Milliseconds of an update; the columns of the profile are there once a run was profiled."""
    about = {"case": "synthetic", "size": "small", "batch_size": 8}
    rates = {"images_per_second": 160.0, "step_images_per_second": 200.0}
    one = about | rates | {"processes": 1}
    two = about | rates | {"processes": 2, "compute_ms": 70.04, "nccl_ms": 6.0, "idle_ms": 3.96}
    resume = {"case": "resume", "processes": 2}
    head, _, row, _, note = render.update_table([one, resume]).splitlines()
    assert head == "| milliseconds of an update | GPUs | whole | on the device | between updates |"
    assert row == "| small, 8 a GPU: synthetic | 1 | 50.0 | 40.0 | 10.0 |"
    assert "profile" not in note
    head, _, first, second, _, note = render.update_table([one, two]).splitlines()
    assert head.endswith("| between updates | computing | NCCL alone | idle |")
    assert first == "| small, 8 a GPU: synthetic | 1 | 50.0 | 40.0 | 10.0 |  |  |  |"
    assert second == "| small, 8 a GPU: synthetic | 2 | 100.0 | 80.0 | 20.0 | 70.0 | 6.0 | 4.0 |"
    assert "a profile of some updates of the first GPU" in note


def test_documents_are_rendered(monkeypatch):
    """Every table, picture and card line is that of the results files."""
    monkeypatch.setattr(sys, "argv", ["render.py", "--check"])
    render.main()


def test_what_is_not_measured_stays_empty(tmp_path, monkeypatch):
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    monkeypatch.setattr(render, "ROOT", tmp_path)
    empty = "a\n<!-- benchmark:x -->\n<!-- /benchmark:x -->\nb\n"
    assert render.render(empty, "x", "file", str) == empty
    full = empty.replace("-->\n<!-- /", "-->\nold\n<!-- /")
    with pytest.raises(SystemExit, match=r"file\.jsonl cannot be read"):
        render.render(full, "x", "file", str)
    (tmp_path / "benchmarks/results/file.jsonl").write_text('{"n": 1}\n')
    assert render.render(full, "x", "file", lambda results: f"n is {results[0]['n']}") == full.replace(
        "old", "n is 1"
    )
    with pytest.raises(SystemExit, match="benchmark:y"):
        render.render(full, "y", "file", str)


def test_picture_tells_its_results(tmp_path):
    pytest.importorskip("matplotlib")
    results, picture = tmp_path / "r.jsonl", tmp_path / "p.png"
    assert plot.is_current(picture, results)  # nothing measured, nothing drawn
    lines = [
        result(name, 10.0, batch_size=size, image_size=pixels, p10_ms=8.0)
        for name, size, pixels in (("flashkat_hf", 8, 224), ("v", 8, 224), ("flashkat_hf", 4, 384))
    ]
    for kind in (plot.throughput, plot.cells):
        results.write_text("".join(json.dumps(line) + "\n" for line in lines))
        picture.unlink(missing_ok=True)
        assert not plot.is_current(picture, results)
        plot.draw(picture, results, kind)
        assert plot.is_current(picture, results)
        results.write_text(json.dumps(lines[0]) + "\n")
        assert not plot.is_current(picture, results)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"providers": ["nobody"]}, "--providers: nobody"),
        ({"providers": ["KAT, original"]}, "--providers: KAT, original needs --peer"),
        ({"peer": Path("clones")}, "--peer: the original kernels need a GPU"),
        ({"sizes": ["huge"]}, "--sizes: huge"),
        ({"modes": ["fast"]}, "--modes: fast"),
        ({"turn": 0}, "--turn: 0"),
        ({"turns": 0}, "--turns: 0"),
        ({"batch_sizes": [8, 0]}, r"--batch_sizes: \[0\]"),
        ({"image_sizes": [224, 100]}, r"--image_sizes: \[100\]"),
        ({"device": "tpu"}, "--device: 'tpu'"),
        ({"output": ROOT}, "--output: .* is a folder"),
        ({"output": ROOT / "README.md"}, "--output: .* exists; --append"),
    ],
    ids=str,
)
def test_bad_settings_end_before_work_starts(settings, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        bench_model.Settings(**{"output": tmp_path / "r.jsonl", "device": "cpu", **settings})


def test_results_are_added(tmp_path):
    path = tmp_path / "new" / "r.jsonl"
    for append in (False, True):
        settings = bench_model.Settings(output=path, append=append, device="cpu", commit="c")
        with bench_model.results_file(settings) as write:
            write({"ms": 1})
            assert len(path.read_text().splitlines()) == 1 + append  # on the disk before the run ends
    assert {json.loads(line)["commit"] for line in path.read_text().splitlines()} == {"c"}


def test_one_result_for_each_provider(tmp_path, monkeypatch):
    """On a CPU each step is timed alone; a provider with a limit runs at it."""
    monkeypatch.setitem(bench_model.LARGEST_BATCH, "small", 2)

    def make(size, pixels):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16**2, 1000))

    monkeypatch.setattr(bench_model, "PROVIDERS", {"large": make, "small": make})
    settings = bench_model.Settings(output=tmp_path / "r.jsonl", device="cpu", turns=3, turn=2)
    large, small = bench_model.measure(settings, "tiny", "eager", 16, 4)
    assert (large["provider"], large["batch_size"], small["batch_size"]) == ("large", 4, 2)
    assert large["turn"] == 1
    assert large["images_per_s"] == pytest.approx(4e3 / large["ms"], rel=0.01)


def test_steps_of_a_turn_are_timed_together(monkeypatch):
    """Between two events, behind one step that is not timed."""
    steps = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = len(steps)

        def synchronize(self):
            assert len(steps) == 6

        def elapsed_time(self, end):
            return 10.0 * (end.at - self.at) + self.at  # the first step's milliseconds would be seen

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert bench_model.together(lambda: steps.append(1), turn=5) == [51.0 / 5]


def test_original_code_is_loaded_by_itself(tmp_path):
    """Nothing of ours changes, and what is missing is named in one line."""
    with pytest.raises(SystemExit, match=r"--peer: .*katransformer\.py is missing"):
        peers.load(tmp_path, peers.KAT)
    for folder in ("kat", "rational_kat_cu"):
        (tmp_path / folder).mkdir()
    source = tmp_path / "kat/katransformer.py"
    source.write_text("import package_of_kernels\n")
    with pytest.raises(SystemExit, match=r"needs a package that is not there: .*package_of_kernels"):
        peers.load(tmp_path, peers.KAT)
    source.write_text(
        "import torch, its_kernels\ntorch.nn.init.calculate_gain = None\nKAT = its_kernels.KAT\n"
    )
    (tmp_path / "rational_kat_cu/its_kernels.py").write_text("KAT = 'of the clone'\n")
    path, gain = list(sys.path), torch.nn.init.calculate_gain
    assert peers.load(tmp_path, peers.KAT).KAT == "of the clone"
    assert (sys.path, torch.nn.init.calculate_gain) == (path, gain)


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


def test_the_parts_of_a_start(tmp_path):
    """They are in order, and add up to the time of the 10th update, which is before the end."""
    settings = bench_runs.Settings(tmp_path / "r.jsonl", size="micro")
    found = bench_runs.run(settings, "digits", "--max_steps", "10", "--epochs", "1")
    parts = "settings, imports, device, data, model, optimizer, first batches, update 1, update 10"
    assert list(found["start_s"]) == parts.split(", ")
    assert found["start_s"]["imports"] < found["update_10_s"] < found["wall_s"]
