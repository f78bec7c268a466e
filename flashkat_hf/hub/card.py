"""Model cards: written from `model_cards/` or from a training run's summary, and checked without the Hub."""

import importlib.util
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..checkpoints.figures import plot_functions
from ..checkpoints.loading import load_checkpoint
from ..checkpoints.published import PUBLISHED
from ..checkpoints.remote_code import read_config
from ..checkpoints.weights import fingerprint
from ..files import read_json, write_text
from ..messages import one_line
from ..model.configuration_flashkat import SIZES
from ..model.modeling_flashkat import FlashKATForImageClassification

HERE = Path(__file__).parent
# In the package where it was built, beside it in a checkout
CARDS = HERE / "model_cards" if (HERE / "model_cards").is_dir() else HERE.parents[1] / "model_cards"
IMAGENET = "ILSVRC/imagenet-1k"
TAGS = ["flashkat", "kat", "kan", "vision"]
FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?\n", re.DOTALL)
LOCAL_PATH = re.compile(
    r"(?<![\w.:/])(?:/(?:home|root|Users|mnt|media|opt|tmp|var|data|scratch|work|workspace|srv|private|Volumes)/\S+"
    r"|~/\S+|file://\S+|[A-Za-z]:\\\S+)"
)
LOCAL_FOLDERS = {"", "~", "checkpoints", "data", "datasets", "models", "output", "outputs", "runs"}
MEASURED_WITH = re.compile(r"<!-- measured with the weights of SHA-256 ([0-9a-f]{64}) -->")
LEFTOVERS = re.compile(r"\{\{ .*? \}\}|\{%.*?%\}|\[More Information Needed\]|\bTODO\b|\| *(?:None|nan) *\|$")
LOADED = re.compile(r"""(?:from_pretrained\(|model=)["']([^"']+)["']""")


def write_card(
    folder: str | Path,
    *,
    repo_id: str | None = None,
    published: str | None = None,
    license: str | None = None,
) -> None:
    """Write README.md and, where matplotlib is installed, functions.png into a model's folder.

    Args:
        folder: a saved `FlashKATForImageClassification` with its image processor.
        repo_id: the name under which the model is published; by default the examples name the folder.
        published: a name in `published.PUBLISHED`: the card tells what is published about it. Otherwise it
            tells what `summary.json`, as training writes it, and the config say.
        license: the Hub's identifier; by default the published one's, and "unknown" for other models.

    Raises:
        ValueError: no such published checkpoint, or a model of another size; the folder holds no model;
            summary.json is not JSON; `repo_id` or `license` is not one of the Hub's. README.md is as it was
            then.
    """
    folder = Path(folder)
    config = read_config(folder)
    facts = published_facts(published, config) if published else training_facts(folder)
    if license:
        if license not in _licenses():
            raise ValueError(f"license {license!r} is not one of the Hub's identifiers")
        facts |= {"license": license, "license_text": f"{license}, as its author states."}
    if repo_id is not None and (problem := _id_problem(repo_id)):
        raise ValueError(problem)
    folder_id = re.sub(r"[^\w.-]+", "-", folder.resolve().name, flags=re.ASCII).strip("-.")
    model, _ = load_checkpoint(str(folder))
    if published and model.config.num_labels != 1000:
        raise ValueError(f"{published} has 1000 labels, but the model has {model.config.num_labels}")
    picture = importlib.util.find_spec("matplotlib") is not None
    text = render_card(facts, model, repo_id or folder_id or "model", picture)
    if problems := check_card(text):
        raise ValueError(f"the card of {folder} would not be valid: {problems[0]}")
    try:
        if picture:
            plot_functions(model).savefig(folder / "functions.png", dpi=110)
        write_text(folder / "README.md", text)
    except OSError as error:
        raise ValueError(f"cannot write the card of {folder}: {one_line(error)}") from error


def render_card(
    facts: Mapping[str, Any], model: FlashKATForImageClassification, model_id: str, picture: bool
) -> str:
    """Return the card's text from `published_facts` or `training_facts` and from the model itself."""
    title = model_id.rpartition("/")[2]
    data = ModelCardData(
        license=facts["license"],
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=TAGS,
        datasets=facts["datasets"],
        metrics=["accuracy"] if facts["eval_results"] else None,
        base_model=facts["base_model"],
        model_name=title,
        eval_results=facts["eval_results"],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(CARDS / "template.md"),
        **facts,
        title=title,
        model_id=model_id,
        config=model.config,
        num_labels=model.config.num_labels,
        labels=_label_names(model.config.id2label),
        num_parameters=model.num_parameters(),
        dtype=str(model.dtype).removeprefix("torch."),
        picture=picture,
    )
    return re.sub(r"\n{3,}", "\n\n", card.content).rstrip() + "\n"


