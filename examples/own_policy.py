"""An eviction policy of one's own: keep the entries whose keys differ most from the key before.

    python examples/own_policy.py

A policy gives every prompt entry a score per KV head; the pipeline keeps the best `budget` of them.
docs/add-a-policy.md says what else a policy may decide.
"""

import dataclasses

import jax
import jax.numpy as jnp

import lookahead_jax as lk
from lookahead_jax.policies.base import Policy
from lookahead_jax.policies.view import LayerView


@dataclasses.dataclass(frozen=True, kw_only=True)
class Novelty(Policy):
    """Entries whose key points away from its predecessor's, and the last `recent` ones."""

    recent: int = 16
    """Last prompt tokens, always kept."""

    def score(self, view: LayerView) -> jax.Array:  # [B, K, T] float32, higher is kept
        k = view.k.astype(jnp.float32)
        k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
        before = jnp.roll(k, 1, axis=2)
        return -jnp.einsum("bkth,bkth->bkt", k, before)

    def protected(self, pos: jax.Array, length: jax.Array, budget: int) -> jax.Array:
        return pos >= length[:, None, None] - self.recent


def main() -> dict[str, lk.Generation]:
    model = lk.load(lk.EMBEDDED_MODEL)
    prompt = (lk.EMBEDDED_MODEL.parent / "example.txt").read_text()[:1500]
    policies = {"full": lk.make_policy("full"), "novelty": Novelty(), "recent": Novelty(recent=96)}
    results = {
        name: lk.generate(model, [prompt], policy=policy, budget=96, max_new_tokens=24)
        for name, policy in policies.items()
    }
    for name, result in results.items():
        print(f"{name:8} {result.cache.bytes / 1e6:.1f} MB: {result.text[0]!r}")
    return results


if __name__ == "__main__":
    main()
