"""Exported folders: proved when they are written, run by their own program, refused in one line."""

import json
import os
import runpy
import shutil
import subprocess
import sys
import zipfile

import numpy
import onnx
import onnxruntime
import pytest
import torch
from helpers import ROOT, assert_no_worse
from PIL import Image
from safetensors.torch import load_file, save_file

from flashkat_hf import GroupRational
from flashkat_hf.cli import main
from flashkat_hf.deployment import custom_operators, export_model, writers
from flashkat_hf.deployment.export import compare
from flashkat_hf.deployment.folding import FoldedRational

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
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
        ("executorch", "fp32", {}),
        ("onnx", "fp32", {"custom_op": True}),
        ("onnx", "int8", {"custom_op": True, "dynamic_batch": True}),
    ],
)
def test_formats(format, precision, options, trained, pictures, tmp_path, capsys, monkeypatch):
    if format in ("openvino", "executorch"):
        pytest.importorskip(format)
    if "custom_op" in options and not COMPILER:
        pytest.skip("needs a C compiler")
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
    parts = stored["pixel_values"].split(options.get("batch_size", 4 if "dynamic_batch" in options else 1))
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
    assert {table.shape for table in tables.values()} == {(8, 256)}
    assert {"Gemm", "Conv"} <= set(kinds)
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx")
    assert session.get_inputs()[0].shape == [1, 3, 32, 32]


@pytest.mark.skipif(not COMPILER, reason="needs a C compiler")
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_custom_operators(precision, trained, pictures, tmp_path):
    """A rational is one node, which the library computes, and the file alone likewise."""
    out = tmp_path / "out"
    export_model(str(trained), out, precision=precision, images=str(pictures), custom_op=True)
    model = onnx.load(out / "model.onnx")
    kinds = [node.op_type for node in model.graph.node]
    name = {"fp32": "GroupRational", "int8": "GroupLookup"}[precision]
    assert kinds.count(name) == 4
    assert not {"Abs", "GatherElements"} & set(kinds)
    assert [function.name for function in model.functions] == [name]
    proof = json.loads((out / "proof.json").read_text())
    stored = load_file(out / "check.safetensors")
    image = stored["pixel_values"][:1]
    by_library, alone = (writers.load_onnx(out, custom)(image) for custom in (True, False))
    assert torch.allclose(by_library, alone, rtol=1e-3, atol=1e-4 if precision == "fp32" else 0.05)
    del model.functions[:]  # nothing but the library knows the operator now
    onnx.save(model, out / "model.onnx")
    assert torch.equal(writers.load_onnx(out)(image), by_library)
    with pytest.raises(Exception, match=name):
        writers.load_onnx(out, custom=False)
    assert proof["without_library"]["relative_difference"] <= ALLOWED[precision]
    assert (out / "operators.c").read_bytes() == custom_operators.SOURCE.read_bytes()


@pytest.mark.skipif(not COMPILER, reason="needs a C compiler")
@pytest.mark.parametrize("width", [1, 3, 8, 24, 100])
@pytest.mark.parametrize("rows", [1, 300])
def test_library_and_function_agree(width, rows, tmp_path):
    """Groups of any width, more rows than a chunk, coefficients for all groups and for each."""
    custom_operators.build(tmp_path)
    act = GroupRational(4 * width, 4, num_numerator_groups=1, init="gelu")
    with torch.no_grad():
        act.denominator.add_(torch.rand_like(act.denominator))
    rational = FoldedRational(act)
    names = custom_operators.RATIONAL.inputs
    helper, number = onnx.helper, onnx.TensorProto.FLOAT
    tensors = dict(zip(names[1:], rational.columns(), strict=True))
    constants = [onnx.numpy_helper.from_array(tensor.numpy(), name) for name, tensor in tensors.items()]
    node = custom_operators.operator_node(custom_operators.RATIONAL, names, "logits", 4)
    shape = [rows, 4 * width]
    ends = [helper.make_tensor_value_info(name, number, shape) for name in ("x", "logits")]
    graph = helper.make_graph([node], "one", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    custom_operators.add_function(model, custom_operators.RATIONAL)
    x = 3 * torch.randn(shape)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(tmp_path / custom_operators.LIBRARY))
    values = []
    for each in (options, None):
        session = onnxruntime.InferenceSession(model.SerializeToString(), each)
        values.append(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]))
    exact = act.double()(x.double())
    for value in values:
        assert_no_worse(value, rational(x), exact)


def test_without_a_compiler(bare_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(custom_operators.shutil, "which", lambda name: None)
    assert main(["export", str(bare_folder), "--custom-op", "-o", str(tmp_path / "out")]) == 1
    assert "--custom-op needs a C compiler (cc, gcc or clang)" in capsys.readouterr().err


def test_a_compiler_that_fails(bare_folder, tmp_path, capsys, monkeypatch):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho no space left >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(custom_operators.shutil, "which", lambda name: str(compiler))
    assert main(["export", str(bare_folder), "--custom-op", "-o", str(tmp_path / "out")]) == 1
    assert "--custom-op: " in (error := capsys.readouterr().err)
    assert "fails: no space left" in error
    assert not (tmp_path / "out").exists()


def node_has(*packages: str) -> bool:
    program = "".join(f"require({name!r});" for name in packages)
    return shutil.which("node") is not None and not subprocess.run(["node", "-e", program]).returncode


def test_javascript(trained, pictures, tmp_path, capsys, monkeypatch):
    """Node names images as Python does; NODE_PATH says where its packages are.

    The images have the model's size: resized ones differ by a level in some pixels.
    """
    if not node_has("onnxruntime-node", "sharp"):
        pytest.skip("needs node, and onnxruntime-node and sharp from npm")
    out = tmp_path / "out"
    export_model(str(trained), out, images=str(pictures))
    for picture in sorted(pictures.iterdir()):
        Image.open(picture).resize((32, 32)).save(picture)
        done = subprocess.run(["node", out / "run.cjs", picture], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == named(out, picture, capsys, monkeypatch)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "gguf"], "format ('gguf') must be one of onnx, openvino, pt2, aoti, executorch"),
        (["--format", "tensorrt"], "format 'tensorrt' is not written, since it could not be run"),
        (["--format", "coreml"], "coremltools.convert takes what --format pt2 writes"),
        (["--format", "executorch", "--dynamic-batch"], "executorch has a fixed number of images in a call"),
        (
            ["--format", "pt2", "--precision", "int8"],
            "pt2 has no precision 'int8': it has fp32, fp16; int8 is",
        ),
        (["--precision", "int4"], "onnx has no precision 'int4': it has fp32, fp16, int8"),
        (["--precision", "int8"], "int8 is calibrated on images: --images FOLDER, or digits"),
        (
            ["--format", "pt2", "--custom-op"],
            "--custom-op is for onnx in fp32 and int8, not pt2 in fp32",
        ),
        (["--precision", "fp16", "--custom-op"], "fp32 and int8, not onnx in fp16"),
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
