"""Pictures of functions and curves: what is drawn, read off the figures."""

import sys
import xml.etree.ElementTree as ElementTree

import numpy
import pytest
import torch
from helpers import micro_config
from PIL import Image
from torch import nn

from flashkat_hf import FlashKATForImageClassification, GroupRational
from flashkat_hf.checkpoints.figures import plot_functions
from flashkat_hf.checkpoints.functions import model_functions
from flashkat_hf.checkpoints.functions_drawing import COLORS
from flashkat_hf.checkpoints.functions_page import save_functions
from flashkat_hf.model.reference import rational_gradients, rational_value


@pytest.fixture
def model() -> FlashKATForImageClassification:
    model = FlashKATForImageClassification(micro_config(num_hidden_layers=3, num_numerator_groups=8))
    with torch.no_grad():
        for layer in model.flashkat.layers:
            layer.mlp.act2.numerator.add_(torch.randn(8, 6), alpha=0.1)
            layer.norm2.weight[:8] *= 2  # group 0 meets more than the others
    return model


def curves(panel) -> dict[str, tuple[numpy.ndarray, numpy.ndarray]]:
    """Return what lines with a name show; of the two of a group the one over its own inputs."""
    return {
        line.get_label(): line.get_data()
        for line in panel.get_lines()
        if not line.get_label().startswith("_")
    }


def shown(figure) -> list:
    return [panel for panel in figure.axes if panel.axison]


def test_functions_of_every_group_are_drawn(model, tmp_path):
    model = nn.ModuleDict({"wrapped": model.train()})
    state = torch.get_rng_state()
    figure = plot_functions(model)
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    names = [f"layer {layer} {act}" for act in ("act1", "act2") for layer in range(3)]
    assert [panel.get_title() for panel in shown(figure)] == names
    drawn = curves(shown(figure)[-1])
    assert drawn.keys() == {"start", "gelu", *(f"group {i}" for i in range(8))}
    act = model["wrapped"].flashkat.layers[2].mlp.act2
    for function in model_functions(model)[-8:]:
        group = function.group
        x, y = drawn[f"group {group}"]
        inside = ~numpy.isnan(y)
        numpy.testing.assert_array_equal(inside, (x >= function.range[0]) & (x <= function.range[1]))
        tables = (table[group : group + 1].detach().double() for table in (act.numerator, act.denominator))
        exact = rational_value(torch.tensor(x)[:, None], *tables)[:, 0]
        numpy.testing.assert_allclose(y[inside], exact[inside])
    x, y = (torch.as_tensor(values) for values in drawn["start"])
    assert (y - x * torch.sigmoid(x)).abs().max() < 1e-3
    torch.testing.assert_close(*(torch.as_tensor(v) for v in (drawn["gelu"][1], nn.functional.gelu(x))))
    assert list(curves(shown(figure)[0])) == [*(f"group {i}" for i in range(8)), "start", "identity"]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [*(f"group {i}" for i in range(8)), "start", "identity (act1), GELU (act2)"]


def test_a_panel_shows_the_range_of_its_inputs_and_their_histograms(model):
    functions = model_functions(model, layer=0)[:8]
    (panel, _) = shown(plot_functions(model, layer=0))
    assert panel.get_xlim() == (
        min(function.range[0] for function in functions),
        max(function.range[1] for function in functions),
    )
    faint = [line for line in panel.get_lines() if line.get_alpha() == 0.3]
    assert len(faint) == 8
    assert all(numpy.isfinite(line.get_ydata()).all() for line in faint)
    assert any(numpy.isnan(curves(panel)[f"group {group}"][1]).any() for group in range(1, 8))
    heights = [patch.get_data().values for patch in panel.patches]
    assert len(heights) == 8
    bottom, top = panel.get_ylim()
    assert all(bottom <= values.min() < values.max() < bottom + 0.23 * (top - bottom) for values in heights)


def test_groups_can_be_told_apart_without_colours(model):
    """Each curve bears its group's number, in the groups' colours, which differ, and within the panel."""
    panel = shown(plot_functions(model, layer=1))[1]
    assert [text.get_text() for text in panel.texts] == [str(group) for group in range(8)]
    assert [text.get_color() for text in panel.texts] == list(COLORS["light"])
    places = [text.get_position() for text in panel.texts]
    assert len(set(places)) == 8
    (left, right), (bottom, top) = panel.get_xlim(), panel.get_ylim()
    assert all(left < x < right and bottom < y < top for x, y in places)


