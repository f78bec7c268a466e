"""Pushing a model folder to the Hub in one commit, and publishing the converted KATs."""

import hashlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    get_session,
    get_token,
)
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from ..checkpoints.hub_errors import NO_TOKEN, HubError, explained
from ..checkpoints.published import PUBLISHED
from ..conversion.conversion import convert
from .staging import Staged, stage

ATTEMPTS = 3  # of a commit; huggingface_hub itself tries uploads six times
LONGEST_WAIT = 60.0  # seconds between them; a Hub that asks for more ends the push
SILENCE = (
    300.0  # seconds without a byte after which a request is given up; huggingface_hub would wait for ever
)
STALE_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")
BRANCH = re.compile(r"(?!.*(\.\.|//|/\.|\.lock(/|$)|@\{))[\w.@+-][\w.@+/-]*(?<![./])")

Report = Callable[[str], None]


@dataclass
class Push:
    """What a push sends, or has sent.

    Attributes:
        repo_id: the repository, with its namespace.
        branch: where the commit goes.
        staged: the checked folder.
        new: the repository is made by the push.
        new_branch: the branch is made by the push, from main.
        head: the commit that `changed` and `deleted` refer to; None in a new repository.
        changed: files that are sent: name and bytes.
        same: files that the branch has already.
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
        return not self.changed and not self.deleted

    def __str__(self) -> str:
        where = f"{self.repo_id}{', a new repository' * self.new}{', private' * (self.new and bool(self.private))}"
        where += f"; branch {self.branch}{', new' * self.new_branch}"
        rows = [(name, _size(size), "sent") for name, size in self.changed.items()]
        rows += [(name, _size(size), "there already") for name, size in self.same.items()]
        rows += [(name, "", "deleted: weights of an earlier model") for name in self.deleted]
        rows += [(name, "", f"left out: {reason}") for name, reason in self.staged.left_out.items()]
        width = max(len(name) for name, *_ in rows)
        lines = [f"  {name:{width}}  {size:>9}  {what}" for name, size, what in rows]
        total = f"{len(self.changed)} files, {_size(sum(self.changed.values()))}"
        return "\n".join([where, *lines, *(f"note: {note}" for note in self.staged.notes), total])


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
        private: of a new repository.
        revision: the branch, made from main where it does not exist; by default main.
        create_pr: open a pull request against main.
        what_if: check everything, send nothing.
        token: by default HF_TOKEN's or the one you logged in with.
        message: of the commit.
        include_training_state: also send optimizer states and `training_args.bin`.
        license: the Hub's identifier of one, for the card, where the folder has none; by default that of the
            branch's.
        report: gets the text of what will be sent, before it is.

    Raises:
        HubError: in one line, for what the Hub or the network refuses.
        ValueError: in one line, for what is wrong with the arguments or the folder, before anything is sent.
    """
    if create_pr and revision not in (None, "main"):
        raise ValueError(f"a pull request is opened against main, so revision {revision} has no meaning")
    check_name(repo_id)
    branch, folder = check_branch(revision or "main"), Path(folder).expanduser()
    if license is None and not (folder / "README.md").exists():
        license = _license_there(repo_id, branch, token)
    with tempfile.TemporaryDirectory(prefix="flashkat-push-") as workspace:
        staged = stage(
            folder,
            Path(workspace),
            repo_id=repo_id,
            include_training_state=include_training_state,
            license=license,
            secrets=[token or get_token() or ""],
        )
        check_access(repo_id, private=private, create_pr=create_pr, what_if=what_if, token=token)
        return send(
            staged,
            repo_id,
            branch,
            private=private,
            create_pr=create_pr,
            what_if=what_if,
            token=token,
            message=message or "Upload FlashKAT",
            report=report,
        )


