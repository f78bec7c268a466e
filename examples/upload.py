"""Check a model folder and send it to the Hugging Face Hub in one commit.

    hf auth login                                             # once, or set HF_TOKEN
    python examples/upload.py runs/digits/best YOU/digits     # the model that `make demo` saved
    python examples/upload.py runs/digits/best YOU/digits --what-if   # check and show, send nothing

This is the command `flashkat push`, as a script that you can change.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from flashkat_hf.hub import push


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="what `flashkat convert` or finetune.py has left")
    parser.add_argument("repo", help="owner/name; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="of a new repository")
    parser.add_argument("--what-if", action="store_true", help="check everything, send nothing")
    options = parser.parse_args(arguments)
    try:
        result = push(
            options.folder,
            options.repo,
            private=options.private or None,
            what_if=options.what_if,
            report=print,
        )
    except ValueError as error:
        raise SystemExit(f"upload.py: {error}") from error
    print(result.url or "nothing was sent")


if __name__ == "__main__":
    main()
