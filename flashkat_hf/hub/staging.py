"""The copy of a model folder that a push sends: checked, completed, nothing of this machine in it."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import get_token
from huggingface_hub.errors import StrictDataclassError

from ..checkpoints.loading import load_checkpoint
from ..checkpoints.reading import read_settings
from ..checkpoints.remote_code import check_code, write_code
from ..checkpoints.weights import check_state, read_state
from ..files import read_json, to_json
from ..messages import one_line
from .card import LOCAL_PATH, check_card, states_others_figures, summary_of_weights, write_card

WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
TEXT_SUFFIXES = {".json", ".jsonl", ".md", ".txt", ".csv", ".yaml", ".yml", ".py"}
PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".svg", ".webp"}
PICKLE_SUFFIX = re.compile(r"\.(bin|pt|pth|pkl|pickle|ckpt|tar|joblib|npy|npz|h5|msgpack)")
TRAINING_STATE = re.compile(
    r"training_args\.bin|trainer_state\.json|(training_state|optimizer|scheduler|scaler|sampler|rng_state|random_states"
    r"|dl_state_dict|custom_checkpoint).*\.(bin|pt|pth|pkl|json|safetensors)"
)
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b")


@dataclass
class Staged:
    """A folder that is sent as it stands, and how it differs from the one that it was made from.

    Attributes:
        folder: holds files only, no folders.
        left_out: names in the original folder that are not sent, and why.
        notes: what was written or changed on the way.
    """

    folder: Path
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def stage(
    source: Path,
    target: Path,
    *,
    repo_id: str | None = None,
    include_training_state: bool = False,
    published: str | None = None,
    license: str | None = None,
    final: bool = True,
    token: str | None = None,
) -> Staged:
    """Fill the empty folder `target` with what a push of `source` sends; `source` stays as it is.

    Args:
        source: a model folder.
        target: an empty folder; large files are linked, so it lives no longer than `source`.
        repo_id: where it goes, for the card.
        include_training_state: also optimizer states and `training_args.bin`, which are pickles.
        published: the name of a published checkpoint, for the card.
        license: the Hub's identifier of one, for the card.
        final: write a card where there is none, and load the model; a checkpoint during training does
            without.
        token: what no file may hold; by default HF_TOKEN's or the one you logged in with.

    Raises:
        ValueError: in one line: it is no model folder, holds pickles, weights and config do not agree, card
            or code are not complete, or a text names a path of this machine or holds an access token.
    """
    staged = Staged(target)
    with _cannot_be_pushed(source, target):
        _copy_files(source, staged, include_training_state)
        check_weights(target)
        write_code(target)
        code = sorted(path.name for path in target.glob("*.py"))
        staged.notes.append(f"code: {len(code)} files of this package, for trust_remote_code")
        for name in code:
            staged.left_out.pop(name, None)
        if final:
            load_checkpoint(str(target))
            if not (target / "README.md").is_file():
                write_card(target, repo_id=repo_id, published=published, license=license)
                staged.notes.append("README.md: written, as there was none")
                if (target / "summary.json").is_file() and summary_of_weights(target) is None:
                    staged.notes.append(
                        "summary.json is not of these weights, so README.md has none of its figures"
                    )
            elif license:
                raise ValueError(f"its README.md says what the license is; there is no use for {license}")
        _check_texts(target, source, token or get_token())
    return staged


@contextmanager
def _cannot_be_pushed(source: Path, target: Path) -> Iterator[None]:
    """Let an error say that `source` cannot be pushed, and name `source` where it names `target`."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = (
            one_line(error) if isinstance(error, OSError) else str(error).replace(str(target), str(source))
        )
        raise ValueError(f"{source} cannot be pushed: {reason}") from error


def _copy_files(source: Path, staged: Staged, include_training_state: bool) -> None:
    """Link weights and copy texts and pictures, with paths of this machine shortened."""
    if not source.is_dir():
        raise ValueError("it is not a folder")
    if not (source / "config.json").is_file():
        raise ValueError("it is not a model folder, as it has no config.json")
    weights = weight_files(source)
    for path in sorted(source.iterdir()):
        copy = staged.folder / path.name
        if reason := _reason_to_leave_out(path, weights, include_training_state):
            staged.left_out[path.name] = reason
        elif path.suffix == ".safetensors":
            copy.symlink_to(path.resolve())  # large, and nothing writes to it
        else:
            shutil.copyfile(path, copy)
            if path.suffix in (".json", ".jsonl") and (count := _shorten_local_paths(copy, source)):
                note = f"{path.name}: {count} paths of this machine shortened to their last part"
                staged.notes.append(note)


