"""FlashKAT's classes in transformers' common test suite, where `transformers_common_tests.py` puts this."""

import unittest
from typing import ClassVar

import torch
from transformers.models.auto import modeling_auto

from flashkat_hf import (
    FlashKATBackbone,
    FlashKATConfig,
    FlashKATForImageClassification,
    FlashKATForMaskedImageModeling,
    FlashKATModel,
)

for table, model_class in {  # by these names the suite knows which models have a loss
    "MODEL_MAPPING_NAMES": FlashKATModel,
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": FlashKATForImageClassification,
    "MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING_NAMES": FlashKATForMaskedImageModeling,
    "MODEL_FOR_BACKBONE_MAPPING_NAMES": FlashKATBackbone,
}.items():
    getattr(modeling_auto, table)["flashkat"] = model_class.__name__

from .test_backbone_common import BackboneTesterMixin  # noqa: E402
from .test_configuration_common import ConfigTester  # noqa: E402
from .test_modeling_common import ModelTesterMixin  # noqa: E402


class FlashKATModelTester:
    """What the suite asks of a model's tester: a small config, and inputs for it."""

    batch_size = 3
    image_size = 32
    patch_size = 8
    num_hidden_layers = 2
    num_attention_heads = 4
    hidden_size = 32
    seq_length = 1 + (32 // 8) ** 2
    num_masks = 8
    mask_length = (32 // 8) ** 2
    is_training = True

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent

    def get_config(self) -> FlashKATConfig:
        """Return the config of a model that is trained in milliseconds."""
        return FlashKATConfig(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=64,
            image_size=self.image_size,
            patch_size=self.patch_size,
            num_labels=3,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[FlashKATConfig, dict[str, torch.Tensor]]:
        """Return the config and what every model takes."""
        images = torch.rand(self.batch_size, 3, self.image_size, self.image_size)
        return self.get_config(), {"pixel_values": images}


class FlashKATModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (
        FlashKATModel,
        FlashKATForImageClassification,
        FlashKATForMaskedImageModeling,
        FlashKATBackbone,
    )
    pipeline_model_mapping: ClassVar = {
        "image-feature-extraction": FlashKATModel,
        "image-classification": FlashKATForImageClassification,
    }
    test_resize_embeddings = False  # there is no vocabulary

    def setUp(self):
        self.model_tester = FlashKATModelTester(self)
        self.config_tester = ConfigTester(
            self, config_class=FlashKATConfig, has_text_modality=False, hidden_size=64
        )

    def test_config(self):
        self.config_tester.run_common_tests()

    @unittest.skip("FlashKAT has no inputs_embeds, it takes images")
    def test_inputs_embeds(self):
        pass

    def test_model_get_set_embeddings(self):  # as ViT's: the suite's own asks for an nn.Embedding of words
        config = self.model_tester.get_config()
        for model_class in self.all_model_classes:
            model = model_class(config)
            assert isinstance(model.get_input_embeddings(), torch.nn.Conv2d)
            assert model.get_output_embeddings() is None


class FlashKATBackboneTest(BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (FlashKATBackbone,)
    config_class = FlashKATConfig

    def setUp(self):
        self.model_tester = FlashKATModelTester(self)
