"""The harness's generation kwargs: each one acts or is refused by name."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from lookahead_jax.decoding.sampling import GREEDY, Sampling

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the limit on new tokens; the first one given counts, as in the harness."""
_FILTERS = {"top_k": (0, -1), "top_p": (1, 0), "min_p": (0,)}  # with the values that mean "off"
_PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
_NO_EFFECT = {
    "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "length_penalty": 1,
    "early_stopping": False, "no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0,
    "typical_p": 1, "use_cache": True, "skip_special_tokens": True,
}  # fmt: skip
"""Options of other models, with the value at which they change nothing; others are refused."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How one request is continued."""

    stop: tuple[str, ...]
    max_new_tokens: int
    sampling: Sampling
    seed: int

    @classmethod
    def of(cls, options: Mapping[str, Any], *, default_length: int) -> "GenerationOptions":
        """From the harness's generation kwargs.

        Raises ValueError for an option that is unknown or that cannot be followed.
        """
        known = {"until", "do_sample", "temperature", "seed", *LENGTHS, *_FILTERS, *_PENALTIES}
        for name, value in options.items():
            if name in _NO_EFFECT:
                if value is not None and value != _NO_EFFECT[name]:
                    raise ValueError(
                        f"generation option {name}={value!r} is not supported; "
                        f"leave it out or set it to {_NO_EFFECT[name]!r}"
                    )
            elif name not in known:
                raise ValueError(
                    f"generation option {name}={value!r} is not supported; "
                    f"supported: {', '.join(sorted(known))}"
                )
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else until
        if not isinstance(until, list | tuple) or not all(isinstance(s, str) for s in until):
            raise ValueError(f"generation option until must be texts, got {until!r}")
        lengths = [options[name] for name in LENGTHS if options.get(name) is not None]
        return cls(
            stop=tuple(text for text in until if text),
            max_new_tokens=_whole("max_gen_toks", lengths[0]) if lengths else default_length,
            sampling=sampling_of(options),
            seed=_whole("seed", options.get("seed") or 0),
        )


def sampling_of(options: Mapping[str, Any]) -> Sampling:
    """How tokens are chosen: greedy unless `do_sample` or a temperature asks for sampling.

    Raises ValueError for `do_sample=true` with temperature 0, which contradict each other.
    """
    given = options.get("temperature")
    temperature = _number("temperature", 0.0 if given is None else given)
    do_sample = options.get("do_sample")
    if not isinstance(do_sample, bool | None):
        raise ValueError(f"generation option do_sample must be true or false, got {do_sample!r}")
    if do_sample and given is None:
        temperature = 1.0
    elif do_sample and temperature == 0:
        raise ValueError(
            "do_sample=true needs a temperature above 0; set do_sample=false for greedy decoding"
        )
    penalties = {
        name: off if (value := options.get(name)) is None else _number(name, value)
        for name, off in _PENALTIES.items()
    }
    sampling = dataclasses.replace(GREEDY, **penalties)
    filters = {
        name: (_whole if name == "top_k" else _number)(name, value)
        for name, off in _FILTERS.items()
        if (value := options.get(name)) is not None and value not in off
    }
    if do_sample is False or temperature == 0:
        return sampling
    return dataclasses.replace(sampling, temperature=temperature, **filters)


def seed_of(context: str, seed: int, repeat: int) -> int:
    """The seed of one sample: of the request's content, never of its place in a batch.

    `repeat` counts the requests with the same content, so that repeats of one request differ.
    """
    content = json.dumps([context, seed, repeat]).encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:4], "big")


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"generation option {name} must be a number, got {value!r}") from None


def _whole(name: str, value: Any) -> int:
    number = _number(name, value)
    if not number.is_integer():
        raise ValueError(f"generation option {name} must be a whole number, got {value!r}")
    return int(number)