def _reason_to_leave_out(path: Path, weights: set[str], include_training_state: bool) -> str | None:
    """Return why a file is not sent, or None if it is.

    Raises:
        ValueError: it is a pickle that might be taken for weights.
    """
    if path.name.startswith((".", "__")):
        return "hidden"
    if path.is_dir():
        return "a folder"
    if TRAINING_STATE.fullmatch(path.name):
        return None if include_training_state else "training state"
    if PICKLE_SUFFIX.fullmatch(path.suffix):
        rule = "nothing else is sent as weights; move it away"
        raise ValueError(f"{path.name} is not a safetensors file, and {rule}")
    if path.suffix == ".safetensors":
        return None if path.name in weights else "not a part of the weights"
    if path.suffix == ".py":
        return "not this package's code"
    sent = path.suffix in TEXT_SUFFIXES | PICTURE_SUFFIXES or path.name in ("LICENSE", "NOTICE")
    return None if sent else "not a part of a model"


def weight_files(folder: Path) -> set[str]:
    """Return the names of the safetensors files that transformers loads.

    Raises:
        ValueError: there are none, or the index names what is not there.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return {WEIGHTS_FILE}
    if not (folder / WEIGHTS_INDEX).is_file():
        raise ValueError(f"it has neither {WEIGHTS_FILE} nor {WEIGHTS_INDEX}")
    index = read_json(folder / WEIGHTS_INDEX)
    shards = set(index["weight_map"].values()) if isinstance(index.get("weight_map"), dict) else set()
    if not shards:
        raise ValueError(f"{WEIGHTS_INDEX} names no files")
    for name in sorted(shards):
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{WEIGHTS_INDEX} names {name}, which is not there")
    return shards


def check_weights(folder: Path) -> None:
    """Hold the weights against the model in config.json: names, shapes, dtypes, and that all are finite.

    Raises:
        ValueError: a file is damaged, or they do not fit.
    """
    weight_files(folder)
    settings = read_json(folder / "config.json")
    if (model_type := settings.get("model_type")) != "flashkat":
        raise ValueError(f"config.json describes a {model_type} model, not a FlashKAT")
    state = read_state(folder)
    try:
        config = read_settings(settings, state)
    except (StrictDataclassError, TypeError, KeyError) as error:
        raise ValueError(f"config.json: {one_line(error)}") from error
    check_state(state, config)


def _shorten_local_paths(path: Path, source: Path) -> int:
    """Cut paths of this machine in a JSON file, or in JSON lines, to their last part; return how many."""
    local, count = _local_paths(source), 0

    def shorten(text: str) -> str:
        nonlocal count
        if PurePosixPath(text).is_absolute() and "\n" not in text and Path(text).parent.is_dir():
            text, times = PurePosixPath(text).name, 1
        else:
            text, times = local.subn(lambda match: re.split(r"[\\/]", match[0].rstrip("\\/"))[-1], text)
        count += times
        return text

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {shorten(key): walk(item) for key, item in value.items()}
        if isinstance(value, list):
            return [walk(item) for item in value]
        return shorten(value) if isinstance(value, str) else value

    text, lines = path.read_text(encoding="utf-8", errors="replace"), path.suffix == ".jsonl"
    try:
        parts = [line for line in text.splitlines() if line.strip()] if lines else [text]
        contents = [json.loads(part) for part in parts]
    except ValueError as error:
        raise ValueError(f"{path.name} is no JSON file ({one_line(error)})") from error
    if path.name == "config.json":
        if not isinstance(contents[0], dict):
            raise ValueError("config.json is no JSON object")
        count += bool(contents[0].pop("_name_or_path", ""))  # as transformers does when it saves
    shortened = "".join(to_json(walk(content), indent=None if lines else 2) for content in contents)
    if count:
        path.write_text(shortened, encoding="utf-8")
    return count


def _local_paths(source: Path) -> re.Pattern[str]:
    """Return `LOCAL_PATH` with all that lies below the home, the working or the folder's parent directory."""
    places = {str(place) for place in (Path.home(), Path.cwd(), source.resolve().parent)} - {"/"}
    own = "|".join(re.escape(place) for place in sorted(places, key=len, reverse=True))
    return re.compile(rf"(?<![\w.:/])(?:{own})/\S+|{LOCAL_PATH.pattern}")


def _check_texts(folder: Path, source: Path, secret: str | None) -> None:
    """Refuse access tokens and paths of this machine in texts, incomplete code and an invalid card."""
    local = _local_paths(source)
    for path in sorted(folder.iterdir()):
        if path.suffix not in TEXT_SUFFIXES:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if TOKEN.search(text) or (secret and secret in text):
            raise ValueError(f"{path.name} holds an access token; take it out, and make a new one")
        for number, line in enumerate(text.splitlines(), 1):
            if match := local.search(line):
                raise ValueError(f"{path.name}, line {number}, names a path of this machine, {match[0]}")
    if problems := check_code(folder):
        raise ValueError(f"its code is not complete: {problems[0]}")
    card = folder / "README.md"
    if card.is_file() and (problems := check_card(card.read_text(encoding="utf-8", errors="replace"))):
        raise ValueError(f"README.md: {problems[0]}; correct it, or move it away to have one written")
    if card.is_file() and states_others_figures(folder):
        raise ValueError(
            "README.md has figures of other weights; correct it, or move it away to have one written"
        )
