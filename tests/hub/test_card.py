"""Model cards: what they say and leave out, that their examples run, and what the check finds."""

import hashlib
import importlib.util
import json
import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT, micro_config
from huggingface_hub import ModelCard
from PIL import Image

from flashkat_hf import FlashKATConfig, FlashKATForImageClassification, make_image_processor
from flashkat_hf.checkpoints.published import FLASHKAT_TOP1, PUBLISHED, RELEASE_REPOSITORY
from flashkat_hf.checkpoints.weights import fingerprint
from flashkat_hf.hub.card import (
    CARDS,
    check_card,
    published_facts,
    render_card,
    states_others_figures,
    training_facts,
    write_card,
)
from flashkat_hf.hub.staging import stage

LABELS = {i: f"digit {i}" for i in range(10)}
SUMMARY = {
    "data": "/data/me/photos",
    "num_train_images": 1437,
    "num_test_images": 360,
    "num_labels": 10,
    "image_size": 32,
    "epochs": 50,
    "steps": 1150,
    "batch_size": 64,
    "top1": 0.98611,
    "top5": 1.0,
    "top1_raw": 0.98,
    "top1_ema": 0.98611,
    "best_epoch": 44,
    "epoch_chosen": "on held-out training images",
    "images_per_second": 812.3,
    "peak_memory_gib": 3.25,
    "device": "NVIDIA H100 80GB HBM3",
    "num_processes": 2,
    "precision": "bf16",
    "compiled": True,
    "started_from": "runs/kat-tiny",
    "seed": 42,
    "seconds": 91.2,
    "versions": {"torch": "2.14.1", "triton": None},
    "commit": "0123456789abcdef",
}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "mine"
    config = micro_config(id2label=LABELS, label2id={name: i for i, name in LABELS.items()})
    FlashKATForImageClassification(config).save_pretrained(folder)
    make_image_processor(image_size=32).save_pretrained(folder)
    return folder


def card_of(folder: Path, summary: dict | None = None, **arguments) -> tuple[str, ModelCard]:
    if summary is not None:
        of_weights = {"weights_sha256": fingerprint(folder)}
        (folder / "summary.json").write_text(json.dumps(summary | of_weights))
    write_card(folder, **arguments)
    text = (folder / "README.md").read_text()
    assert check_card(text) == []
    return text, ModelCard(text)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_cards(name):
    """A card has each published figure with its source, and no other figure."""
    row, size = PUBLISHED[name], name.split("-")[1]
    with torch.device("meta"):
        model = FlashKATForImageClassification(FlashKATConfig.from_size(size, num_labels=1000))
    text = render_card(published_facts(name, model.config.to_dict()), model, f"org/{name}", picture=True)
    assert check_card(text) == []
    data = ModelCard(text).data
    assert data.base_model == row.repository
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "mit",
        "transformers",
        "image-classification",
    )
    assert data.datasets == ["ILSVRC/imagenet-1k"]
    top1, *further = data.eval_results
    assert round(top1.metric_value, 1) == row.top1
    assert [result.metric_value for result in further] == ([92.39] if name == "kat-tiny" else [])
    assert all(result.source_url == "https://github.com/Adamdad/kat" for result in data.eval_results)
    assert f"| {top1.metric_value}% | [KAT, " in text
    assert RELEASE_REPOSITORY in text
    assert f"| {model.num_parameters():,}, float32 |" in text
    assert "| training step, 224 pixels | compiled |" in text
    assert ("ImageNet-21k" in text) == name.endswith("vitft")
    assert (f"FlashKAT's paper reports {FLASHKAT_TOP1[size]}%" in text) == (not name.endswith("vitft"))
    for author in ("Yang, Xingyi", "Raffel, Matthew"):
        assert author in text


def test_speed_is_what_was_measured():
    """`benchmarks/render.py` keeps the cards' lines; a card shows its size's alone."""
    paths = [ROOT / f"benchmarks/results/{name}.jsonl" for name in ("model", "inference")]
    results = [json.loads(line) for path in paths if path.exists() for line in path.read_text().splitlines()]
    ours = [result for result in results if result["provider"] == "flashkat_hf"]
    assert ours == [json.loads(line) for line in (CARDS / "speed.jsonl").read_text().splitlines()]
    speed = published_facts("kat-small", FlashKATConfig.from_size("small").to_dict())["speed"]
    assert speed == [result for result in ours if result["size"] == "small"]
    assert all(line["machine"] and line["task"] and line["torch"] and line["commit"] for line in speed)


