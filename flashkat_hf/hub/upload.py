"""Pushing a model folder to the Hub: one commit, or none."""

import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
)
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from ..files import workspace
from ..hub_errors import HubError
from .destination import Destination, check_token
from .staging import Staged, stage

ATTEMPTS = 3  # of a commit; huggingface_hub itself tries uploads six times
LONGEST_WAIT = 60.0  # seconds between them; a Hub that asks for more ends the push
STALE_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")

Report = Callable[[str], None]


@dataclass
class Push:
    """The plan of a push, and its outcome.

    Attributes:
        repo_id: the repository, with its namespace.
        branch: where the commit goes.
        staged: the checked folder.
        new: the repository is made by the push.
        new_branch: the branch is made by the push, from main.
        head: the commit that `changed` and `deleted` refer to; None in a new repository.
        changed: files that are sent: name and bytes.
        same: files that the branch has already, likewise.
        deleted: weights of an earlier model, which transformers might load instead.
        private: a new repository's visibility.
        url: the commit, the pull request, or what was there already; empty before.
    """

    repo_id: str
    branch: str
    staged: Staged
    new: bool = False
    new_branch: bool = False
    head: str | None = None
    changed: dict[str, int] = field(default_factory=dict)
    same: dict[str, int] = field(default_factory=dict)
    deleted: list[str] = field(default_factory=list)
    private: bool | None = None
    url: str = ""

    @property
    def empty(self) -> bool:
        """True if the branch holds all of the folder already."""
        return not self.changed and not self.deleted

    def __str__(self) -> str:
        repository = ", a new repository" * self.new + ", private" * (self.new and bool(self.private))
        target = f"{self.repo_id}{repository}; branch {self.branch}{', new' * self.new_branch}"
        rows = [(name, _bytes_text(size), "sent") for name, size in self.changed.items()]
        rows += [(name, _bytes_text(size), "there already") for name, size in self.same.items()]
        rows += [(name, "", "deleted: weights of an earlier model") for name in self.deleted]
        rows += [(name, "", f"left out: {reason}") for name, reason in self.staged.left_out.items()]
        width = max(len(name) for name, *_ in rows)
        lines = [f"  {name:{width}}  {size:>9}  {fate}" for name, size, fate in rows]
        notes = [f"note: {note}" for note in self.staged.notes]
        total = f"{len(self.changed)} files, {_bytes_text(sum(self.changed.values()))}"
        return "\n".join([target, *lines, *notes, total])


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    what_if: bool = False,
    token: str | None = None,
    message: str | None = None,
    include_training_state: bool = False,
    license: str | None = None,
    report: Report | None = None,
) -> Push:
    """Send a model folder to the Hub in one commit, or none if the branch holds all of it.

    The folder is checked and completed in a copy (see `staging.stage`). What is on the branch and not in the
    folder stays, except weights of an earlier model. A push that was interrupted has changed nothing, or made
    an empty repository; pushing again finishes it.

    Args:
        folder: a model folder, such as `convert` or a training run leaves.
        repo_id: `owner/name`.
        private: visibility of a new repository.
        revision: the branch, made from main where it does not exist; by default main.
        create_pr: open a pull request against main.
        what_if: check everything, send nothing.
        token: by default HF_TOKEN's or the one you logged in with.
        message: the commit's.
        include_training_state: also send optimizer states and `training_args.bin`.
        license: the Hub's identifier, for a card that is written; by default that of the branch's card.
        report: gets the text of what will be sent, before it is.

    Raises:
        HubError: in one line, for what the Hub or the network refuses.
        ValueError: in one line, for what is wrong with the arguments or the folder, before anything is sent.
    """
    if create_pr and revision not in (None, "main"):
        raise ValueError(f"a pull request is opened against main, so revision {revision} has no meaning")
    target = Destination(repo_id, revision or "main", private, create_pr, what_if, token)
    folder = Path(folder).expanduser()
    check_token(target)  # before what takes seconds
    if license is None and not (folder / "README.md").exists():
        license = _license_on_branch(target)
    with workspace("flashkat-push-") as staging:
        staged = stage(
            folder,
            staging,
            repo_id=repo_id,
            include_training_state=include_training_state,
            license=license,
            token=token,
        )
        check_access(target)
        return send(staged, target, message or "Upload FlashKAT", report)


def send(staged: Staged, target: Destination, message: str, report: Report | None = None) -> Push:
    """Send a staged folder to a repository that `check_access` let pass: the second half of `push`."""
    api, answer_lost = HfApi(token=target.token), False
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with target.asking():
                plan = _compare(api, staged, target)
                if report and attempt == 1:
                    report(str(plan))
                if not target.what_if:
                    _commit(api, plan, message, target.create_pr)
            return plan
        except HubError as error:
            # Comparing again finds a commit whose answer was lost; a pull request would be opened twice.
            retry = (error.transient and not (target.create_pr and error.lost)) or (
                error.moved and answer_lost
            )
            wait = error.retry_after if error.retry_after is not None else 2.0**attempt
            if attempt == ATTEMPTS or not retry or wait > LONGEST_WAIT:
                raise
            answer_lost = answer_lost or error.lost
            time.sleep(wait)
    raise AssertionError("unreachable")


