"""Curves of a run: what is drawn, read off the figure."""

import sys

import numpy
import pytest

from flashkat_hf.training.curves import plot_curves


def curves(panel) -> dict[str, tuple[numpy.ndarray, numpy.ndarray]]:
    return {
        line.get_label(): line.get_data()
        for line in panel.get_lines()
        if not line.get_label().startswith("_")
    }


def test_curves():
    metrics = [{"step": 10 * i, "epoch": i // 3, "loss": 3.0 - i, "learning_rate": 1e-3} for i in range(1, 4)]
    metrics += [
        {"step": 30, "epoch": 0, "loss": 9.0, "top1": 0.5, "top1_ema": 0.25},
        {"step": 60, "top1": 0.75},
    ]
    loss, rate, accuracy = plot_curves(metrics[::-1]).axes
    assert [list(values) for values in curves(loss)["training"]] == [[10, 20, 30], [2.0, 1.0, 0.0]]
    assert list(curves(rate)["learning rate"][1]) == [1e-3] * 3
    assert [list(values) for values in curves(accuracy)["weights"]] == [[30, 60], [50.0, 75.0]]
    assert [list(values) for values in curves(accuracy)["averaged weights"]] == [[30], [25.0]]
    only = plot_curves([{"step": 5, "loss": 1.0, "top1": None}]).axes
    assert [panel.get_title() for panel in only] == ["loss"]


def test_nothing_to_plot(monkeypatch):
    with pytest.raises(ValueError, match="no line of the metrics has a step and"):
        plot_curves([{"step": 1}, {"loss": 2.0}])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'flashkat_hf\[train\]'"):
        plot_curves([{"step": 1, "loss": 2.0}])
