"""`python -m flashkat_hf` is `flashkat`, for launchers: `accelerate launch -m flashkat_hf finetune`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
