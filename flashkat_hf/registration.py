"""FlashKAT's classes become known to transformers' Auto classes, as soon as both have been imported.

Importing transformers' models takes seconds, and `import flashkat_hf` does not. So a finder on
`sys.meta_path` notes when one of the modules below has been executed, and registers what is complete then.
transformers' modules pull ours in: after `import flashkat_hf`, every Auto class knows FlashKAT.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

CONFIG = "flashkat_hf.model.configuration_flashkat"
MODELS = "flashkat_hf.model.modeling_flashkat"
BACKBONE = "flashkat_hf.model.backbone_flashkat"
MASKED = "flashkat_hf.model.masked_image_flashkat"
PROCESSORS = "flashkat_hf.checkpoints.image_processor"


def _register_config() -> None:
    auto, ours = sys.modules["transformers.models.auto.configuration_auto"], sys.modules[CONFIG]
    auto.AutoConfig.register("flashkat", ours.FlashKATConfig, exist_ok=True)


def _register_models() -> None:
    auto, ours = sys.modules["transformers.models.auto.modeling_auto"], sys.modules[MODELS]
    config, classifier = ours.FlashKATConfig, ours.FlashKATForImageClassification
    auto.AutoModel.register(config, ours.FlashKATModel, exist_ok=True)
    auto.AutoModelForImageClassification.register(config, classifier, exist_ok=True)
    masked = sys.modules[MASKED].FlashKATForMaskedImageModeling
    auto.AutoModelForMaskedImageModeling.register(config, masked, exist_ok=True)
    auto.AutoBackbone.register(config, sys.modules[BACKBONE].FlashKATBackbone, exist_ok=True)


def _register_processors() -> None:
    auto, ours = sys.modules["transformers.models.auto.image_processing_auto"], sys.modules[PROCESSORS]
    config, classes = sys.modules[CONFIG].FlashKATConfig, ours.IMAGE_PROCESSOR_CLASSES
    auto.AutoImageProcessor.register(config, image_processor_classes=classes, exist_ok=True)
    grey = (
        ours.GreyViTImageProcessor
    )  # under a name of its own: transformers finds a processor's class by that
    auto.AutoImageProcessor.register(grey, image_processor_classes={"pil": grey}, exist_ok=True)


REGISTRATIONS: dict[
    str, tuple[tuple[str, ...], Callable[[], None]]
] = {  # transformers' module, ours, what is done
    "transformers.models.auto.configuration_auto": ((CONFIG,), _register_config),
    "transformers.models.auto.modeling_auto": ((MODELS, BACKBONE, MASKED), _register_models),
    "transformers.models.auto.image_processing_auto": ((CONFIG, PROCESSORS), _register_processors),
}
WATCHED = {*REGISTRATIONS, CONFIG, MODELS, BACKBONE, MASKED, PROCESSORS}
_executed: set[str] = set()


def watch() -> None:
    """Register what transformers has loaded by now, and from now on what it loads."""
    sys.meta_path.insert(0, _Watcher())
    for name in REGISTRATIONS:
        if name in sys.modules:
            _after(name)


def _after(name: str) -> None:
    """Take notice that a watched module has been executed, and register what it completes.

    A module of ours that is being imported at this moment, perhaps because it made transformers import
    `name`, comes here itself when it has been executed.
    """
    _executed.add(name)
    for theirs, (ours, register) in REGISTRATIONS.items():
        if name in (theirs, *ours) and theirs in _executed:
            if any(module in sys.modules and module not in _executed for module in ours):
                continue
            for module in ours:
                import_module(module)
            register()


class _Watcher(MetaPathFinder):
    """Finds the watched modules as other finders do, and has `_after` called when they were executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in WATCHED:
            return None
        finders = (finder for finder in sys.meta_path if finder is not self)
        spec = next((spec for one in finders if (spec := one.find_spec(fullname, path, target))), None)
        loader: Any = spec and spec.loader
        if loader:
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _after(fullname)

            loader.exec_module = exec_module
        return spec