def check_card(text: str) -> list[str]:
    """Return what is wrong with a model card, in words; an empty list if nothing is.

    The Hub's rules are checked as far as they hold offline: front matter in YAML with a license, names of
    models and data sets, evaluation results. Ours are: what a FlashKAT must say, no path of a machine, no
    placeholder of a template.
    """
    match = FRONT_MATTER.match(text)
    if not match:
        return ["it does not start with front matter between two lines of ---"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"its front matter is not YAML: {one_line(error)}"]
    if not isinstance(data, dict):
        return ["its front matter is not a mapping"]
    return [*_check_data(data), *_check_text(text, text[match.end() :])]


def _check_data(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the front matter."""
    if (license := data.get("license")) is None:
        yield "license is missing"
    elif license not in _licenses():
        yield f"license {license!r} is not one of the Hub's identifiers; `other` with license_name takes any"
    for name, value in (("library_name", "transformers"), ("pipeline_tag", "image-classification")):
        if data.get(name) != value:
            yield f"{name} is {data.get(name)!r}, not {value!r}"
    tags = data.get("tags")
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        yield f"tags must be a list of strings, not {tags!r}"
    elif "flashkat" not in tags:
        yield "tags lack 'flashkat'"
    for name in ("base_model", "datasets"):
        values = data.get(name) or []
        for value in values if isinstance(values, list) else [values]:
            if problem := _id_problem(value):
                yield f"{name}: {problem}"
    if "model-index" in data:
        yield from _check_results(data)


def _check_results(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the evaluation results in the front matter."""
    try:
        card = ModelCardData(**{"model-index": data["model-index"]})
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        yield f"model-index is not valid: {one_line(error)}"
        return
    if not card.model_name or not card.eval_results:
        yield "model-index has no name or no results"
    for result in card.eval_results or []:
        value = result.metric_value
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            yield f"model-index: {result.metric_name or result.metric_type} is {value!r}, not a number"
        elif result.metric_type == "accuracy" and not 0 <= value <= 100:
            yield f"model-index: {result.metric_name or 'accuracy'} is {value}, not between 0 and 100"
        if result.source_url and not result.source_url.startswith("https://"):
            yield f"model-index: {result.source_url!r} is not a source's address"


def _check_text(text: str, body: str) -> Iterator[str]:
    """Yield what is wrong with the whole text, and with its body below the front matter."""
    if not body.strip():
        yield "it says nothing below the front matter"
    for path in LOCAL_PATH.findall(text):
        yield f"it names a path of one machine, {path}"
    for line in body.splitlines():
        if leftover := LEFTOVERS.search(line):
            yield f"{leftover[0]!r} is left of a template: {line.strip()[:80]}"
    yield from filter(None, map(_id_problem, LOADED.findall(body)))


def published_facts(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the template says about a published checkpoint.

    Raises:
        ValueError: there is none of this name, or the config is another's.
    """
    if name not in PUBLISHED:
        raise ValueError(f"{name!r} is not one of the published checkpoints: {', '.join(PUBLISHED)}")
    data = yaml.safe_load((CARDS / f"{name}.yaml").read_text(encoding="utf-8"))
    expected = SIZES[data["size"]]
    sizes = {field: config.get(field) for field in expected}
    if sizes != expected:
        raise ValueError(f"{name} has {_listed(expected)}, but the model has {_listed(sizes)}")
    return {
        "published": data | {"name": name},
        **{key: data[key] for key in ("license", "license_text", "base_model")},
        "datasets": [IMAGENET],
        "results": [
            {
                "data": "ImageNet-1k, validation",
                "metric": result["metric"],
                "shown": f"{result['value']}%",
                "source": f"[{result['source']}]({result['url']})",
            }
            for result in data["results"]
        ],
        "eval_results": [
            _eval_result(
                result["metric"],
                result["value"],
                dataset_type=IMAGENET,
                dataset_name="ImageNet-1k",
                dataset_split="validation",
                source_name=result["source"],
                source_url=result["url"],
            )
            for result in data["results"]
        ],
        "speed": _measured_speed(data["size"]),
    }


def training_facts(folder: Path) -> dict[str, Any]:
    """Return what the template says about a model that this package has trained, from its summary.json.

    A summary of other weights than the folder's says nothing about them (`summary_of_weights`).
    """
    summary = summary_of_weights(folder) or {}
    data, started_from = (_public_name(summary.get(key), folder) for key in ("data", "started_from"))
    data_name = {None: "the test images", "digits": "scikit-learn's digits"}.get(data, data)
    accuracies = {"top-1 accuracy": summary.get("top1"), "top-5 accuracy": summary.get("top5")}
    percents = {metric: 100 * value for metric, value in accuracies.items() if value is not None}
    num_images = summary.get("num_test_images")
    images = summary.get("evaluated_on", "test images")
    commit = f", commit {summary['commit'][:7]}" if summary.get("commit") else ""
    dataset_type = data if data and ("/" in data or data == "digits") else "imagefolder"
    return {
        "license": "unknown",
        "license_text": "Not stated by the author.",
        "base_model": started_from if started_from and "/" in started_from else None,
        "datasets": [data] if data and "/" in data else None,
        "imagenet": bool(data and "imagenet" in data.lower()) and summary.get("num_labels") == 1000,
        "results": [
            {
                "data": f"{data_name}, {num_images:,} {images}" if num_images else data_name,
                "metric": metric,
                "shown": f"{percent:.2f}%",
                "source": f"measured at the end of training{commit}",
            }
            for metric, percent in percents.items()
        ],
        "eval_results": [
            _eval_result(metric, round(percent, 3), dataset_type=dataset_type, dataset_name=data_name or "")
            for metric, percent in percents.items()
        ]
        or None,
        "training": _training_rows(summary, data_name if data else None, started_from),
        "weights_sha256": summary.get("weights_sha256"),
    }


def summary_of_weights(folder: Path) -> dict[str, Any] | None:
    """Return what a folder's summary.json says, or None if it was written beside other weights or nowhere.

    Raises:
        ValueError: it cannot be read, or is not a JSON object.
    """
    path = folder / "summary.json"
    summary = read_json(path) if path.is_file() else {}
    return summary if summary and summary.get("weights_sha256") == fingerprint(folder) else None


def states_others_figures(folder: Path) -> bool:
    """Tell whether a folder's README.md says of its figures that they were measured with other weights."""
    match = MEASURED_WITH.search((folder / "README.md").read_text(encoding="utf-8", errors="replace"))
    return match is not None and match[1] != fingerprint(folder)


def _eval_result(metric: str, percent: float, **data_and_source: Any) -> EvalResult:
    """Return an accuracy in percent as the Hub wants it."""
    task, name = "image-classification", f"{metric} in %"
    return EvalResult(task, metric_type="accuracy", metric_name=name, metric_value=percent, **data_and_source)


def _training_rows(
    summary: Mapping[str, Any], data: str | None, started_from: str | None
) -> list[tuple[str, str]]:
    """Return the rows of a fine-tuned model's training table, less those that the summary does not have."""

    def joined(**texts: str) -> str:
        known = [text.format(summary[key]) for key, text in texts.items() if summary.get(key) is not None]
        return ", ".join(known)

    versions = summary.get("versions") or {}
    rows = [
        ("data", ", ".join(filter(None, [data, joined(num_train_images="{:,} training images")]))),
        ("started from", started_from or ""),
        ("length", joined(epochs="{} epochs", steps="{:,} updates", batch_size="batches of {}")),
        ("best epoch", joined(best_epoch="{}", epoch_chosen="chosen: {}")),
        ("top-1 of the weights", joined(top1_raw="{:.2%}")),
        ("top-1 of the averaged weights", joined(top1_ema="{:.2%}")),
        ("device", joined(num_processes="{} x", device="{}").replace(" x, ", " x ")),
        ("precision", joined(precision="{}") + (", compiled" if summary.get("compiled") else "")),
        ("throughput", joined(images_per_second="{:,.0f} images/s")),
        ("peak memory", joined(peak_memory_gib="{:.1f} GiB")),
        ("time", joined(seconds="{:,.0f} s")),
        ("seed", joined(seed="{}")),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)),
        ("commit of flashkat_hf", joined(commit="{}")),
    ]
    return [(name, value) for name, value in rows if value]


