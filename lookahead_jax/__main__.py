"""`python -m lookahead_jax` is the command `lookahead`."""

import sys

from lookahead_jax.cli.main import main

sys.exit(main())
