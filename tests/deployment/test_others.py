"""What docs/deployment.md says of peft, accelerate and coremltools."""

import warnings

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from helpers import micro_config
from peft import AutoPeftModel, LoraConfig, get_peft_model
from peft.peft_model import PeftModel

from flashkat_hf import FlashKATForImageClassification
from flashkat_hf.deployment import export_model


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers
def test_an_adapter_finds_its_model(bare_folder, tmp_path):
    model = FlashKATForImageClassification.from_pretrained(bare_folder)
    adapted = get_peft_model(model, LoraConfig(target_modules=["fc1"], init_lora_weights=False))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = adapted.eval()(images).logits
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft asks the Hub about the folder
            adapted.save_pretrained(tmp_path / "adapter")
            loaded = AutoPeftModel.from_pretrained(
                tmp_path / "adapter", import_allowlist=["flashkat_hf.model.modeling_flashkat"]
            )
        assert isinstance(loaded, PeftModel)
        assert torch.equal(loaded.eval()(images).logits, expected)


def test_offloaded_weights(bare_folder, tmp_path):
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = FlashKATForImageClassification.from_pretrained(bare_folder).eval()(images).logits
        for offload in (cpu_offload, lambda model, device: disk_offload(model, tmp_path / "weights", device)):
            model = FlashKATForImageClassification.from_pretrained(bare_folder).eval()
            offload(model, torch.device("cpu"))
            assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
            assert torch.equal(model(images).logits, expected)


@pytest.mark.filterwarnings("ignore")  # coremltools says that it does not know this PyTorch
def test_coreml_converts_what_pt2_has(bare_folder, tmp_path):
    """The conversion alone: nothing but macOS runs the result."""
    coremltools = pytest.importorskip("coremltools")
    export_model(str(bare_folder), tmp_path / "out", format="pt2")
    program = torch.export.load(tmp_path / "out/model.pt2").run_decompositions({})
    model = coremltools.convert(program, compute_precision=coremltools.precision.FLOAT32)
    model.save(str(tmp_path / "model.mlpackage"))
    assert [output.name for output in model.get_spec().description.output]
    assert (tmp_path / "model.mlpackage/Manifest.json").is_file()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_layers_on_two_gpus(tmp_path):
    """`device_map="auto"`, with room on the first GPU for the embeddings and one of four layers."""
    model = FlashKATForImageClassification(micro_config(num_hidden_layers=4)).eval()
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    size = sum(tensor.nbytes for tensor in model.flashkat.layers[0].parameters())
    rest = sum(tensor.nbytes for tensor in model.parameters()) - 4 * size
    room = {0: rest + 2 * size, 1: "1GiB"}  # accelerate keeps place for the largest layer
    spread = FlashKATForImageClassification.from_pretrained(tmp_path, device_map="auto", max_memory=room)
    assert [next(layer.parameters()).device.index for layer in spread.flashkat.layers] == [0, 1, 1, 1]
    with torch.no_grad():
        expected, logits = model(images).logits, spread.eval()(images.cuda()).logits
    torch.testing.assert_close(logits.cpu(), expected, rtol=1e-2, atol=1e-3)  # TF32
