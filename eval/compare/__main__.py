"""`python -m lookahead_jax.eval.compare`."""

import sys

from lookahead_jax.eval.compare.compare import main

if __name__ == "__main__":
    sys.exit(main())
