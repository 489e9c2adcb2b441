"""`python -m lookahead_jax.lm_eval <arguments of lm_eval>`: the harness with this library's models.

    python -m lookahead_jax.lm_eval run --model lookahead --tasks arc_easy \
        --model_args pretrained=DIR,policy=snapkv,policy_window=8,budget=256,drafter=trie

lm-evaluation-harness (extra `lm-eval`, made with 0.4.13) has no plugins: the model must be
registered in its process, which is all that happens here. Log-likelihoods are those of the full
cache unless `evict_loglikelihood=true`.
"""

import sys

from lookahead_jax.eval.harness.command import main, register

__all__ = ["main", "register"]

if __name__ == "__main__":
    sys.exit(main())
