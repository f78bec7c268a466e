"""The destination of a push: its names and its token are checked here before PyTorch is imported."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from huggingface_hub import get_session, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..hub_errors import NO_TOKEN, HubError, explained
from ..messages import one_line

SILENCE = 300.0  # seconds without a byte that end a request; huggingface_hub would wait for ever
BRANCH = re.compile(r"(?!.*(\.\.|//|/\.|\.lock(/|$)|@\{))[\w.@+-][\w.@+/-]*(?<![./])")


@dataclass(frozen=True)
class Destination:
    """A branch on the Hub and how to push to it; the fields are arguments of `push`.

    Raises:
        ValueError: in one line: the Hub would not take the name of the repository or of the branch.
    """

    repo_id: str
    branch: str = "main"
    private: bool | None = None
    create_pr: bool = False
    what_if: bool = False
    token: str | None = field(default=None, repr=False)

    def __post_init__(self):
        _check_repo_id(self.repo_id)
        _check_branch(self.branch)

    @contextmanager
    def asking(self, action: str = "push to") -> Iterator[None]:
        """Give up requests after `SILENCE`, and turn what goes wrong into a `HubError` about `action`."""
        with explained(f"cannot {action} {self.repo_id}", self.repo_id, self.token):
            client = get_session()
            timeout, client.timeout = client.timeout, SILENCE
            try:
                yield
            finally:
                client.timeout = timeout


def check_token(target: Destination) -> None:
    """Look for an access token, without asking the Hub about it.

    Raises:
        HubError: there is none.
    """
    if not (target.token or get_token()):
        raise HubError(f"cannot push to {target.repo_id}: {NO_TOKEN}")


def _check_repo_id(name: str) -> None:
    """Refuse a name of a repository that the Hub would refuse."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"the Hub does not allow the name {name!r}: {one_line(error)}") from error
    if "/" not in name or name.endswith((".git", ".ipynb")):
        rule = "owner/name is expected, without .git or .ipynb"
        raise ValueError(f"the Hub does not allow the name {name!r}: {rule}")


def _check_branch(name: str) -> None:
    """Refuse a name that neither a branch can have nor is `refs/pr/N`."""
    if not BRANCH.fullmatch(name) or (name.startswith("refs/") and not re.fullmatch(r"refs/pr/\d+", name)):
        raise ValueError(f"{name!r} cannot be the name of a branch")
    if re.fullmatch(r"[0-9a-f]{40}", name):
        raise ValueError(f"{name} is a commit; a branch is needed")
