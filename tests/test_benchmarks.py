"""The pure parts of `benchmarks/`.

Byte counts and classes of kernels, settings, tables, pictures, the originals.
"""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import bench_model
import bench_runs
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
        ("gather_block_sums_kernel", "rational"),
        ("scale_samples_kernel", "pointwise and reductions"),
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
        "scale_samples_kernel": (size(*[hidden] * 3), 0),
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
        result(name, 10.0, batch_size=size, image_size=pixels)
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": "huge"}, "--size: huge unknown"),
        ({"mode": "fast"}, "--mode: fast unknown"),
        ({"steps": 0}, "--steps: 0"),
        ({"batch_size": 0}, "--batch_size: 0"),
        ({}, "--device: a profile of kernels needs a GPU"),
    ],
    ids=str,
)
def test_bad_settings_of_a_profile(settings, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        profile_step.Settings(**{"output": tmp_path / "r.jsonl", "device": "cpu", **settings})


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
    assert large["images_per_s"] == pytest.approx(4e3 / large["p10_ms"], rel=0.01)
    assert large["p10_ms"] <= large["ms"]


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


def test_the_parts_of_a_start(tmp_path):
    """They are in order, and add up to the time of the 10th update, which is before the end."""
    settings = bench_runs.Settings(tmp_path / "r.jsonl", size="micro")
    found = bench_runs.run(settings, "digits", "--max_steps", "10", "--epochs", "1")
    parts = "settings, imports, device, data, model, optimizer, first batches, update 1, update 10"
    assert list(found["start_s"]) == parts.split(", ")
    assert found["start_s"]["imports"] < found["update_10_s"] < found["wall_s"]
