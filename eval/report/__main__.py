"""`python -m lookahead_jax.eval.report`."""

import sys

from lookahead_jax.eval.report.report import main

if __name__ == "__main__":
    sys.exit(main())
