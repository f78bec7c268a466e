"""The paper's experiments at toy size, without a GPU, and what is made of their numbers."""

import json
import os
import re
import stat
import subprocess
import sys

import pytest
import torch
import triton
from helpers import ROOT
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from benchmarks.paper import (
    configurations,
    kernels,
    layers,
    nsight,
    published,
    render,
    training,
    triton_algorithms,
)
from benchmarks.paper.__main__ import main
from benchmarks.paper.contenders import Contender, check
from benchmarks.paper.nsight import Case
from benchmarks.paper.results import Results, count, with_interval
from benchmarks.paper.settings import EXPERIMENTS, parse
from flashkat_hf.model.reference import rational_decomposed

ABOUT = {"machine": "GPU", "torch": "2", "triton": "3", "timm": "1", "commit": "0123456789"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Lines and output of a run of everything at toy size, each contender checked against the reference."""
    folder = tmp_path_factory.mktemp("paper")
    command = [sys.executable, "-m", "benchmarks.paper", "all", "--toy", "--output", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [*command, "--commit", "0123456789"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    lines = [json.loads(line) for line in (folder / "paper.jsonl").read_text().splitlines()]
    return lines, run.stdout


def test_everything_runs_at_toy_size(toy):
    lines, output = toy
    kinds = {line["what"] for line in lines}
    assert kinds == {"layer", "model", "recipe", "kernel", "accesses", "error", "training"}
    timed = {
        (line["contender"], line["direction"], line["repeats"]) for line in lines if line["what"] == "kernel"
    }
    for repeats in (1, 2):
        assert {("algorithm 1", "forward", repeats), ("algorithm 1", "backward", repeats)} <= timed
    assert {("algorithm 2", "backward", 1), ("ours", "backward", 1), ("ours", "forward", 1)} <= timed
    assert {line["provider"] for line in lines if line["what"] == "training"} == {
        "ViT",
        "KAT",
        "FlashKAT",
        "ours",
    }
    assert all(line["commit"] == "0123456789" for line in lines)
    assert "no ncu: times alone" in output
    assert output.rstrip().splitlines()[-1].startswith("ours, toy, eager, batch 2:")


def test_errors_are_those_of_float32(toy):
    lines, _ = toy
    errors = [line for line in lines if line["what"] == "error"]
    assert {(line["contender"], line["dtype"]) for line in errors} == {
        *(("ours", "float32"), ("ours", "bfloat16"), ("algorithm 1", "float32"), ("algorithm 2", "float32")),
    }
    for line in errors:
        assert 0 < line["error"] < 1e-5 * line["gradient_size"]
        assert line["agree"] == line["compared"]  # the interpreter adds in one order


def test_page_of_a_toy_run(toy):
    text = render.page(toy[0])
    for title in ("Table 1", "Table 2", "Table 3", "Table 4", "Table 5", "Table 6", "Table 7", "Table 8"):
        assert f"## {title}" in text
    assert "warp states\n\n" not in text  # nothing was counted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table9", "--toy"], "table9 unknown; known are all, table1"),
        (["all"], "there is no GPU; --toy runs small sizes"),
        (["table3", "--toy", "--peer", "FOLDER"], "--peer: the original kernels need a GPU"),
    ],
)
def test_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=message):
        parse([*arguments, "--output", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_refused_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    output = ["--output", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"^figure2: needs Nsight Compute, and there is no ncu$"):
        parse(["figure2", "table3", *output])
    with pytest.raises(SystemExit, match="--ncu: nowhere is not a program"):
        parse(["table3", "--ncu", "nowhere", *output])
    with pytest.raises(SystemExit, match=r"--peer: .*katransformer.py is missing; .* must hold clones"):
        parse(["table3", "--peer", str(tmp_path), *output])
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="file is not a folder"):
        parse(["table3", "--output", str(tmp_path / "file")])
    assert parse(["all", *output]).ncu is None  # times alone
    assert parse(["all", *output]).names == tuple(EXPERIMENTS)


def test_a_failure_costs_the_others_nothing(tmp_path, monkeypatch):
    def measure(toy):
        yield {"what": "layer", "size": "tiny"}
        raise RuntimeError("too bad\nand more")

    monkeypatch.setattr(layers, "measure", measure)
    with pytest.raises(SystemExit, match=r"^1 failed: table1: too bad$"):
        main(["table1", "table6", "--toy", "--output", str(tmp_path), "--commit", "0123456789"])
    lines = [json.loads(line) for line in (tmp_path / "paper.jsonl").read_text().splitlines()]
    assert [line["what"] for line in lines] == ["layer", *["model", "recipe"] * 3]


def test_a_wrong_answer_is_not_timed():
    wrong = Contender("wrong", lambda *inputs: 1.001 * rational_decomposed(*inputs))
    with pytest.raises(SystemExit, match=r"wrong: error .* against the reference"):
        check(wrong, torch.float32, "cpu")
    check(Contender("right", rational_decomposed), torch.float32, "cpu")


def test_algorithms_compile():
    """Algorithm 1 adds ten terms an element to memory, algorithm 2 ten sums a block."""
    elements = 256 // (32 * 8)  # of a thread
    constants = {"SIZE": 256, "REPEATS": 1, "ORDER": "acq_rel"}
    assert atomics(triton_algorithms.algorithm1_backward_kernel, constants, 8) == 10 * elements
    constants = {"TILE_ROWS": 64, "TILE_COLUMNS": 64, "REPEATS": 2}
    assert atomics(triton_algorithms.algorithm2_backward_kernel, constants, 4) == 10
    assert atomics(triton_algorithms.forward_kernel, {"SIZE": 256, "REPEATS": 2}, 8) == 0


def atomics(kernel, constants: dict, num_warps: int) -> int:
    """Atomic additions in the code of a kernel compiled for sm_90."""
    signature = {
        name: "constexpr" if name in constants else "*fp32" if name.endswith("_ptr") else "i32"
        for name in kernel.arg_names
    }
    source = ASTSource(kernel, signature, constants, {})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
    return len(re.findall(r"\b(?:atom|red)\.global\S*\.add\S*\.f32", compiled.asm["ptx"]))


def test_layers():
    """A KAN's edge takes 204 operations as published; what we count on real layers is what we expect."""
    edges = 192 * 768
    assert layers.formula("KAN", 192, 768)[1] // edges == 204
    for name in published.FORMULAS:
        parameters, products = layers.counted(layers.layer(name, 16, 24), 16)
        assert parameters == layers.formula(name, 16, 24)[0]
        assert products == layers.products(name, 16, 24)


def test_splines():
    from scipy.interpolate import BSpline

    layer, x = layers.SplineLayer(3, 2, grid=5), torch.linspace(-0.99, 0.99, 30, dtype=torch.float64)
    values = layer.double().splines(x[:, None].expand(-1, 3))[:, 0]
    knots = (torch.arange(-3, 9) * 2 / 5 - 1).double()
    expected = BSpline.design_matrix(x.numpy(), knots.numpy(), 3).toarray()
    torch.testing.assert_close(values, torch.from_numpy(expected), atol=1e-6, rtol=0)  # float32 knots


@pytest.mark.parametrize("size", published.MODELS)
def test_configurations(size):
    """Table 6 by the config and table 7 by the recipe."""
    ours, stated = configurations.model(size), published.MODELS[size]
    assert {name: ours[name] for name in stated if name != "parameters"} == {
        name: value for name, value in stated.items() if name != "parameters"
    }
    assert ours["parameters"] == pytest.approx(stated["parameters"], rel=0.01)
    assert (ours["patch_size"], ours["image_size"]) == (published.PATCH_SIZE, published.IMAGE_SIZE)
    recipe = configurations.recipe(size)
    assert recipe["size"] == size
    assert recipe["drop_path"] == published.DROP_PATH[size]
    for _, settings in published.HYPERPARAMETERS.values():
        for name, value in settings.items():
            assert recipe[name] == value, name


def test_published_numbers_agree():
    rates = published.THROUGHPUT
    for size, times in published.SLOWER.items():
        assert rates["ViT"][size] / rates["KAT"][size] == pytest.approx(times, abs=1)
    best = max(rates["FlashKAT"][size] / rates["KAT"][size] for size in published.SLOWER)
    assert best == pytest.approx(86.5, abs=0.05)
    stated = [published.BACKWARD[name] for name in ("algorithm 1", "algorithm 2")]
    assert stated[0]["ms"] / stated[1]["ms"] == pytest.approx(140.5, abs=0.05)
    clocks = [row["cycles"] / row["ms"] for row in stated]
    assert clocks[0] == pytest.approx(clocks[1], rel=0.02)


def test_accesses():
    """The formulas of the paper, with m + 1 + n = 10 coefficients."""
    settings = parse(["memory", "--toy", "--output", "unused"])
    lines = {line["contender"]: line for line in kernels.accesses(settings)}
    images, tokens, channels = settings.shape
    elements, block = images * tokens * channels, images * tokens * channels // published.GROUPS
    assert lines["algorithm 1"]["accesses"] == 3 * (10 + 1) * elements
    assert lines["algorithm 2"]["accesses"] == 3 * (10 / block + 1) * elements  # a block holds all rows
    assert lines["ours"]["atomics"] == 0


# as `ncu --csv --page raw` writes it, and as its other pages do
WIDE = """==PROF== Connected to process 1
"ID","Process ID","Kernel Name","gpu__time_duration.sum","gpc__cycles_elapsed.max","SM","dram__bytes_read.sum"
"","","","ns","cycle","%","byte"
"0","7","marker_kernel","1,000","10","0.1","5"
"1","7","backward_kernel","2,000,000","3,000,000","30.5","1000"
"2","7","gather_sums_kernel","500,000","700,000","3.5","200"
"3","7","marker_kernel","1,000","10","0.1","5"
"4","7","forward_kernel","1,000,000","1,500,000","20.5","n/a"
""".replace("SM", nsight.OF_LONGEST["sm"][0])
LONG = """"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","marker_kernel","gpu__time_duration.sum","ns","1000"
"1","kernel","gpu__time_duration.sum","ns","3000000"
"1","kernel","sm__throughput.avg.pct_of_peak_sustained_elapsed","%","12.5"
"""


def test_counters():
    first, second = (nsight.counters(part) for part in nsight.by_case(nsight.read(WIDE)))
    expected = {"kernel": "backward_kernel", "kernels": 2, "counter_ms": 2.5, "cycles": 3.7e6, "sm": 30.5}
    assert first == pytest.approx(expected | {"hbm_read_bytes": 1200.0})
    expected = {"kernel": "forward_kernel", "kernels": 1, "counter_ms": 1.0, "cycles": 1.5e6, "sm": 20.5}
    assert second == pytest.approx(expected)
    [[kernel]] = nsight.by_case(nsight.read(LONG))
    assert nsight.counters([kernel]) == pytest.approx(
        {"kernel": "kernel", "kernels": 1, "counter_ms": 3.0, "sm": 12.5}
    )
    assert nsight.read("==ERROR== nothing\n") == []


def fake_ncu(folder, text: str, unknown: str = "", status: int = 0):
    """Return a program that writes `text` to the log as ncu does, unless asked for an unknown metric."""
    program = folder / "ncu"
    program.write_text(
        f"#!{sys.executable}\nimport sys\n"
        "log = sys.argv[sys.argv.index('--log-file') + 1]\n"
        "metrics = sys.argv[sys.argv.index('--metrics') + 1].split(',')\n"
        f"unknown = {unknown!r}\n"
        "lost = '==ERROR== Failed to find metric ' + unknown + chr(10)\n"
        f"open(log, 'w').write(lost if unknown in metrics else {text!r})\n"
        f"sys.exit({status})\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


def test_nsight_compute(tmp_path):
    cases, shape = [Case("ours", "backward"), Case("ours", "forward")], (2, 3, 64)
    program = fake_ncu(tmp_path, WIDE, unknown="lts__t_sectors_op_red.sum")
    counted = nsight.profile(program, cases, shape, None)
    assert [each["counter_ms"] for each in counted] == pytest.approx([2.5, 1.0])
    with pytest.raises(nsight.NsightError, match="counted 2 of 1 cases"):
        nsight.profile(program, cases[:1], shape, None)
    program = fake_ncu(tmp_path, "==ERROR== ERR_NVGPUCTRPERM\n", status=1)
    with pytest.raises(nsight.NsightError, match=r"^ncu gave no numbers: ERR_NVGPUCTRPERM$"):
        nsight.profile(program, cases, shape, None)
    assert Case.parse(str(cases[0])) == cases[0]


def test_a_batch_too_large_is_halved(tmp_path, monkeypatch):
    def time_steps(model, mode, batch_size, pixels, device, passes, warm_up):
        if batch_size > 300:
            raise torch.OutOfMemoryError("no room")
        return {part: [2.0, 4.0] for part in ("forward", "backward", "step")}

    monkeypatch.setattr(training, "time_steps", time_steps)
    monkeypatch.setattr(training, "TOY_BATCH", 1024)
    result = training.measured(
        parse(["figure1", "--toy", "--output", str(tmp_path)]), "ViT", "toy", "eager", {}
    )
    assert (result["batch_size"], result["forward_ms"]) == (256, 3.0)
    assert result["images_per_s"] == 96e3  # mean of 128 and 64 images a millisecond


def line(what: str, **keys) -> dict:
    return {"what": what, **keys, **ABOUT}


def kernel(
    contender: str, ms: float, direction: str = "backward", repeats: int = 1, **counters
) -> list[dict]:
    case = {"contender": contender, "direction": direction, "dtype": "float32", "repeats": repeats}
    case |= {"shape": [1024, 197, 768]}
    times = line("kernel", **case, ms=ms, ms_interval=ms / 100, runs=3)
    return [times, line("counters", **case, cycles=ms * 1e6, **counters)] if counters else [times]


RUN = [
    *kernel("algorithm 1", 0.5, "forward"),
    *kernel("algorithm 1", 1.0, "forward", repeats=8),
    *kernel(
        "algorithm 1", 700.0, warps_long_scoreboard=60.0, warps_lg_throttle=39.0, warps_selected=1.0, hbm=1.0
    ),
    *kernel("algorithm 1", 701.0, repeats=8),
    *kernel("algorithm 2", 1.5, warps_long_scoreboard=2.0, warps_selected=1.0),
    *kernel("ours", 0.9),
    *kernel("ours", 0.5, warps_long_scoreboard=1.0, warps_selected=1.0),  # again: the last one counts
    line("copy", gb_per_s=4300.0),
]


def test_page_says_what_does_not_hold():
    text = render.page(RUN)
    rows = {row.split(" | ")[0]: row for row in text.splitlines() if row.startswith("| ")}
    assert (
        "| 2.00 times the time | **no**: it shows here |"
        in rows[next(r for r in rows if "the forward pass's time as" in r)]
    )
    assert (
        "| 1.00 times the time | yes |" in rows[next(r for r in rows if "the backward pass's time as" in r)]
    )
    share = rows[next(r for r in rows if "for the long scoreboard alone" in r)]
    assert "| 61% | **no**: the longest are long scoreboard 61%, lg throttle 39% |" in share
    assert (
        "| 3.00 times as fast | yes |"
        in rows[next(r for r in rows if "ours: speed of the backward pass" in r)]
    )
    assert "| not measured |" in rows[next(r for r in rows if "the remaining gap" in r)]
    assert "move in 0.432 ms at best" in text
    assert "254 GB/s: not those of an H200" in text


def test_update(tmp_path):
    """Nothing without a results file; then page and figures, which a check tells from others."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    render.update(tmp_path)
    render.update(tmp_path, check=True)
    assert not list((tmp_path / "docs").iterdir())
    results = tmp_path / render.RESULTS
    results.write_text("".join(json.dumps(each) + "\n" for each in RUN))
    with pytest.raises(SystemExit, match=r"docs/paper.md differs from the results file"):
        render.update(tmp_path, check=True)
    render.update(tmp_path)
    render.update(tmp_path, check=True)
    names = sorted(path.name for path in (tmp_path / "docs").iterdir())
    assert names == ["paper.md", "paper_figure2.png", "paper_figure3.png"]
    shown = {name for name in names if f"({name})" in (tmp_path / "docs/paper.md").read_text()}
    assert shown == {"paper_figure2.png", "paper_figure3.png"}
    (tmp_path / "docs/paper_figure2.png").unlink()
    with pytest.raises(SystemExit, match=r"docs/paper_figure2.png is not drawn"):
        render.update(tmp_path, check=True)
    results.write_text("{")
    with pytest.raises(SystemExit, match=r"paper.jsonl cannot be read"):
        render.update(tmp_path)


def test_numbers_as_text():
    assert [count(value) for value in (None, 5.0, 1536.0, 2.4e9)] == ["-", "5", "1.54 k", "2.4 G"]
    assert with_interval({"ms": 1030.0, "half": 12.3}, "ms", "half", ",.0f") == "1,030 ± 12"
    assert Results(RUN).kernel("ours")["ms"] == 0.5
