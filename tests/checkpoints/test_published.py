"""The table of published checkpoints."""

import re

from flashkat_hf.checkpoints.published import PUBLISHED


def test_table():
    """The checksums are told apart by their first digits; order and accuracies are the paper's."""
    rows = [
        (row.name, re.fullmatch(r"kat_.*_([0-9a-f]{64})\.pth", row.file)[1][:4], row.top1)
        for row in PUBLISHED.values()
    ]
    assert rows == [
        ("kat-tiny", "1f3a", 74.6),
        ("kat-tiny-vitft", "64f1", 75.7),
        ("kat-small", "3248", 81.2),
        ("kat-small-vitft", "3ae0", 82.0),
        ("kat-base", "abff", 82.3),
        ("kat-base-vitft", "440b", 82.8),
    ]
    for name, row in PUBLISHED.items():
        size, vitft = name.split("-")[1], ".vitft" * name.endswith("-vitft")
        assert row.name == name
        assert row.file.startswith(f"kat_{size}_")
        assert row.repository == f"adamdad/kat_{size}_patch16_224{vitft}"
