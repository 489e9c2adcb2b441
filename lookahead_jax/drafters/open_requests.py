"""The open requests of a drafter that keeps a state for each."""

from collections.abc import Hashable
from typing import TypeVar

State = TypeVar("State")


class OpenRequests(dict[Hashable, State]):
    """States by request; ValueError, and no KeyError, for a request that is not open."""

    def __missing__(self, request: Hashable) -> State:
        raise ValueError(f"request {request} has not begun, or has ended")

    def __delitem__(self, request: Hashable) -> None:
        if request not in self:
            self.__missing__(request)
        super().__delitem__(request)