def test_card_of_a_fine_tuned_model(folder):
    text, card = card_of(folder, SUMMARY, repo_id="someone/mine")
    assert (card.data.license, card.data.base_model, card.data.datasets) == ("unknown", None, None)
    top1, top5 = card.data.eval_results
    assert (top1.metric_value, top5.metric_value, top1.dataset_name) == (98.611, 100.0, "photos")
    source = "measured at the end of training, commit 0123456"
    for row in (
        f"| photos, 360 test images | top-1 accuracy | 98.61% | {source} |",
        "| data | photos, 1,437 training images |",
        "| started from | kat-tiny |",
        "| length | 50 epochs, 1,150 updates, batches of 64 |",
        "| best epoch | 44, chosen: on held-out training images |",
        "| top-1 of the weights | 98.00% |",
        "| device | 2 x NVIDIA H100 80GB HBM3 |",
        "| precision | bf16, compiled |",
        "| throughput | 812 images/s |",
        "| peak memory | 3.2 GiB |",
        "| versions | torch 2.14.1 |",
        "| labels | digit 0, digit 1, digit 2, digit 3, digit 4, ... (10) |",
    ):
        assert f"{row}\n" in text, row
    assert "/data" not in text
    assert "runs/" not in text
    assert "## Speed" not in text
    with Image.open(folder / "functions.png") as picture:
        assert picture.size[0] > 500
    assert "](functions.png)" in text


def test_a_card_says_which_images_its_figures_are_of(folder):
    """A model that is pushed while its run goes on has not seen the test images."""
    text, _ = card_of(folder, SUMMARY | {"evaluated_on": "held-out training images"}, repo_id="someone/mine")
    assert "| photos, 360 held-out training images | top-1 accuracy | 98.61% |" in text


def test_what_is_not_known_is_left_out(folder):
    text, card = card_of(
        folder, dict.fromkeys(SUMMARY) | {"versions": None, "steps": 7}, license="apache-2.0"
    )
    assert card.data.license == "apache-2.0"
    assert card.data.eval_results is None
    assert "## Evaluation" not in text
    assert re.findall(r"^\| (.*) \| (.*) \|$", text.split("## Training")[1].split("##")[0], re.MULTILINE) == [
        ("length", "7 updates")
    ]
    (folder / "summary.json").unlink()
    text, _ = card_of(folder)
    assert "Nothing is recorded." in text


def test_figures_of_other_weights_are_not_stated(folder):
    """Nor by a card that was written for the earlier weights, in what is pushed."""
    text, card = card_of(folder, SUMMARY, repo_id="someone/mine")
    assert [result.metric_value for result in card.data.eval_results] == [98.611, 100.0]
    assert not states_others_figures(folder)
    with torch.no_grad():
        model = FlashKATForImageClassification.from_pretrained(folder)
        model.classifier.weight.add_(1)
    model.save_pretrained(folder)
    (folder.parent / "staged").mkdir()
    with pytest.raises(ValueError, match=r"README.md has figures of other weights; correct it, or move it"):
        stage(folder, folder.parent / "staged")
    (folder / "README.md").unlink()
    (folder.parent / "again").mkdir()
    staged = stage(folder, folder.parent / "again", repo_id="someone/mine")
    assert "summary.json is not of these weights, so README.md has none of its figures" in staged.notes
    text = (staged.folder / "README.md").read_text()
    assert ModelCard(text).data.eval_results is None
    assert not re.search(r"98\.|100\.0|0\.986", text)
    assert "Nothing is recorded." in text


@pytest.mark.parametrize(
    ("value", "shown", "is_id"),
    [
        ("someone/flowers", "someone/flowers", True),
        ("digits", "scikit-learn's digits", False),
        ("photos/flowers", "flowers", False),  # there is such a folder
        ("runs/flowers", "flowers", False),
        ("../flowers", "flowers", False),
        ("~/flowers", "flowers", False),
        ("/data/me/flowers/", "flowers", False),
        ("C:\\me\\flowers", "flowers", False),
        ("a/b/shard-{000..100}.tar", "shard-{000..100}.tar", False),
    ],
)
def test_paths_are_named_by_their_last_part(value, shown, is_id, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/model.safetensors").write_bytes(b"weights")
    values = {"data": value, "started_from": value, "top1": 0.5}
    values["weights_sha256"] = hashlib.sha256(b"weights").hexdigest()
    (tmp_path / "mine/summary.json").write_text(json.dumps(values))
    facts = training_facts(tmp_path / "mine")
    assert dict(facts["training"]) == {
        "data": shown,
        "started from": "digits" if value == "digits" else shown,
    }
    assert [result["data"] for result in facts["results"]] == [shown]
    assert facts["datasets"] == ([value] if is_id else None)
    assert facts["base_model"] == (value if is_id else None)


def test_examples_run(folder, monkeypatch, capsys):
    text, _ = card_of(folder)
    monkeypatch.chdir(folder.parent)
    Image.linear_gradient("L").save("picture.png")
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 3
    for example in examples:
        exec(example, {})
    assert capsys.readouterr().out.count("digit ") == 1 + 1 + 3


def test_without_matplotlib(folder, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find_spec(name)
    )
    text, _ = card_of(folder)
    assert "functions.png" not in text
    assert not (folder / "functions.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"published": "kat-huge"}, "'kat-huge' is not one of the published checkpoints: kat-tiny, "),
        ({"published": "kat-base"}, "kat-base has hidden_size=768, .* but the model has hidden_size=64"),
        ({"repo_id": "a/b/c"}, "not a name that the Hub takes"),
        ({"repo_id": "someone/bad--name"}, "not a name that the Hub takes"),
        ({"license": "mine"}, "license 'mine' is not one of the Hub's"),
        ({"summary": "{"}, "cannot read .*summary.json"),
        ({"summary": "[]"}, "summary.json is not a JSON object"),
        (
            {"summary": '{"top1": 1.5, "weights_sha256": "OURS"}'},
            "top-1 accuracy in % is 150.0, not between 0 and 100",
        ),
        ({"remove": "model.safetensors"}, "cannot load"),
        ({"remove": "preprocessor_config.json"}, "cannot load"),
        ({"remove": "config.json"}, "cannot read .*config.json"),
    ],
)
def test_bad_input_leaves_the_card_alone(arguments, message, folder):
    (folder / "README.md").write_text("as it was")
    if "summary" in arguments:
        (folder / "summary.json").write_text(arguments["summary"].replace("OURS", fingerprint(folder)))
    if "remove" in arguments:
        (folder / arguments["remove"]).unlink()
    options = {name: value for name, value in arguments.items() if name not in ("summary", "remove")}
    with pytest.raises(ValueError, match=message) as caught:
        write_card(folder, **options)
    assert "\n" not in str(caught.value)
    assert (folder / "README.md").read_text() == "as it was"