def test_layer_group_slope_and_comparison(model):
    other = FlashKATForImageClassification(model.config)
    figure = plot_functions(model, layer=1, group=3, what="slope", compare=other, size="column", theme="dark")
    assert [panel.get_title() for panel in shown(figure)] == ["layer 1 act1", "layer 1 act2"]
    panel = shown(figure)[1]
    assert curves(panel).keys() == {"start", "gelu", "group 3"}
    x, y = curves(panel)["group 3"]
    act = model.flashkat.layers[1].mlp.act2
    x = torch.tensor(x[~numpy.isnan(y)])[:, None]
    tables = (table[3:4].detach().double() for table in (act.numerator, act.denominator))
    exact = rational_gradients(torch.ones_like(x), x, *tables)[0][:, 0]
    numpy.testing.assert_allclose(y[~numpy.isnan(y)], exact)
    (compared,) = [line for line in panel.get_lines() if line.get_label() == "_other"]
    (start,) = [line for line in panel.get_lines() if line.get_label() == "start"]
    numpy.testing.assert_allclose(compared.get_ydata(), start.get_ydata())  # the other is at its start
    assert panel.get_facecolor()[:3] != (1, 1, 1)
    assert figure.get_figwidth() < 3.6
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[-2:] == ["this model", "the other"]


def test_any_module_with_rationals_is_drawn():
    """Where nothing can be measured the range is [-3, 3], and there are no histograms."""
    figure = plot_functions(nn.Sequential(nn.Linear(4, 8), GroupRational(8, num_groups=2), nn.Linear(8, 2)))
    (panel,) = shown(figure)
    assert panel.get_title() == "1"
    assert panel.get_xlim() == (-3, 3)
    assert not panel.patches
    batches = [torch.randn(64, 4)]
    measured = plot_functions(nn.Sequential(GroupRational(4, num_groups=2)), batches)
    (panel,) = shown(measured)
    assert panel.get_xlim() != (-3, 3)
    assert len(panel.patches) == 2


def test_files(model, tmp_path):
    functions = model_functions(model)
    for name, options in (("a.png", {"theme": "dark"}), ("b.svg", {"size": "column"}), ("c.html", {})):
        save_functions(tmp_path / name, functions, **options)
    with Image.open(tmp_path / "a.png") as image:
        assert image.getpixel((0, 0))[:3] == (0x15, 0x18, 0x1C)
    assert ElementTree.parse(tmp_path / "b.svg").getroot().tag.endswith("svg")
    page = (tmp_path / "c.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 2
    assert "prefers-color-scheme: dark" in page
    assert page.count("<tr>") == 1 + len(functions)
    assert "http" not in page.replace("http-equiv", "")
    save_functions(tmp_path / "d.html", functions, theme="dark")
    assert (tmp_path / "d.html").read_text().count("data:image/svg+xml;base64,") == 1


def test_nothing_to_draw(model, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="Linear contains no GroupRational"):
        plot_functions(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="there is no layer 7: the layers are 0 to 2"):
        plot_functions(model, layer=7)
    with pytest.raises(ValueError, match="there is no group 8: the groups are 0 to 7"):
        plot_functions(model, group=8)
    with pytest.raises(ValueError, match="what must be value or slope, not 'curvature'"):
        plot_functions(model, what="curvature")
    with pytest.raises(ValueError, match="the two models have other activations"):
        plot_functions(model, compare=GroupRational(8))
    larger = FlashKATForImageClassification(micro_config(num_hidden_layers=4, num_numerator_groups=8))
    with pytest.raises(ValueError, match="only the other has layer3_act1_group0"):
        plot_functions(model, compare=larger)
    with pytest.raises(ValueError, match=r"a\.pdf must end with \.png, \.svg, \.html"):
        save_functions(tmp_path / "a.pdf", model_functions(model))
    with pytest.raises(ValueError, match=r"cannot write .*: No such file or directory"):
        save_functions(tmp_path / "lost" / "a.png", model_functions(model, layer=0))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'flashkat_hf\[functions\]'"):
        plot_functions(model)