def check_access(*targets: Destination) -> None:
    """Ask the Hub whether the token may write to these repositories of one owner, or make them; send nothing.

    An owner that the account does not list may still be an organisation of it. The Hub decides: it is asked
    about an upload that is not made. Where there is no repository yet, making it is the only question, so it
    is made, unless `what_if`.

    Raises:
        HubError: in one line: no token or a bad one, no right to write, another visibility, no network.
    """
    token, action = targets[0].token, f"cannot push to {targets[0].repo_id}"
    check_token(targets[0])
    api = HfApi(token=token)
    with targets[0].asking():
        account = api.whoami()
    role = ((account.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        problem = f"the access token of {account['name']} may only read; make one that may write"
        raise HubError(f"{action}: {problem}")
    owners = {owner["name"].casefold() for owner in (account, *(account.get("orgs") or []))}
    for target in targets:
        repo_id, private = target.repo_id, target.private
        listed = repo_id.partition("/")[0].casefold() in owners
        with target.asking():
            try:
                is_private = api.repo_info(repo_id).private
            except RepositoryNotFoundError:
                if target.create_pr:
                    raise
                if not (listed or target.what_if):
                    api.create_repo(repo_id, private=private)
                continue
            if None not in (private, is_private) and is_private != private:
                state = f"it exists and is {'private' if is_private else 'public'}"
                raise HubError(f"cannot push to {repo_id}: {state}; its settings on the Hub change that")
            if not (listed or target.create_pr):
                api.preupload_lfs_files(repo_id, [CommitOperationAdd("README.md", b"#")])


def _license_on_branch(target: Destination) -> str | None:
    """Return the license in the card on the branch, or None where the Hub shows no card or no license."""
    try:
        with target.asking("read"):
            api = HfApi(token=target.token)
            path = api.hf_hub_download(target.repo_id, "README.md", revision=target.branch)
        license = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict().get("license")
    except (OSError, ValueError):
        return None  # pushing says what is wrong
    return license if isinstance(license, str) and license != "unknown" else None


def _compare(api: HfApi, staged: Staged, target: Destination) -> Push:
    """Compare the folder with the branch, or with main where it does not exist, and return the plan."""
    plan = Push(target.repo_id, target.branch, staged, private=target.private)
    published: dict[str, RepoFile] = {}
    try:
        try:
            plan.head = api.repo_info(plan.repo_id, revision=plan.branch).sha
        except RevisionNotFoundError:
            if plan.branch == "main" or plan.branch.startswith("refs/"):
                raise
            plan.new_branch = True
            plan.head = api.repo_info(plan.repo_id, revision="main").sha
        if plan.head:
            listing = api.list_repo_tree(plan.repo_id, revision=plan.head)
            published = {entry.path: entry for entry in listing if isinstance(entry, RepoFile)}
    except RepositoryNotFoundError:
        if target.create_pr:
            raise
        plan.new = True
        plan.new_branch = plan.branch != "main"
    for path in sorted(plan.staged.folder.iterdir()):
        same = path.name in published and _same_content(path, published[path.name])
        (plan.same if same else plan.changed)[path.name] = path.stat().st_size
    obsolete = published.keys() - plan.same.keys() - plan.changed.keys()
    plan.deleted = sorted(name for name in obsolete if STALE_WEIGHTS.fullmatch(name))
    return plan


def _same_content(path: Path, published: RepoFile) -> bool:
    """Compare a file's size and checksum with those of the Hub's file."""
    size = path.stat().st_size
    if published.lfs:
        with path.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        return (size, checksum) == (published.lfs.size, published.lfs.sha256)
    blob_id = hashlib.sha1(b"blob %d\0" % size + path.read_bytes()).hexdigest()
    return (size, blob_id) == (published.size, published.blob_id)


def _commit(api: HfApi, plan: Push, message: str, create_pr: bool) -> None:
    """Make the repository and the branch if need be, then one commit; `upload_folder` would make several."""
    if plan.new:
        api.create_repo(plan.repo_id, private=plan.private, exist_ok=True)
        plan.head = api.repo_info(plan.repo_id).sha
    if plan.new_branch:
        api.create_branch(plan.repo_id, branch=plan.branch, exist_ok=True)
    if plan.empty:
        plan.url = f"{api.endpoint}/{plan.repo_id}/tree/{plan.branch}"
        return
    operations = [CommitOperationAdd(name, plan.staged.folder / name) for name in plan.changed]
    operations += [CommitOperationDelete(name) for name in plan.deleted]
    commit = api.create_commit(
        plan.repo_id,
        operations,
        commit_message=message,
        revision=None if create_pr else plan.branch,
        create_pr=create_pr,
        parent_commit=None if create_pr else plan.head,
    )
    plan.url = commit.pr_url if create_pr and commit.pr_url else commit.commit_url


def _bytes_text(size: float) -> str:
    """Return a number of bytes with its unit, such as 1.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
