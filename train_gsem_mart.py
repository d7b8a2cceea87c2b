"""The paper's GCAT + MART training (see src/gsem/cli/paper.py)."""

import sys

from gsem.cli.paper_options import train_main

if __name__ == "__main__":
    sys.exit(train_main("gcat-mart-published"))