def _public_name(value: Any, folder: Path) -> str | None:
    """Return a Hub id as it is, and a path by its last part.

    An id has one slash; so may a relative path, which is told by its first part and by the folders here and
    above the model's. Where that errs, an id loses its namespace; no path is kept.
    """
    if value is None:
        return None
    parts = re.split(r"[/\\]+", str(value).rstrip("/\\"))
    places = (Path.cwd(), *folder.resolve().parents)
    if len(parts) != 2 or parts[0] in LOCAL_FOLDERS or any((place / parts[0]).is_dir() for place in places):
        return parts[-1]
    name = "/".join(parts)
    return parts[-1] if _id_problem(name) else name


def _licenses() -> list[str]:
    """Return the Hub's identifiers of licenses."""
    return (CARDS / "licenses.txt").read_text(encoding="utf-8").split()


def _measured_speed(size: str) -> list[dict[str, Any]]:
    """Return the measured speeds of a model size, which `benchmarks/render.py` writes for the cards."""
    lines = [json.loads(line) for line in (CARDS / "speed.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["size"] == size]


def _label_names(id2label: Mapping[Any, str] | None) -> str | None:
    """Return the first five labels in one line, or None where they have no names."""
    names = [str(name) for _, name in sorted((id2label or {}).items())]
    if not names or names[0] == "LABEL_0":
        return None
    return ", ".join(names[:5]).replace("|", "\\|") + (f", ... ({len(names)})" if len(names) > 5 else "")


def _id_problem(repo_id: Any) -> str | None:
    """Return why the Hub would not take a name, or None if it would."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        return f"not a name that the Hub takes: {one_line(error)}"
    return None


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())
