"""What docs/deployment.md says of peft and accelerate."""

import warnings

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import AutoPeftModel, LoraConfig, get_peft_model
from peft.peft_model import PeftModel

from flashkat_hf import FlashKATForImageClassification


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
