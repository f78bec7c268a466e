"""Name what is in image files, by a FlashKAT from a folder or from the Hub.

    python examples/classify.py runs/digits/best picture.png another.jpg --top-k 3

This is the command `flashkat classify`, whose code is in flashkat_hf/training/commands.py.
"""

import sys

from flashkat_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["classify", *sys.argv[1:]]))