def send(
    staged: Staged,
    repo_id: str,
    branch: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    what_if: bool = False,
    token: str | None = None,
    message: str,
    report: Report | None = None,
) -> Push:
    """The second half of `push`: what is staged goes to a repository that `check_access` let pass."""
    api, lost = HfApi(token=token), False
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with explained(f"cannot push to {repo_id}", repo_id, token), _patience():
                plan = _compare(api, Push(repo_id, branch, staged, private=private), create_pr)
                if report and attempt == 1:
                    report(str(plan))
                if not what_if:
                    _commit(api, plan, message, create_pr)
            return plan
        except HubError as error:
            # A commit whose answer was lost is found by comparing again; a pull request would be opened
            # twice.
            again = (error.transient and not (create_pr and error.lost)) or (error.moved and lost)
            wait = error.retry_after if error.retry_after is not None else 2.0**attempt
            if attempt == ATTEMPTS or not again or wait > LONGEST_WAIT:
                raise
            lost = lost or error.lost
            time.sleep(wait)
    raise AssertionError("unreachable")


def publish(
    name: str,
    namespace: str,
    *,
    private: bool | None = None,
    what_if: bool = False,
    token: str | None = None,
    report: Report | None = None,
) -> list[Push]:
    """Convert published KATs, prove them, write their cards and push them to `namespace/name`.

    Args:
        name: a name in `published.PUBLISHED`, or "all".
        namespace: your user name or an organisation of yours.
        private: of new repositories.
        what_if: convert and check, send nothing.
        token: by default HF_TOKEN's or the one you logged in with.
        report: gets the text of each conversion and of what will be sent, and each error as it happens.

    Returns:
        One `Push` for each checkpoint.

    Raises:
        ValueError: in one line; with "all", after the others have been published.
    """
    if name != "all" and name not in PUBLISHED:
        raise ValueError(f"{name} is not published; known are {', '.join(PUBLISHED)} and all")
    names = list(PUBLISHED) if name == "all" else [name]
    targets = {row: f"{namespace}/{row}" for row in names}
    check_access(*map(check_name, targets.values()), private=private, what_if=what_if, token=token)
    say = report or (lambda text: None)
    done: list[Push] = []
    failed: dict[str, str] = {}
    for row, target in targets.items():
        with tempfile.TemporaryDirectory(prefix="flashkat-publish-") as workspace:
            model, sent = Path(workspace, row), Path(workspace, "sent")
            sent.mkdir()
            try:
                say(str(convert(row, model, token=token)))
                staged = stage(model, sent, repo_id=target, published=row)
                text = f"Convert {PUBLISHED[row].file}"
                plan = send(
                    staged,
                    target,
                    "main",
                    private=private,
                    what_if=what_if,
                    token=token,
                    message=text,
                    report=report,
                )
                done.append(plan)
            except ValueError as error:
                reason = str(error).replace(str(model), row)
                if name != "all":
                    raise ValueError(reason) from error
                failed[row] = reason
                say(f"{row}: {reason}")
    if failed:
        reasons = "; ".join(f"{row} ({reason})" for row, reason in failed.items())
        raise ValueError(f"{len(failed)} of {len(names)} are not published: {reasons}")
    return done


