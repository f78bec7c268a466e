"""Exported folders: proved when they are written, run by their own program, refused in one line."""

import json
import os
import runpy
import sys
import zipfile

import numpy
import onnx
import onnxruntime
import pytest
import torch
from helpers import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file

from flashkat_hf.cli import main
from flashkat_hf.deployment import export_model, writers
from flashkat_hf.deployment.export import compare

ALLOWED = {"fp32": 1e-4, "fp16": 2e-2, "int8": 0.5}


@pytest.fixture
def trained(bare_folder):
    """Return a folder whose logits differ between images, as a trained model's do."""
    path = bare_folder / "model.safetensors"
    state = load_file(path)
    torch.manual_seed(0)
    for name, tensor in state.items():
        scale = 0.05 if "numerator" in name or "denominator" in name else 0.1
        state[name] = tensor + scale * torch.rand_like(tensor).sub(0.5 if tensor.ndim > 1 else 0.0)
    save_file(state, path, {"format": "pt"})
    return bare_folder


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    values = numpy.random.default_rng(0).integers(0, 256, (6, 8, 10, 3), dtype=numpy.uint8)
    for index, pixels in enumerate(values):
        Image.fromarray(pixels).resize((50, 40), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return folder


def unpacked(path) -> bytes:
    """Return the bytes of a file, or of all members of an archive."""
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return b"".join(archive.read(name) for name in archive.namelist())


def named(folder, image, capsys, monkeypatch) -> str:
    """Return what the folder's own program says of an image."""
    monkeypatch.setattr(sys, "argv", ["run.py", str(image)])
    capsys.readouterr()
    runpy.run_path(str(folder / "run.py"), run_name="__main__")
    return capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("format", "precision", "options"),
    [
        ("onnx", "fp32", {}),
        ("onnx", "fp16", {"batch_size": 2}),
        ("onnx", "int8", {"dynamic_batch": True}),
        ("pt2", "fp32", {"dynamic_batch": True}),
        pytest.param("openvino", "fp32", {}),
        pytest.param("openvino", "int8", {}),
    ],
)
def test_formats(format, precision, options, trained, pictures, tmp_path, capsys, monkeypatch):
    if format == "openvino":
        pytest.importorskip("openvino")
    out = tmp_path / "out"
    text = export_model(
        str(trained), out, format=format, precision=precision, images=str(pictures), **options
    )
    proof = json.loads((out / "proof.json").read_text())
    assert proof["relative_difference"] <= ALLOWED[precision]
    assert f"{format} in {precision}" in text
    assert torch.__version__.startswith(proof["versions"]["torch"])
    stored = load_file(out / "check.safetensors")
    run = writers.FORMATS[format].load(out)
    parts = stored["pixel_values"].split(options.get("batch_size", 4 if options else 1))
    logits = torch.cat([run(part).detach() for part in parts])
    assert compare(logits, stored["logits"], precision, "it")["compared"] == 4
    if options.get("batch_size", 1) == 1 and precision != "int8":
        assert main(["classify", str(trained), str(pictures / "0.png"), "--top-k", "1"]) == 0
        label = capsys.readouterr().out.split(": ")[1].rpartition(" ")[0]
        assert named(out, pictures / "0.png", capsys, monkeypatch) == label
    for path in out.iterdir():
        assert os.fsencode(ROOT) not in unpacked(path), "names of this machine's files"
        assert os.fsencode(trained.parent) not in unpacked(path)


def test_int8_rationals_are_tables(trained, pictures, tmp_path):
    """Each rational is one look-up, exact for each of its 256 entries; none of its operations is left."""
    export_model(str(trained), tmp_path / "out", precision="int8", images=str(pictures))
    graph = onnx.load(tmp_path / "out/model.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("GatherElements") == 4
    assert not {"Abs", "Div"} & set(kinds)
    tables = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer if t.name.endswith(".table")}
    assert {table.shape for table in tables.values()} == {(256, 64), (256, 256)}
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx")
    assert session.get_inputs()[0].shape == [1, 3, 32, 32]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "tensorrt"], "format ('tensorrt') must be one of onnx, openvino, pt2, aoti"),
        (
            ["--format", "pt2", "--precision", "int8"],
            "pt2 has no precision 'int8': it has fp32, fp16; int8 is",
        ),
        (["--precision", "int4"], "onnx has no precision 'int4': it has fp32, fp16, int8"),
        (["--precision", "int8"], "int8 is calibrated on images: --images FOLDER, or digits"),
        (["--opset", "11"], "--opset 11: PyTorch exports to 18 and later"),
        (["--batch-size", "0"], "--batch-size 0 must be at least 1"),
    ],
)
def test_refusals(arguments, message, bare_folder, tmp_path, capsys):
    assert main(["export", str(bare_folder), "-o", str(tmp_path / "out"), *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_missing_runtime_names_the_extra(bare_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert main(["export", str(bare_folder), "--format", "openvino", "-o", str(tmp_path / "out")]) == 1
    assert "pip install 'flashkat_hf[openvino]'" in capsys.readouterr().err


def test_only_an_earlier_export_is_replaced(bare_folder, tmp_path, monkeypatch):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "work").touch()
    for overwrite, message in ((False, "exists; --overwrite"), (True, "is no exported model")):
        with pytest.raises(ValueError, match=message):
            export_model(str(bare_folder), precious, overwrite=overwrite)
    out = tmp_path / "out"
    export_model(str(bare_folder), out, format="pt2")
    monkeypatch.setitem(
        writers.FORMATS, "pt2", writers.FORMATS["pt2"]._replace(load=lambda _: torch.zeros_like)
    )
    with pytest.raises(ValueError, match="the exported model returns"):
        export_model(str(bare_folder), out, format="pt2", overwrite=True)
    assert json.loads((out / "proof.json").read_text())["images"] == "4 images of noise", "the old one stands"


def test_wrong_logits_are_no_proof():
    right = torch.randn(4, 10)
    with pytest.raises(ValueError, match=r"differ from it's by 0\.001 of.*more than the 0\.0001 that fp32"):
        compare(right * 1.001, right, "fp32", "it")
    with pytest.raises(ValueError, match="differ from it's by nan"):
        compare(right * float("nan"), right, "int8", "it")
