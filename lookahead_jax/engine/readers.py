"""The readers of prompts for all policies that an engine's requests may name."""

import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence

from lookahead_jax.engine.prompt_reader import PrefilledRequest, PromptReader, ReadRequest
from lookahead_jax.engine.requests import EncodedRequest
from lookahead_jax.generation.settings import EvictionSettings
from lookahead_jax.policies.base import Policy


class PromptReaders:
    """A reader for each policy; requests that name none are read with that of `settings`."""

    def __init__(
        self,
        make: Callable[[EvictionSettings], PromptReader],
        settings: EvictionSettings,
        policies: Mapping[str, Policy],
    ):
        default = make(settings)
        self._readers: dict[str | None, PromptReader] = {None: default}
        for name, policy in policies.items():
            own = policy != settings.policy
            reader = make(dataclasses.replace(settings, policy=policy)) if own else default
            self._readers[name] = reader
        self.slots: int = max(reader.slots for reader in self._readers.values())
        """Cache slots that a row needs, whatever policy its prompt is read with."""
        self.pins: int = default.pins
        """Positions of a row that decoding has to know the pinned ones of."""

    def together(self, requests: Sequence[EncodedRequest]) -> int:
        """How many of these requests, from the first on, `read` should be given next."""
        policy = requests[0].policy
        same = itertools.takewhile(lambda request: request.policy == policy, requests)
        return self._readers[policy].together(list(same))

    def read(self, requests: Sequence[EncodedRequest]) -> Generator[None, None, list[ReadRequest]]:
        """As `PromptReader.read`, with the policy of the requests."""
        return self._readers[requests[0].policy].read(requests)

    def samples(self, lengths: Iterable[int]) -> Iterator[PrefilledRequest]:
        """As `PromptReader.samples`, for every policy."""
        lengths = list(lengths)
        for reader in set(self._readers.values()):
            yield from reader.samples(lengths)
