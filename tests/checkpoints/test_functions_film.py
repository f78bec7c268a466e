"""The film of learned functions: its frames, its fixed axes, and what it is made from."""

import json

import numpy
import pytest
import torch
from helpers import micro_config
from PIL import Image

from flashkat_hf import FlashKATForImageClassification, GroupRational
from flashkat_hf.checkpoints import functions_film
from flashkat_hf.checkpoints.functions import model_functions
from flashkat_hf.checkpoints.functions_film import from_records, save_film, to_records


@pytest.fixture
def times() -> list:
    """Return the functions of a model of one layer at three times, the inputs as a film has them."""
    model = FlashKATForImageClassification(micro_config(num_hidden_layers=1, num_numerator_groups=8))
    times = []
    for epoch in range(3):
        functions = model_functions(model)
        times.append((f"epoch {epoch}", from_records(json.loads(json.dumps(to_records(functions))))))
        with torch.no_grad():
            model.flashkat.layers[0].mlp.act1.numerator[:, 2] += 1.0
    return times


def test_records_keep_functions_and_ranges():
    (function,) = model_functions(GroupRational(4, num_groups=1), [torch.randn(100, 4)])
    (again,) = from_records(json.loads(json.dumps(to_records([function]))))
    assert (again.label, again.range, again.init) == (function.label, function.range, function.init)
    x = numpy.linspace(-3, 3, 7)
    numpy.testing.assert_array_equal(again(x), function(x))
    assert not again.inputs.counted


def test_frames_show_what_moves_and_nothing_else(times, tmp_path):
    path = tmp_path / "functions.gif"
    path.write_text("an earlier one")
    save_film(path, times)
    with Image.open(path) as film:
        assert film.n_frames == 3
        frames = []
        for index in range(3):
            film.seek(index)
            frames.append(numpy.asarray(film.convert("RGB")).astype(int))
    changed = numpy.abs(frames[2] - frames[1]).sum(-1) > 0
    height, width = changed.shape
    assert changed[: height // 2, : width // 2].any()  # act1's curves bend
    assert not changed[-40:].any()  # the legend stays
    assert not changed[height // 10 :, :16].any()  # and so do the ticks
    assert (frames[0][-20:] == frames[2][-20:]).all()


def test_long_films_show_the_first_and_the_last_time(times, tmp_path, monkeypatch):
    monkeypatch.setattr(functions_film, "NUM_FRAMES", 2)
    drawn = []
    draw = functions_film.draw_functions
    monkeypatch.setattr(
        functions_film, "draw_functions", lambda *a, **k: drawn.append(k["title"]) or draw(*a, **k)
    )
    save_film(tmp_path / "functions.gif", times)
    assert drawn == ["epoch 0", "epoch 2"]


def test_times_of_different_models_are_refused(times, tmp_path):
    others = model_functions(GroupRational(8))
    with pytest.raises(ValueError, match="must be the same at all times"):
        save_film(tmp_path / "functions.gif", [*times, ("epoch 3", others)])
