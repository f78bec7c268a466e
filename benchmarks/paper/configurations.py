"""Tables 6 and 7: sizes of the models and settings of the recipes, from the package."""

import torch
import yaml

from flashkat_hf import FlashKATConfig, FlashKATForImageClassification
from flashkat_hf.training.recipe import RECIPES

from .published import HYPERPARAMETERS, IMAGE_SIZE, MODELS, PATCH_SIZE


def model(size: str) -> dict:
    """Return what table 6 says of a model, from our config."""
    config = FlashKATConfig.from_size(size, num_labels=1000)
    with torch.device("meta"):
        parameters = sum(each.numel() for each in FlashKATForImageClassification(config).parameters())
    return {
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "mlp": config.intermediate_size,
        "heads": config.num_attention_heads,
        "parameters": parameters,
        "patch_size": config.patch_size,
        "image_size": config.image_size,
    }


def recipe(size: str) -> dict:
    """Return the settings of our recipe for a size."""
    return yaml.safe_load((RECIPES / f"pretrain-{size}.yaml").read_text())


def measure() -> list[dict]:
    """Return two results for each size: our config, and the settings of our recipe that the paper names."""
    results = []
    for size, published in MODELS.items():
        config, settings = model(size), recipe(size)
        names = ["drop_path", *(name for _, ours in HYPERPARAMETERS.values() for name in ours)]
        results.append({"what": "model", "size": size, **config, "published": published})
        results.append({"what": "recipe", "size": size, **{name: settings[name] for name in names}})
    assert all(result.get("patch_size", PATCH_SIZE) == PATCH_SIZE for result in results)
    assert all(result.get("image_size", IMAGE_SIZE) == IMAGE_SIZE for result in results)
    return results
