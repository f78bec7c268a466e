"""The table of the published KAT checkpoints: names, files, checksums and accuracies."""

from dataclasses import dataclass

RELEASE_REPOSITORY = "adamdad/kat_pretained"  # spelled so


@dataclass(frozen=True)
class Published:
    """A published checkpoint: one row of the table."""

    name: str  # what the command takes as source
    repository: str  # the Hub repository of the timm model
    file: str  # in `RELEASE_REPOSITORY`; the tail of its name is its SHA-256
    top1: float  # on ImageNet-1k in percent, as published


PUBLISHED = {
    row.name: row
    for row in (
        Published(
            "kat-tiny",
            "adamdad/kat_tiny_patch16_224",
            "kat_tiny_patch16_224_1f3ad3b2e69821f3d412f2924cf159a0e266f142d739cb68f68f796f5a0fe289.pth",
            74.6,
        ),
        Published(
            "kat-tiny-vitft",
            "adamdad/kat_tiny_patch16_224.vitft",
            "kat_tiny_patch16_224-finetune_64f124d003803e4a7e1aba1ba23500ace359b544e8a5f0110993f25052e402fb.pth",
            75.7,
        ),
        Published(
            "kat-small",
            "adamdad/kat_small_patch16_224",
            "kat_small_patch16_224_32487885cf13d2c14e461c9016fac8ad43f7c769171f132530941e930aeb5fe2.pth",
            81.2,
        ),
        Published(
            "kat-small-vitft",
            "adamdad/kat_small_patch16_224.vitft",
            "kat_small_patch_224-finetune_3ae087a4c28e2993468eb377d5151350c52c80b2a70cc48ceec63d1328ba58e0.pth",
            82.0,
        ),
        Published(
            "kat-base",
            "adamdad/kat_base_patch16_224",
            "kat_base_patch16_224_abff874d925d756d15cde97303f772a3460ddbd44b9c53fb9ce5cf15be230fb6.pth",
            82.3,
        ),
        Published(
            "kat-base-vitft",
            "adamdad/kat_base_patch16_224.vitft",
            "kat_base_patch16_224-finetune_440bf1ead9dd8ecab642078cfb60ae542f1fa33ca65517260501e02c011e38f2.pth",
            82.8,
        ),
    )
}
# FlashKAT's paper, trained anew; no weights published
FLASHKAT_TOP1 = {"tiny": 74.6, "small": 81.4, "base": 82.2}