GOOD = """---
license: mit
library_name: transformers
pipeline_tag: image-classification
tags: [flashkat]
base_model: adamdad/kat_tiny_patch16_224
model-index:
- name: mine
  results:
  - task: {type: image-classification}
    dataset: {name: photos, type: imagefolder}
    metrics: [{type: accuracy, value: 98.6}]
    source: {name: KAT, url: https://github.com/Adamdad/kat}
---
# A card

title = {{KAT}}, see https://example.org/data/me and `model.from_pretrained("someone/kat")`
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("---\nlicense", "license", "does not start with front matter"),
        ("license: mit", "license: [mit", "front matter is not YAML"),
        ("license: mit\n", "", "license is missing"),
        ("license: mit", "license: my own", "license 'my own' is not one of the Hub's"),
        ("transformers", "timm", "library_name is 'timm', not 'transformers'"),
        ("pipeline_tag: image-classification\n", "", "pipeline_tag is None"),
        ("[flashkat]", "flashkat", "tags must be a list of strings"),
        ("[flashkat]", "[kat]", "tags lack 'flashkat'"),
        ("adamdad/kat", "adamdad/kat/x", "base_model: not a name that the Hub takes"),
        ("name: photos, type: imagefolder", "name: photos", "model-index is not valid"),
        ("value: 98.6", "value: 198.6", "accuracy is 198.6, not between 0 and 100"),
        ("value: 98.6", "value: high", "accuracy is 'high', not a number"),
        ("value: 98.6", "value: .nan", "accuracy is nan, not a number"),
        ("url: https", "url: ftp", "is not a source's address"),
        ("url: https://github.com/Adamdad/kat", "x: y", "model-index is not valid"),
        ("# A card", "See /data/me/model", "it names a path of one machine, /data/me/model"),
        ("# A card", "See " + "/home" + "/me/model", "it names a path of one machine"),
        ("# A card", "in `~/models`", "it names a path of one machine"),
        ("# A card", r"in C:\models", "it names a path of one machine"),
        ("# A card", "{{ model_summary }}", "is left of a template"),
        ("# A card", "[More Information Needed]", "is left of a template"),
        ("# A card", "| top-1 | None |", "is left of a template"),
        ("someone/kat", "some one/kat", "not a name that the Hub takes"),
        (GOOD.partition("# A card")[1] + GOOD.partition("# A card")[2], "", "says nothing below"),
    ],
)
def test_check_names_the_problem(old, new, message):
    assert check_card(GOOD) == []
    assert old in GOOD
    problems = check_card(GOOD.replace(old, new))
    assert len(problems) == 1
    assert re.search(message, problems[0]), problems


def test_every_data_file_is_installed():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "flashkat_hf.hub.model_cards" in setup["packages"]
    assert setup["package-dir"]["flashkat_hf.hub.model_cards"] == CARDS.name
    patterns = [*setup["package-data"]["flashkat_hf.hub.model_cards"], "*.py"]
    for path in CARDS.iterdir():
        assert path.name == "__pycache__" or any(fnmatch(path.name, pattern) for pattern in patterns), path
    assert {path.stem for path in CARDS.glob("*.yaml")} == PUBLISHED.keys()
    for path in CARDS.glob("*.yaml"):
        assert all(
            result["url"] and result["source"] for result in yaml.safe_load(path.read_text())["results"]
        )
