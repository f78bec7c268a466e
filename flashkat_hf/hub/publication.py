"""Publishing the converted KATs: conversion, proof, card and push of each."""

from ..checkpoints.published import PUBLISHED
from ..conversion.conversion import convert
from ..files import workspace
from .destination import Destination
from .staging import stage
from .upload import Push, Report, check_access, send


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
        private: visibility of new repositories.
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
    targets = {
        name: Destination(f"{namespace}/{name}", private=private, what_if=what_if, token=token)
        for name in names
    }
    check_access(*targets.values())
    report = report or (lambda text: None)
    pushes: list[Push] = []
    failures: list[str] = []
    for checkpoint, target in targets.items():
        with workspace("flashkat-publish-") as place:
            model, staging = place / checkpoint, place / "sent"
            staging.mkdir()
            try:
                report(str(convert(checkpoint, model, token=token)))
                staged = stage(model, staging, repo_id=target.repo_id, published=checkpoint, token=token)
                pushes.append(send(staged, target, f"Convert {PUBLISHED[checkpoint].file}", report))
            except ValueError as error:
                reason = str(error).replace(str(model), checkpoint)
                if name != "all":
                    raise ValueError(reason) from error
                failures.append(f"{checkpoint} ({reason})")
                report(f"{checkpoint}: {reason}")
    if failures:
        raise ValueError(f"{len(failures)} of {len(names)} are not published: {'; '.join(failures)}")
    return pushes
