"""The paper's GCAT training (see src/gsem/published.py)."""

import sys

from gsem.published_cli import train_main

if __name__ == "__main__":
    sys.exit(train_main("gcat-published"))
