"""The bench of what rationals bring to learning: at toy size, and what is made of its numbers."""

import json
import os
import subprocess
import sys
from statistics import mean, stdev

import numpy
import pytest
import torch
from helpers import ROOT
from scipy import stats

if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from benchmarks.learning import (
    contenders,
    figure,
    functions,
    low_precision,
    pictures,
    plan,
    settings,
    statistics,
    tables,
    training,
)
from benchmarks.learning.__main__ import main
from flashkat_hf import START_TABLES, GroupRational
from flashkat_hf.model.reference import rational_gradients

SIZES = settings.TOY | {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
CHOSEN = ("gelu", "swiglu", "flashkat", "converted", "distilled", "distilled-one", "atomic", "float16")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The command's arguments, output and results of a toy run of every stage."""
    output = tmp_path_factory.mktemp("learning") / "learning.jsonl"
    arguments = ["--toy", "--data", "digits", "--device", "cpu", "--seeds", "3", "--commit", "0123456789"]
    arguments += ["--contenders", *CHOSEN, "--output", str(output)]
    return arguments, started(*arguments), output


def started(*arguments: str) -> str:
    """Run the command in a process of its own, whose threads no test has set; return what it says."""
    command = [sys.executable, "-m", "benchmarks.learning", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    return run.stdout


def read(output) -> list[dict]:
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_every_stage_runs_at_toy_size(toy):
    _, text, output = toy
    rows = read(output)
    parts = {row["part"] for row in rows}
    named = "rates parameters source upcycled functions distilled steps time precision"
    assert parts == set(named.split())
    assert text.endswith("# nothing is missing\n")
    of = {
        (row["part"], row["contender"]): {each["seed"] for each in rows if each["part"] == row["part"]}
        for row in rows
        if row["part"] in ("parameters", "distilled", "upcycled", "precision")
    }
    assert of.keys() == {
        *(("parameters", name) for name in ("gelu", "swiglu", "flashkat")),
        *(("distilled", name) for name in ("distilled", "distilled-one")),
        *(("upcycled", name) for name in ("gelu", "converted")),
        *(("precision", name) for name in ("atomic", "float16")),
    }
    assert all(seeds == {0, 1, 2} for seeds in of.values())
    assert not any(row.get("diverged") for row in rows)


def test_a_second_call_adds_only_what_is_missing(toy):
    arguments, _, output = toy
    lines = output.read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["part"] != "time"]
    output.write_text("".join(line + "\n" for line in kept))
    text = started(*arguments, "--stages", "primary", "time", "--contenders", "swiglu")
    assert text.endswith("# nothing is missing\n")
    added = read(output)[len(kept) :]
    assert [(row["part"], row["contender"], row["seed"]) for row in added] == [
        ("time", "swiglu", seed) for seed in range(3)
    ]
    steps = {row["contender"]: row["ms"] for row in read(output) if row["part"] == "steps"}
    whole = next(row["updates"] for row in read(output) if row["part"] == "parameters")
    assert added[0]["updates"] == max(1, round(whole * steps["gelu"] / steps["swiglu"]))


def test_an_end_of_time_is_clean(toy, tmp_path, capsys):
    arguments, _, _ = toy
    output = tmp_path / "r.jsonl"
    main([*arguments, "--minutes", "0.0001", "--output", str(output)])
    assert capsys.readouterr().out == "# the time is over; the same command goes on from here\n"
    assert output.read_text() == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contenders", "relu"], "--contenders: relu unknown; known are gelu, swiglu,"),
        (["--stages", "all"], "--stages: all unknown; known are rates,"),
        (["--data", "mnist"], "--data: mnist unknown; known are fashion, digits"),
        (["--seeds", "1"], "--seeds: 1 tells no spread"),
        (["--minutes", "0"], "--minutes: 0.0 must be above 0"),
        (["--together", "2"], "--together: needs a GPU"),
        (["--data", "fashion", "--source", "nowhere"], "--data fashion: .*apt-get install"),
        (["--data", "digits", "--pictures", "60"], "--pictures: 60 are too few for a batch of 64"),
        (["--data", "digits", "--stages", "primary"], "no learning rate chosen for gelu on digits"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(arguments, message, tmp_path):
    output = tmp_path / "r.jsonl"
    with pytest.raises(SystemExit, match=message) as error:
        main(["--output", str(output), "--device", "cpu", "--commit", "c", *arguments])
    assert "\n" not in str(error.value)
    assert not output.exists() or output.read_text() == ""


def test_a_broken_results_file_is_named(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"data": "digits"}\n{\n')
    with pytest.raises(SystemExit, match=r"--output: line 2 of .*r\.jsonl is no JSON; remove it"):
        main(["--output", str(tmp_path / "r.jsonl"), "--data", "digits", "--device", "cpu", "--commit", "c"])


def test_contenders_of_a_seed_share_their_start():
    """All that a ViT has a place for is the FlashKAT's; another seed, and timm's own start, are others."""
    flashkat, gelu, swiglu, own = (
        contenders.make(name, 3, SIZES) for name in ("flashkat", "gelu", "swiglu", "gelu-own-start")
    )
    ours = flashkat.state_dict()
    assert torch.equal(
        gelu.state_dict()["blocks.0.attn.qkv.weight"], ours["flashkat.layers.0.attention.qkv.weight"]
    )
    assert torch.equal(gelu.state_dict()["blocks.0.mlp.fc1.weight"], ours["flashkat.layers.0.mlp.fc1.weight"])
    assert torch.equal(swiglu.state_dict()["pos_embed"], gelu.state_dict()["pos_embed"])
    assert not torch.equal(own.state_dict()["pos_embed"], gelu.state_dict()["pos_embed"])
    other = contenders.make("gelu", 4, SIZES)
    assert not torch.equal(other.state_dict()["pos_embed"], gelu.state_dict()["pos_embed"])


def test_parameters_are_equal():
    """At the real size, within half a percent; SwiGLU of 88 channels, which says so, has two percent more."""
    sizes = {name: SIZES[name] for name in ("image_size", "patch_size", "num_channels", "num_labels")}
    counts = {
        name: contenders.num_parameters(contenders.make(name, 0, sizes))
        for name in (*contenders.PRIMARY, *contenders.VARIANTS)
    }
    gelu = counts.pop("gelu")
    assert counts.pop("swiglu-88") / gelu == pytest.approx(1.017, abs=0.005)
    assert all(count / gelu == pytest.approx(1, abs=0.005) for count in counts.values())


def test_a_converted_vit_keeps_its_function():
    torch.manual_seed(0)
    images = torch.randn(4, 1, 8, 8)
    source = contenders.make("gelu", 0, SIZES).eval()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        expected = source(images)
        again = contenders.upcycled("gelu", source.state_dict(), SIZES).eval()(images)
        converted = contenders.upcycled("converted", source.state_dict(), SIZES).eval()(images).logits
    assert torch.equal(again, expected)
    assert (converted - expected).abs().max() < 0.02 * expected.std()  # the table is 3.5e-3 from GELU


@pytest.mark.parametrize(
    ("name", "still"),
    [
        ("flashkat", ()),
        ("fixed", ("act1.numerator", "act1.denominator", "act2.numerator", "act2.denominator")),
        ("frozen-denominators", ("act1.denominator", "act2.denominator")),
        ("act1-alone", ("act2.numerator", "act2.denominator")),
        ("act2-alone", ("act1.numerator", "act1.denominator")),
    ],
    ids=str,
)
def test_what_is_frozen_stays(name, still):
    model = contenders.make(name, 0, SIZES)
    before = {path: parameter.clone() for path, parameter in model.named_parameters()}
    digits = pictures.load("digits").first(settings.TOY_PICTURES)
    training.train([training.Run(training.Task(name, 0, 1e-2, 6, 32), model, digits, "cpu")])
    unchanged = {path for path, parameter in model.named_parameters() if torch.equal(parameter, before[path])}
    assert unchanged == {f"flashkat.layers.0.mlp.{path}" for path in still}


def test_coefficients_have_their_own_rate_and_decay():
    for name, factor, decay in (("rate-10", 10, 0.1), ("undecayed", 1, 0.0)):
        model = contenders.make(name, 0, SIZES)
        groups = contenders.groups(model, name, 1e-3, 0.1)
        table = model.get_parameter("flashkat.layers.0.mlp.act1.numerator")
        weight = model.get_parameter("flashkat.layers.0.mlp.fc1.weight")
        found = {id(parameter): group for group in groups for parameter in group["params"]}
        assert len(found) == len(list(model.parameters()))
        assert found[id(table)]["lr"] == pytest.approx(1e-3 * factor)
        assert found[id(table)]["weight_decay"] == decay
        assert (found[id(weight)]["lr"], found[id(weight)]["weight_decay"]) == (1e-3, 0.1)


@pytest.mark.parametrize("name", ["flashkat", "float16"])
def test_updates_before_a_capture_are_undone(name):
    """As if they had not been, to the bit."""
    digits, task = pictures.load("digits").first(settings.TOY_PICTURES), training.Task(name, 0, 1e-2, 8, 32)
    losses = []
    for warm in (0, 3):
        run = training.Run(task, contenders.make(name, 0, SIZES), digits, "cpu")
        run.next_epoch()
        start = [parameter.detach().clone() for parameter in run.model.parameters()]
        for _ in range(warm):
            run.update()
        if warm:
            run.undo(start)
        run.epoch = 0
        training.train([run])
        losses.append(run.losses)
    assert torch.equal(*losses)
    assert losses[0].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gelu", "swiglu", "flashkat", "bfloat16-tables", "atomic", "float16"])
def test_graphs_beside_each_other_train_as_launches_alone(name):
    digits = pictures.load("digits").to("cuda")
    sizes = digits.sizes
    tasks = [training.Task(name, seed, 1e-3, 30, 64) for seed in (0, 1)]
    alone = [training.Run(task, contenders.make(name, task.seed, sizes), digits, "cuda") for task in tasks]
    for run in alone:
        run.prepare = lambda: None
        training.train([run])
    beside = [training.Run(task, contenders.make(name, task.seed, sizes), digits, "cuda") for task in tasks]
    training.train(beside)
    assert all(run.graph is not None for run in beside)
    for run, other in zip(alone, beside, strict=True):
        tolerance = 2e-2 if name == "atomic" else 2e-3  # its order is drawn anew
        assert torch.allclose(run.losses, other.losses, rtol=tolerance)


def test_the_schedule_rises_and_falls():
    (rates, tenth) = training.schedule([{"lr": 1.0}, {"lr": 0.1}], 100)
    assert 0 < rates[0] < rates[3] < max(rates) == pytest.approx(1.0, abs=0.01)
    assert rates[50] == pytest.approx(0.5, abs=0.02)
    assert 0 <= rates[-1] < 0.002
    assert tenth == pytest.approx([rate / 10 for rate in rates])


def test_an_epoch_follows_from_seed_and_number():
    """Each picture once, moved by at most a pixel; another number, another order."""
    digits = pictures.load("digits").first(50)
    images, labels = digits.epoch(1, 0)
    again, _ = digits.epoch(1, 0)
    other, _ = digits.epoch(1, 1)
    assert torch.equal(images, again)
    assert not torch.equal(images, other)
    assert sorted(labels.tolist()) == sorted(digits.train_labels.tolist())
    still = pictures.replace(digits, shift=0)
    order = {tuple(image.flatten().tolist()) for image in still.epoch(1, 0)[0]}
    assert order == {tuple(image.flatten().tolist()) for image in still.normalised(still.train)}
    mirrored, _ = pictures.replace(still, mirrored=True).epoch(1, 0)
    plain, _ = pictures.replace(still, mirrored=False).epoch(1, 0)
    flipped = [torch.equal(a, b.flip(-1)) for a, b in zip(mirrored, plain, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(mirrored, plain, strict=True)]
    assert all(a or b for a, b in zip(flipped, same, strict=True))
    assert 10 < sum(flipped) < 40


def test_held_out_pictures_are_of_the_training():
    digits = pictures.load("digits")
    held = digits.with_held_out()
    assert len(held.train) + len(held.test) == len(digits.train)
    rows = {tuple(image.flatten().tolist()) for image in digits.train}
    assert {tuple(image.flatten().tolist()) for image in held.test} <= rows


@pytest.mark.parametrize("rows", [1, 8], ids=["shared", "separate"])
def test_atomic_sums_are_the_gradients_up_to_rounding(rows):
    torch.manual_seed(0)
    x, grad_y = torch.randn(2, 5, 40, 16)
    tables = [torch.tensor([row] * 8) for row in START_TABLES["swish"]]
    tables = [table + 0.1 * torch.randn_like(table) for table in tables]
    tables[0] = tables[0][:rows].contiguous()
    exact = rational_gradients(grad_y.double(), x.double(), *(table.double() for table in tables))
    sums = low_precision.block_sums(x, grad_y, *tables)
    assert sums.shape == (4, 8, 10)  # 200 rows in blocks of 64
    whole = sums.sum(0).split([6, 4], dim=-1)
    whole = (whole[0].sum(0, keepdim=True) if rows == 1 else whole[0], whole[1])
    for got, true in zip(whole, exact[1:], strict=True):
        assert (got - true).abs().max() < 1e-5 * true.abs().max()
    layer = GroupRational(16, 8, rows)
    layer.load_state_dict({"numerator": tables[0], "denominator": tables[1]})
    parent = torch.nn.Sequential(layer)
    low_precision.sum_atomically(parent)
    leaf = x.clone().requires_grad_()
    parent(leaf).backward(grad_y)
    assert (leaf.grad - exact[0]).abs().max() < 1e-5 * exact[0].abs().max()
    for parameter, true in zip(parent.parameters(), exact[1:], strict=True):
        error = (parameter.grad - true).abs().max() / true.abs().max()
        assert 1e-4 < error < 0.05  # bfloat16 has steps of 2^-8; a few additions, and no more


def test_additions_are_rounded_one_after_the_other():
    """In bfloat16 256 + 1 is 256, so ones behind 256 are lost, and the order decides how many."""
    terms = torch.ones(300, 1)
    assert low_precision.added_one_by_one(terms).item() == 256
    terms[0] = 256
    torch.manual_seed(0)
    sums = {low_precision.added_one_by_one(terms).item() for _ in range(5)}
    assert len(sums) > 1
    assert max(sums) < 555


def test_functions_are_described_and_fitted():
    """A group that is moved is told from those that are not, and one function fits equal ones exactly."""
    model = contenders.make("separate", 0, SIZES)
    images = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    name = "flashkat.layers.0.mlp.act2.numerator"
    row = functions.describe(model, images)
    assert max(row["layers"]["0.act2"]["distance"]) < 1e-6
    numerator, denominator = functions.one_function([row], "act2")
    x = torch.tensor(row["inputs"]["act2"], dtype=torch.float64)[:, None]
    fitted = GroupRational(1, 1, dtype=torch.float64)
    fitted.load_state_dict({"numerator": numerator[None], "denominator": denominator[None]})
    start = GroupRational(1, 1, init="swish", dtype=torch.float64)
    assert (fitted(x) - start(x)).abs().max() < 1e-4 * x.abs().max()
    with torch.no_grad():
        model.get_parameter(name)[5].mul_(2)
    row = functions.describe(model, images)
    distance, apart = (row["layers"]["0.act2"][what] for what in ("distance", "apart"))
    assert numpy.argmax(distance) == numpy.argmax(apart) == 5
    assert distance[5] > 0.5 > 1e-6 > max(distance[:5])
    twin = contenders.make("separate", 1, SIZES)
    functions.install(twin, [{**row, "seed": 0}], "own", 1)
    assert torch.allclose(twin.get_parameter(name), model.get_parameter(name))


def test_statistics():
    """The error is the standard error, the test the paired one, the power as a simulation has it."""
    first, second = {0: 0.91, 1: 0.93, 2: 0.92, 5: 0.9}, {0: 0.90, 1: 0.90, 2: 0.91, 7: 0.1}
    found = statistics.difference(first, second)
    gaps = [0.01, 0.03, 0.01]
    assert found.count == 3
    assert found.mean == pytest.approx(mean(gaps))
    assert found.error == pytest.approx(stdev(gaps) / 3**0.5)
    seeds = (0, 1, 2)
    expected = stats.ttest_rel([first[s] for s in seeds], [second[s] for s in seeds]).pvalue
    assert found.p == pytest.approx(expected)
    assert statistics.difference({0: 0.5}, {0: 0.5}) is None
    assert statistics.difference({0: 0.5, 1: 0.6}, {0: 0.5, 1: 0.6}).p == 1.0
    assert statistics.holm([0.01, 0.04]) == pytest.approx([0.02, 0.04])
    effect = statistics.detectable(10, 1.0, 5)
    draws = numpy.random.default_rng(0).normal(effect, 1.0, (20_000, 10))
    seen = (stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.05 / 5).mean()
    assert seen == pytest.approx(0.8, abs=0.01)


def line(contender: str, seed: int, accuracy: float, part: str = "parameters", **others) -> dict:
    about = {"data": "digits", "pictures": 1437, "epochs": 9, "toy": False, "machine": "GPU", "torch": "2"}
    about |= {"timm": "1", "commit": "0123456789", "parameters": 1000, "updates": 50, "train_loss": 0.5}
    about |= {"diverged": False, "seconds": 2.0, "rate": 1e-3}
    return {"part": part, "contender": contender, "seed": seed, "accuracy": accuracy, **about, **others}


def lines() -> list[dict]:
    wobble = (0.0, 0.004, 0.001, 0.003)
    rows = [line("gelu", seed, 0.9 + noise) for seed, noise in enumerate(wobble)]
    rows += [line("flashkat", seed, 0.95 + noise / 2) for seed, noise in enumerate(wobble)]
    rows += [line("fixed", seed, 0.95 + noise) for seed, noise in enumerate(reversed(wobble))]
    return rows


def test_tables_say_what_was_found():
    rows = tables.questions(lines()).splitlines()
    assert rows[0] == "**scikit-learn's digits, 1,437 training pictures, 9 epochs; GPU**"
    assert rows[4].startswith("| FlashKAT as released against a GELU ViT | 4 | +4.90 ± 0.05 | ")
    assert rows[4].endswith("| better |")
    assert rows[5].startswith(
        "| tables that learn against the same tables frozen at their start | 4 | -0.10 ± "
    )
    assert "no difference seen; " in rows[5]
    table = tables.equal_parameters(lines()).splitlines()
    assert table[4] == "| ViT, GELU | 1,000 | 4 | 90.20% ± 0.09 |  |  | 0.500 | 0 |"
    assert table[5].startswith(
        "| FlashKAT as released: identity and swish, shared numerators | 1,000 | 4 | 95.10%"
    )


def test_variants_stand_beside_flashkat():
    """At equal parameters and, where they ran, at equal time; contenders of other families are left out."""
    rows = [*lines(), *(line("groups-1", seed, 0.96 + seed / 1000) for seed in range(3))]
    rows += [line("swiglu-88", 0, 0.9), *(line("flashkat", seed, 0.95, "time") for seed in range(2))]
    rows += [line("groups-1", seed, 0.93 + seed / 1000, "time") for seed in range(2)]
    table = tables.variants(rows).splitlines()
    assert table[4].startswith("| 1 group | 3 | +1.02 ± ")
    assert " | -1.95 ± 0.05 | " in table[4]
    assert table[5] == ""


def test_places_are_not_mixed():
    """Another machine has a table of its own; pilots and toys have none."""
    others = [row | {"machine": "CPU, 1 threads", "accuracy": 0.5} for row in lines()]
    hidden = [line("gelu", 0, 0.1, "pilot"), line("gelu", 0, 0.1, toy=True, epochs=1)]
    text = tables.equal_parameters([*others, *lines(), *hidden])
    assert text.index("; GPU**") < text.index("; CPU, 1 threads**")
    assert text.count("| ViT, GELU |") == 2
    assert "90.20%" in text
    assert "50.00%" in text
    assert tables.equal_time(lines()) == tables.NOT_RUN


def test_the_time_table_has_gelus_own_runs():
    rows = lines() + [line("swiglu", seed, 0.92, "time", updates=40) for seed in range(2)]
    rows += [line(name, 0, 0, "steps", ms=ms) for name, ms in (("gelu", 1.0), ("swiglu", 1.25))]
    table = tables.equal_time(rows).splitlines()
    assert table[4].startswith("| ViT, GELU | 1.00 | 50 | 4 |")
    assert table[5].startswith("| ViT, SwiGLU of 85 channels (equal parameters) | 1.25 | 40 | 2 | 92.00%")


def test_rates_and_functions_are_shown():
    rates = [
        line("gelu", seed, accuracy, "rates", rate=rate)
        for seed in (100, 101)
        for rate, accuracy in ((1e-3, 0.8), (2e-3, 0.9))
    ]
    assert "| ViT, GELU | 80.00% | **90.00%** |" in tables.rates(rates)
    layers = {
        "0.act1": {"distance": [0.5, 0.1], "apart": [0.02, 0.001]},
        "0.act2": {"distance": [0], "apart": [0]},
    }
    text = tables.became([line("flashkat", 0, 0, "functions", of="parameters", layers=layers)])
    assert "shared numerators, act1 | 30.0% | 1.1% | 50% |" in text


def test_the_pilot_says_what_can_be_seen():
    table = tables.pilot([row | {"part": "pilot"} for row in lines()]).splitlines()
    assert table[0].endswith("| 5 seeds see | 10 seeds see | 20 seeds see |")
    assert "| ViT, GELU; scikit-learn's digits, 1,437 pictures, 9 epochs | 4 | 90.20% ± 0.09 |" in table[2]
    spread, *seen = (float(cell) for cell in table[2].split("|")[-5:-1])
    assert spread == pytest.approx(100 * stdev(lines()[seed]["accuracy"] for seed in range(4)), abs=0.005)
    assert seen[1] == pytest.approx(100 * statistics.detectable(10, 2**0.5 * spread / 100, 5), rel=0.03)
    assert seen == sorted(seen, reverse=True)


def test_a_picture_is_drawn(tmp_path):
    drawn = figure.accuracies([*lines(), *(row | {"machine": "CPU"} for row in lines())])
    drawn.savefig(tmp_path / "p.png")
    assert len(drawn.axes) == 2
    labels = [label.get_text() for label in drawn.axes[0].get_yticklabels()]
    assert labels == [contenders.CONTENDERS[name].text for name in ("gelu", "flashkat", "fixed")]


def test_the_rate_is_the_best_on_held_out_pictures():
    digits = pictures.load("digits").first(settings.TOY_PICTURES)
    arguments = ["--output", "none.jsonl", "--toy", "--device", "cpu"]
    bench = plan.Bench(settings.parse(arguments), digits, "CPU", lambda row: None)
    for rate, accuracy in zip(plan.RATES, (0.5, 0.7, 0.7), strict=True):
        bench.rows += [line("gelu", seed, accuracy, "rates", rate=rate) for seed in (100, 101)]
    assert bench.rate("gelu") == plan.RATES[1]
    with pytest.raises(SystemExit, match="no learning rate chosen for swiglu"):
        bench.rate("swiglu")


def test_a_run_that_fails_costs_the_others_nothing(tmp_path, monkeypatch, capsys):
    """It is tried alone, named at the end, and what trained is written."""
    make = plan.make

    def broken(name, seed, sizes):
        if name == "swiglu" and seed < 100:
            raise RuntimeError("no such kernel")
        return make(name, seed, sizes)

    monkeypatch.setattr(plan, "make", broken)
    output = tmp_path / "r.jsonl"
    arguments = ["--toy", "--data", "digits", "--device", "cpu", "--seeds", "2", "--output", str(output)]
    arguments += ["--commit", "c", "--stages", "rates", "primary", "--contenders", "gelu", "swiglu"]
    with pytest.raises(SystemExit, match="2 failed: parameters, swiglu, seed 0: no such kernel; parameters"):
        main(arguments)
    written = [row["contender"] for row in read(output) if row["part"] == "parameters"]
    assert written == ["gelu", "gelu"]
    assert "failed: parameters, swiglu, seed 1: no such kernel" in capsys.readouterr().err
