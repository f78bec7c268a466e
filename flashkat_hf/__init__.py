"""FlashKAT: the Kolmogorov-Arnold Transformer with fast group-rational kernels, as Hugging Face models.

The public names are imported when they are first used, so that `flashkat --help` needs no PyTorch.
"""

from typing import TYPE_CHECKING

from . import registration
from ._version import __version__
from .lazy import imported_at_first_use

if TYPE_CHECKING:
    from .checkpoints.image_processor import make_image_processor
    from .conversion.calibration import calibrate
    from .conversion.conversion import convert
    from .foreign.activations import replace_activations
    from .graphs import graphed_forward, graphed_step
    from .model.backbone_flashkat import FlashKATBackbone
    from .model.coefficients import START_TABLES
    from .model.configuration_flashkat import FlashKATConfig
    from .model.layers import GRKANMlp, GroupRational, SimplifiedActivation
    from .model.masked_image_flashkat import FlashKATForMaskedImageModeling
    from .model.modeling_flashkat import (
        FlashKATForImageClassification,
        FlashKATModel,
        FlashKATPreTrainedModel,
    )
    from .model.op_rational import rational
    from .training.graphed_trainer import GraphedTrainer

__all__ = [
    "START_TABLES",
    "FlashKATBackbone",
    "FlashKATConfig",
    "FlashKATForImageClassification",
    "FlashKATForMaskedImageModeling",
    "FlashKATModel",
    "FlashKATPreTrainedModel",
    "GRKANMlp",
    "GraphedTrainer",
    "GroupRational",
    "SimplifiedActivation",
    "__version__",
    "calibrate",
    "convert",
    "graphed_forward",
    "graphed_step",
    "make_image_processor",
    "rational",
    "replace_activations",
]
__getattr__ = imported_at_first_use(
    __name__,
    {
        "make_image_processor": ".checkpoints.image_processor",
        "calibrate": ".conversion.calibration",
        "convert": ".conversion.conversion",
        "graphed_forward": ".graphs",
        "graphed_step": ".graphs",
        "FlashKATBackbone": ".model.backbone_flashkat",
        "replace_activations": ".foreign.activations",
        "START_TABLES": ".model.coefficients",
        "FlashKATConfig": ".model.configuration_flashkat",
        "GRKANMlp": ".model.layers",
        "GroupRational": ".model.layers",
        "SimplifiedActivation": ".model.layers",
        "FlashKATForMaskedImageModeling": ".model.masked_image_flashkat",
        "FlashKATForImageClassification": ".model.modeling_flashkat",
        "FlashKATModel": ".model.modeling_flashkat",
        "FlashKATPreTrainedModel": ".model.modeling_flashkat",
        "rational": ".model.op_rational",
        "GraphedTrainer": ".training.graphed_trainer",
    },
)

registration.watch()


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
