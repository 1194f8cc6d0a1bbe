"""Who owns what kernels read on the device: a bounded cache whose entries outlive every CUDA graph that captured them."""

import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class ScheduleCache(Generic[Key, Value]):
    """Values by key, built at first use.

    A captured graph replays the addresses that it saw. So a value that a capture takes is held for ever: it is neither dropped
    nor replaced, and it is found again without a warm-up. All other values are dropped together once there are too many.

    Args:
        capacity: Number of values that no graph holds, at most.
        settle: Called with the keys of dropped values before they are freed; it must wait until nothing reads them any more.
    """

    def __init__(self, capacity: int, settle: Callable[[list[Key]], None]) -> None:
        self.capacity = capacity
        self._settle = settle
        self._loose: dict[Key, Value] = {}
        self._held: dict[Key, Value] = {}
        # the backward pass runs in threads of its own
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._loose) + len(self._held)

    def get(self, key: Key, build: Callable[[], Value], *, capturing: bool) -> Value | None:
        """The value of `key`; None if it is not there during a capture, in which nothing can be built.

        Args:
            key: Names the value.
            build: Makes it.
            capturing: A CUDA graph is being captured and will hold the value.
        """
        with self._lock:
            if key in self._held:
                return self._held[key]
            if capturing:
                if key in self._loose:
                    self._held[key] = self._loose.pop(key)
                return self._held.get(key)
            if key not in self._loose:
                self._make_room()
                self._loose[key] = build()
            return self._loose[key]

    def _make_room(self) -> None:
        if len(self._loose) >= self.capacity:
            self._settle(list(self._loose))
            self._loose.clear()
