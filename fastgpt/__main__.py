"""`python -m fastgpt`, the same as the `fastgpt` script."""

import sys

from fastgpt.cli import main

if __name__ == "__main__":
    sys.exit(main())
