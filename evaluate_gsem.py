"""The paper's evaluation (see src/gsem/published.py)."""

import sys

from gsem.published_cli import evaluate_main

if __name__ == "__main__":
    sys.exit(evaluate_main())