def check_name(repo_id: str) -> str:
    """The name, if the Hub would take it.

    Raises:
        ValueError: in one line.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"the Hub does not allow the name {repo_id!r}: {' '.join(str(error).split())}"
        ) from error
    if "/" not in repo_id or repo_id.endswith((".git", ".ipynb")):
        raise ValueError(
            f"the Hub does not allow the name {repo_id!r}: owner/name is expected, without .git or .ipynb"
        )
    return repo_id


def check_branch(name: str) -> str:
    """The name, if it can be a branch's, or `refs/pr/N`.

    Raises:
        ValueError: in one line.
    """
    if not BRANCH.fullmatch(name) or (name.startswith("refs/") and not re.fullmatch(r"refs/pr/\d+", name)):
        raise ValueError(f"{name!r} cannot be the name of a branch")
    if re.fullmatch(r"[0-9a-f]{40}", name):
        raise ValueError(f"{name} is a commit; a branch is needed")
    return name


def check_access(
    *repo_ids: str,
    private: bool | None = None,
    create_pr: bool = False,
    what_if: bool = False,
    token: str | None = None,
) -> None:
    """Ask the Hub whether the token may write to these repositories of one owner, or make them.

    Nothing is sent.

    An owner that the account does not list is not taken for somebody else: the Hub decides, asked about an
    upload that is not made. Where there is no repository yet, making it is the only question, so it is made,
    unless `what_if`.

    Raises:
        HubError: in one line: no token or a bad one, no right to write, another visibility, no network.
    """
    action = f"cannot push to {repo_ids[0]}"
    if not (token or get_token()):
        raise HubError(f"{action}: {NO_TOKEN}")
    api = HfApi(token=token)
    with explained(action, repo_ids[0], token), _patience():
        account = api.whoami()
    role = ((account.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise HubError(
            f"{action}: the access token of {account['name']} may only read; make one that may write"
        )
    own = {account["name"], *(organization["name"] for organization in account.get("orgs") or [])}
    for repo_id in repo_ids:
        listed = repo_id.partition("/")[0].casefold() in {name.casefold() for name in own}
        with explained(f"cannot push to {repo_id}", repo_id, token), _patience():
            try:
                there = api.repo_info(repo_id).private
            except RepositoryNotFoundError:
                if create_pr:
                    raise
                if not (listed or what_if):
                    api.create_repo(repo_id, private=private)
                continue
            if None not in (private, there) and there != private:
                now = "private" if there else "public"
                raise HubError(
                    f"cannot push to {repo_id}: it exists and is {now}; its settings on the Hub change that"
                )
            if not (listed or create_pr):
                api.preupload_lfs_files(repo_id, [CommitOperationAdd("README.md", b"#")])


def _license_there(repo_id: str, branch: str, token: str | None) -> str | None:
    """What the card on the branch says, if there is one and the Hub shows it."""
    try:
        with explained(f"cannot read {repo_id}", repo_id, token), _patience():
            path = HfApi(token=token).hf_hub_download(repo_id, "README.md", revision=branch)
        license = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict().get("license")
    except (OSError, ValueError):
        return None  # pushing says what is wrong
    return license if isinstance(license, str) and license != "unknown" else None


@contextmanager
def _patience() -> Iterator[None]:
    client = get_session()
    before, client.timeout = client.timeout, SILENCE
    try:
        yield
    finally:
        client.timeout = before


def _compare(api: HfApi, plan: Push, create_pr: bool) -> Push:
    """Find what is new, changed and stale in the folder against the branch, or main if that does not exist."""
    there: dict[str, RepoFile] = {}
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
            there = {entry.path: entry for entry in listing if isinstance(entry, RepoFile)}
    except RepositoryNotFoundError:
        if create_pr:
            raise
        plan.new, plan.new_branch = True, plan.branch != "main"
    for path in sorted(plan.staged.folder.iterdir()):
        same = path.name in there and _same(path, there[path.name])
        (plan.same if same else plan.changed)[path.name] = path.stat().st_size
    sent = plan.same.keys() | plan.changed.keys()
    plan.deleted = sorted(name for name in there if STALE_WEIGHTS.fullmatch(name) and name not in sent)
    return plan


def _same(path: Path, there: RepoFile) -> bool:
    size = path.stat().st_size
    if there.lfs:
        with path.open("rb") as file:
            return (
                size == there.lfs.size and hashlib.file_digest(file, "sha256").hexdigest() == there.lfs.sha256
            )
    return (
        size == there.size
        and hashlib.sha1(b"blob %d\0" % size + path.read_bytes()).hexdigest() == there.blob_id
    )


def _commit(api: HfApi, plan: Push, message: str, create_pr: bool) -> None:
    """Make what is missing of repository and branch, then one commit. `upload_folder` would make several."""
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
    done = api.create_commit(
        plan.repo_id,
        operations,
        commit_message=message,
        revision=None if create_pr else plan.branch,
        create_pr=create_pr,
        parent_commit=None if create_pr else plan.head,
    )
    plan.url = done.pr_url if create_pr and done.pr_url else done.commit_url


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
