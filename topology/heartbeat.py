"""Heartbeats in the job's store: which ranks are alive, known without asking them.

Every rank counts up under its own key, in a thread with its own connection. Rank 0 watches the
counts by its own clock, so clocks need not agree. A dead process, a stopped one and a lost host
look the same: the count stands still. A process group cannot tell this; after a failure it blames
no one, or the wrong one.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any

INTERVAL_S = 0.5
SILENT_S = 3.0  # a rank is taken for dead when its count stood still this long


def second_connection(store: Any) -> Any:
    """A client of its own to the same store: one client serves one waiting caller at a time."""
    return store.clone()


class Heartbeat:
    """Counts up under a key of the store until it is stopped; use it as a context manager."""

    def __init__(self, store: Any, key: str, interval_s: float = INTERVAL_S) -> None:
        self._store = second_connection(store)
        self._key = key
        self._interval_s = interval_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tamoe-heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._store.set(self._key, "0")
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._stopped.set()
        # A store that died would hold the thread; it is a daemon and may stay.
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        count = 0
        while not self._stopped.wait(self._interval_s):
            count += 1
            try:
                self._store.set(self._key, str(count))
            except Exception:  # the store is gone: whoever waits on it finds out and says so
                return


class Watch:
    """Tells which counts have stood still, by the clock of the process that watches."""

    def __init__(self, store: Any, keys: Iterable[str]) -> None:
        self._store = store
        self._keys = list(keys)
        now = time.monotonic()
        self._seen: dict[str, tuple[bytes, float]] = dict.fromkeys(self._keys, (b"", now))

    def look(self) -> None:
        """Read all counts once."""
        now = time.monotonic()
        for key, count in zip(self._keys, self._store.multi_get(self._keys), strict=True):
            if count != self._seen[key][0]:
                self._seen[key] = (count, now)

    def silent(self, for_s: float = SILENT_S) -> list[int]:
        """Positions of the keys whose count has not changed for so long."""
        now = time.monotonic()
        return [k for k, key in enumerate(self._keys) if now - self._seen[key][1] > for_s]

    def wait_for_silence(self, for_s: float = SILENT_S) -> list[int]:
        """Look until someone is silent for so long, or all have counted on since the call.

        For a caller that has seen an operation fail and wants to know whose fault it was. That a
        count differs from the one last looked at proves nothing: the caller may not have looked
        for longer than the rank has been silent.
        """
        with contextlib.suppress(Exception):
            self.look()
        begun, first = time.monotonic(), {key: count for key, (count, _) in self._seen.items()}
        while True:
            time.sleep(INTERVAL_S / 5)
            with contextlib.suppress(Exception):
                self.look()
            silent = self.silent(for_s)
            heard = all(count != first[key] for key, (count, _) in self._seen.items())
            if silent or heard or time.monotonic() - begun > 2 * for_s:
                return silent
