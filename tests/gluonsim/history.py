"""Happens-before, as vector clocks that also track the async-proxy fence."""

from __future__ import annotations

import itertools
from collections.abc import Hashable

Agent = Hashable

_event_numbers = itertools.count(1)


class Past:
    """A set of events, closed under happens-before: for every agent, the number of its latest event in the set.

    Those of them that a ``fence_async_shared`` has made visible to the async proxy are tracked beside it.
    """

    def __init__(self, origin: Past | None = None):
        self._seen: dict[Agent, int] = dict(origin._seen) if origin else {}
        self._fenced: dict[Agent, int] = dict(origin._fenced) if origin else {}

    def join(self, other: Past) -> None:
        """Add the other's events."""
        _join(self._seen, other._seen)
        _join(self._fenced, other._fenced)

    def contains(self, agent: Agent, event: int) -> bool:
        return event <= self._seen.get(agent, 0)

    def contains_fenced(self, agent: Agent, event: int) -> bool:
        return event <= self._fenced.get(agent, 0)


class History(Past):
    """The past of an agent: of a partition, or of an asynchronous operation, up to and with its current event.

    Synchronisation hands pasts on: a release joins the releaser's history into the barrier's past, an acquire joins
    the barrier's past into the acquirer's history.
    """

    def __init__(self, agent: Agent, origin: Past | None = None):
        super().__init__(origin)
        self.agent = agent
        self.advance()

    @property
    def event(self) -> int:
        """The number of the agent's current event."""
        return self._seen[self.agent]

    def advance(self) -> None:
        """Start a new event, unknown to everyone who acquired this history until now."""
        self._seen[self.agent] = next(_event_numbers)

    def fence(self) -> None:
        """Make every event so far visible to the async proxy."""
        _join(self._fenced, self._seen)
        self.advance()

    def release(self, past: Past) -> None:
        """Hand this history on through a barrier."""
        past.join(self)
        self.advance()

    def fork(self, agent: Agent) -> History:
        """The history of an agent started here, which this agent's later events are unordered with."""
        child = History(agent, origin=self)
        self.advance()
        return child


def _join(clock: dict[Agent, int], other: dict[Agent, int]) -> None:
    for agent, event in other.items():
        if event > clock.get(agent, 0):
            clock[agent] = event
