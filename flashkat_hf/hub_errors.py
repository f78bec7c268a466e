"""Errors of the Hub, each explained in one sentence that says what to do: for downloads and for pushes."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from huggingface_hub import get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .messages import one_line

HTTP_ERROR = HfHubHTTPError.__bases__[0]  # httpx's or httpx2's, whichever huggingface_hub uses
TRY_AGAIN = (408, 429, 500, 502, 503, 504)
NO_TOKEN = "there is no access token; log in with `hf auth login`, or set HF_TOKEN"


@dataclass(eq=False)
class HubError(ValueError):
    """The Hub refused, or cannot be reached."""

    message: str
    transient: bool = False  # trying again later may help
    retry_after: float | None = None  # seconds that the Hub wants to be left alone
    moved: bool = False  # the branch got another commit meanwhile
    lost: bool = False  # no answer came, so the request may have been carried out

    def __str__(self) -> str:
        return self.message


@contextmanager
def explained(action: str, repo_id: str, token: str | None = None) -> Iterator[None]:
    """Turn whatever huggingface_hub, its HTTP client or hf_xet raises into a `HubError`.

    Args:
        action: what was tried, such as "cannot push to alice/model".
        repo_id: the repository, for the sentence.
        token: the token in use, which is taken out of what a server may have echoed; default: the stored one.

    Raises:
        HubError: in one line.
    """
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        message = f"{action}: {explain(error, repo_id)}"
        for secret in {token, get_token()} - {None, ""}:
            message = message.replace(str(secret), "[token]")
        cause = _innermost(error)
        status = _status(cause)
        unanswered = status is None and isinstance(cause, HTTP_ERROR | ConnectionError | TimeoutError)
        raise HubError(
            message,
            transient=status in TRY_AGAIN or unanswered,
            retry_after=_retry_after(cause),
            moved=status == 412,
            lost=unanswered,
        ) from None  # the cause may carry headers of the request


def _innermost(error: BaseException) -> BaseException:
    """Return the error behind those that huggingface_hub wraps around failed uploads."""
    while type(error) is RuntimeError and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def explain(error: BaseException, repo_id: str) -> str:
    """Say in one line what an error of huggingface_hub, its HTTP client or hf_xet means, and what to do."""
    error = _innermost(error)
    if isinstance(error, LocalTokenNotFoundError):
        return NO_TOKEN
    if isinstance(error, OfflineModeIsEnabled):
        return "huggingface_hub is in offline mode; unset HF_HUB_OFFLINE"
    if isinstance(error, HFValidationError):
        return one_line(error)
    if (status := _status(error)) is not None:
        return _explain_status(error, status, repo_id)
    if isinstance(error, HTTP_ERROR | ConnectionError | TimeoutError):
        kind, details = type(error).__name__, one_line(str(error) or "no details")
        problem = "the Hub does not answer in time" if "Timeout" in kind else "no connection to the Hub"
        return f"{problem} ({kind}: {details}); try again later"
    return f"{type(error).__name__}: {one_line(error)}"


def _explain_status(error: BaseException, status: int, repo_id: str) -> str:
    """Say what a status of HTTP means here; the classes of huggingface_hub tell more than some of them."""
    answer = error.server_message if isinstance(error, HfHubHTTPError) else ""
    also = f" ({one_line(answer)})" if answer else ""
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no such branch, tag or commit{also}"
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        login = "log in again with `hf auth login`, or set HF_TOKEN"
        return f"the Hub does not accept the access token{also}; {login}"
    if isinstance(error, GatedRepoError):
        return f"{repo_id} asks for consent on its page, and you have not given it{also}"
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo_id} does not exist, or is private and not yours{also}"
    wait = _retry_after(error)
    when = "later" if wait is None else f"in {wait:.0f} s"
    reasons = {
        403: f"the access token gives no right to do this with {repo_id}{also}",
        404: f"the Hub does not know what was asked for{also}",
        409: f"the Hub reports a conflict (409){also}; try again",
        412: f"somebody else committed to {repo_id} in the meantime; look at it and try again",
        429: f"the Hub limits requests (429){also}; try again {when}",
    }
    if status in reasons:
        return reasons[status]
    if status >= 500:
        return f"the Hub has a problem ({status}){also}; try again later"
    return f"the Hub refused it ({status}){also}"


def _status(error: BaseException) -> int | None:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code
    text = re.search(r"HTTP status (?:client|server) error \((\d{3})\b", str(error))  # all that hf_xet has
    return int(text[1]) if text else None


def _retry_after(error: BaseException) -> float | None:
    value = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return float(value) if value.isdigit() else None
