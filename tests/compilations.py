"""The programs that XLA has compiled since this module was imported, for tests that count them."""

import jax

compilations: list[str] = []


def _count(event, seconds, **_):
    if event == "/jax/core/compile/backend_compile_duration":
        compilations.append(event)


jax.monitoring.register_event_duration_secs_listener(_count)
