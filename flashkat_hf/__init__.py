"""FlashKAT: the Kolmogorov-Arnold Transformer with fast group-rational kernels, as Hugging Face models."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import (
    AutoImageProcessor,
)  # 5.17 hides it without torchvision

from ._version import __version__
from .checkpoints.image_processor import IMAGE_PROCESSOR_CLASSES, make_image_processor
from .conversion.calibration import calibrate
from .conversion.conversion import convert
from .model.coefficients import START_TABLES
from .model.configuration_flashkat import FlashKATConfig
from .model.layers import GRKANMlp, GroupRational
from .model.modeling_flashkat import FlashKATForImageClassification, FlashKATModel, FlashKATPreTrainedModel
from .model.op_rational import rational

__all__ = [
    "START_TABLES",
    "FlashKATConfig",
    "FlashKATForImageClassification",
    "FlashKATModel",
    "FlashKATPreTrainedModel",
    "GRKANMlp",
    "GroupRational",
    "__version__",
    "calibrate",
    "convert",
    "make_image_processor",
    "rational",
]

AutoConfig.register("flashkat", FlashKATConfig, exist_ok=True)
AutoModel.register(FlashKATConfig, FlashKATModel, exist_ok=True)
AutoModelForImageClassification.register(FlashKATConfig, FlashKATForImageClassification, exist_ok=True)
AutoImageProcessor.register(FlashKATConfig, image_processor_classes=IMAGE_PROCESSOR_CLASSES, exist_ok=True)
