"""The paper's evaluation (see src/gsem/cli/paper.py)."""

import sys

from gsem.cli.paper_options import evaluate_main

if __name__ == "__main__":
    sys.exit(evaluate_main())
