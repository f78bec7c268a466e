"""Curves of a run: what is drawn, read off the figure."""

import sys

import numpy
import pytest

from flashkat_hf.training import run_folder
from flashkat_hf.training.curves import plot_curves


def curves(panel) -> dict[str, tuple[numpy.ndarray, numpy.ndarray]]:
    return {
        line.get_label(): line.get_data()
        for line in panel.get_lines()
        if not line.get_label().startswith("_")
    }


def test_curves():
    metrics = [{"kind": "step", "step": 10 * i, "loss": 3.0 - i, "learning_rate": 1e-3} for i in range(1, 4)]
    metrics += [
        {"step": 30, "epoch": 1, "loss": 9.0, "top1": 0.5, "top1_ema": 0.25},
        {"step": 60, "epoch": 2, "loss": 7.0, "top1": 0.75},
        {"step": 90, "epoch": 3, "loss": 6.0},  # not evaluated
    ]
    loss, rate, accuracy = plot_curves(metrics[::-1]).axes
    assert [list(values) for values in curves(loss)["single batches"]] == [[10, 20, 30], [2.0, 1.0, 0.0]]
    means = [[15, 45, 75], [9.0, 7.0, 6.0]]  # each over the epoch that ends at its step
    assert [list(values) for values in curves(loss)["mean of an epoch"]] == means
    assert list(curves(rate)["learning rate"][1]) == [1e-3] * 3
    assert [list(values) for values in curves(accuracy)["weights"]] == [[30, 60], [50.0, 75.0]]
    assert [list(values) for values in curves(accuracy)["averaged weights"]] == [[30], [25.0]]
    only = plot_curves([{"step": 5, "loss": 1.0, "top1": None}]).axes
    assert [panel.get_title() for panel in only] == ["loss"]


def test_the_warm_up_is_drawn(run, monkeypatch):
    """The rate of every update, though few lines are logged; and the first loss of all."""
    drawn = []
    plot = run_folder.plot_curves
    monkeypatch.setattr(run_folder, "plot_curves", lambda *given: drawn.append(plot(*given)) or drawn[-1])
    output = run(
        log_steps=5, warmup_epochs=1, warmup_learning_rate=1e-4, schedule="update", learning_rate=1e-3
    )
    loss, rate, _ = drawn[0].axes
    steps, rates = curves(rate)["learning rate"]
    assert list(steps) == [1, 2, 3, 4, 5, 6]
    assert rates[:3] == pytest.approx([1e-4, 4e-4, 7e-4])
    assert list(curves(loss)["single batches"][0]) == [1, 5]
    assert list(curves(loss)["mean of an epoch"][0]) == [1.5, 4.5]
    assert (output / "curves.png").stat().st_size > 1000


def test_nothing_to_plot(monkeypatch):
    with pytest.raises(ValueError, match="no line of the metrics has a step and"):
        plot_curves([{"step": 1}, {"loss": 2.0}])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'flashkat_hf\[train\]'"):
        plot_curves([{"step": 1, "loss": 2.0}])
