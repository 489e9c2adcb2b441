"""The choice of nodes against simulated machines and texts."""

import numpy as np
import pytest

from lookahead_jax.controller import Controller

COSTS = {1: 1.0, 8: 1.4, 16: 1.9, 32: 2.9, 64: 5.0, 128: 9.0}


def simulate(gains, costs=COSTS, tokens=2000, compile_s=500.0, noise=0.0, seed=0):
    """Decodes `tokens` tokens; what a step of P nodes emits is gains(P, emitted so far).

    Returns the time over that of plain decoding, compilation left out, and the last choices.
    """
    controller, rng = Controller(), np.random.default_rng(seed)
    emitted = spent = 0.0
    seen, choices = set(), []
    while emitted < tokens:
        nodes = controller.choose()
        steps = 16 if nodes == 1 and controller.settled(1) else 1
        gain = gains(nodes, emitted) if nodes > 1 else 1.0
        seconds = steps * costs[nodes] * rng.uniform(1 - noise, 1 + noise)
        controller.record(nodes, steps, gain, seconds + (0 if nodes in seen else compile_s))
        seen.add(nodes)
        choices.append(nodes)
        emitted += steps * gain
        spent += steps * costs[nodes]
    return spent / emitted, choices


@pytest.mark.parametrize("tokens", [270, 2000])
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_where_nothing_can_be_drafted_it_costs_at_most_three_percent(tokens, noise):
    ratio, _ = simulate(lambda nodes, at: 1.0, tokens=tokens, noise=noise)
    assert ratio < 1.03
    steep = {n: float(n) for n in COSTS}  # a machine on which every node costs a plain step
    ratio, _ = simulate(lambda nodes, at: 1.0, costs=steep, tokens=8 * tokens, noise=noise)
    assert ratio < 1.03


@pytest.mark.parametrize(("most", "half"), [(1.2, 8), (2.5, 3), (12.0, 30), (20.0, 100)])
def test_it_settles_on_the_best_rate(most, half):
    """A step of P nodes emits up to `most` tokens, half of what it adds with `half` nodes."""

    def gain(nodes, at):
        return 1 + (most - 1) * nodes / (nodes + half)

    rates = {n: (gain(n, 0) if n > 1 else 1.0) / c for n, c in COSTS.items()}
    best = max(rates, key=lambda n: rates[n])
    ratio, choices = simulate(gain)
    assert ratio < 1.05 / rates[best]
    assert max(set(choices[-50:]), key=choices[-50:].count) == best


def test_it_notices_when_a_text_changes():
    """Nothing to draft at first, then a copy; and back."""
    ratio, _ = simulate(lambda nodes, at: float(min(nodes, 8)) if at > 1000 else 1.0, tokens=3000)
    assert ratio < 0.5
    ratio, choices = simulate(
        lambda nodes, at: float(min(nodes, 8)) if at < 1000 else 1.0, tokens=3000
    )
    assert choices[-1] == 1


def test_plain_decoding_must_be_possible():
    with pytest.raises(ValueError, match="lack 1"):
        Controller([8, 16])
