"""`python -m lookahead_jax.lm_eval <arguments of lm_eval>`; see eval/harness/command.py."""

import sys

from lookahead_jax.eval.harness.command import main, register

__all__ = ["main", "register"]

if __name__ == "__main__":
    sys.exit(main())
