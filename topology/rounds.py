"""Rank 0 says what is measured next, the others follow; through the job's store alone.

The control plane shares nothing with the links' data plane: a process group that saw a timeout is
of no more use, the store still is. Rank 0 posts numbered orders, ranks post their results or that
they failed, and heartbeats tell who died. Loaded in ranks only: it needs torch.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from tamoe.topology.errors import ProbeError
from tamoe.topology.fit import PairSamples
from tamoe.topology.heartbeat import SILENT_S, Watch, second_connection
from tamoe.topology.measure import (
    measure_copy,
    measure_flow,
    measure_load,
    measure_one_way,
    measure_overhead,
    measure_pair,
)
from tamoe.topology.orders import FlowPlan, Order, PairPlan, RankPair
from tamoe.topology.wire import Wire

_FOREVER = timedelta(days=7)  # a store's wait that times out writes warnings to stderr
_POLL_S = (0.001, 0.02)  # first and longest pause between looks at the store


def carry_out(order: Order, rank: int, wire: Wire) -> Any:
    """Do this rank's part of an order; a JSON value where it has to answer, else None."""
    if order.do == "overhead":
        return measure_overhead(wire)
    own = next((pair for pair in order.pairs if rank in pair), None)
    if own is None:
        return None
    first = own[0] == rank
    peer = own[1] if first else own[0]
    if order.do == "copy":
        return measure_copy(wire.device)
    if order.do in ("flows", "load"):
        flow = measure_flow if order.do == "flows" else measure_load
        return flow(wire, peer, FlowPlan(**order.settings), first=first)
    measure = measure_pair if order.do == "pairs" else measure_one_way
    samples = measure(wire, peer, PairPlan(**order.settings), first=first)
    return None if samples is None else samples.to_json()


class Follower:
    """A rank other than 0: carries out orders until it is told to stop."""

    def __init__(self, store: Any, rank: int, timeout_s: float) -> None:
        self._store = store
        self._rank = rank
        self._patience_s = timeout_s  # for the first order, while ranks still join
        self._silent_s = idle_silence_s(timeout_s)
        self._watch = Watch(second_connection(store), ["heart/0"])
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._received = 0
        # A thread waits on the store, so that this rank can give up when the store itself hangs.
        self._thread = threading.Thread(target=self._listen, name="tamoe-orders", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        store = second_connection(self._store)
        number = 0
        while True:
            try:
                store.wait([f"order/{number}"], _FOREVER)
                order = Order.from_text(store.get(f"order/{number}"))
            except Exception:  # the store is gone, and with it whoever kept it
                self._orders.put(None)
                return
            self._orders.put(order)
            if order.do in ("stop", "abort"):
                return
            number += 1

    def next_order(self) -> Order:
        """Wait for the next order; raises ProbeError when rank 0 has died or given up."""
        begun = answered = time.monotonic()
        patience_s = self._silent_s if self._received else max(self._patience_s, self._silent_s)
        while True:
            try:
                order = self._orders.get(timeout=SILENT_S / 2)
                break
            except queue.Empty:
                if _in_time(self._watch.look, SILENT_S):
                    answered = time.monotonic()
            lost = time.monotonic() - answered > patience_s
            if lost or (self._watch.silent(patience_s) and time.monotonic() - begun > patience_s):
                raise ProbeError("rank 0, which leads the probe, died or stopped", 0)
        self._received += 1
        if order is None:
            raise ProbeError("the job's store ended, and with it the probe", 0)
        if order.do == "abort":
            raise ProbeError(order.settings["message"], order.settings["rank"])
        return order

    def follow(self, wire: Wire) -> Order:
        """Carry out orders; returns the one that says stop."""
        while True:
            order = self.next_order()
            if order.do == "stop":
                return order
            try:
                result = carry_out(order, self._rank, wire)
            except Exception as error:
                self._store.set("failed", f"rank {self._rank}: {_first_line(error)}")
                while True:  # rank 0 finds out whose fault it was and says so
                    self.next_order()
            if self._rank in order.answering():
                self._store.set(f"result/{self._received}/{self._rank}", json.dumps(result))


def _in_time(call: Any, seconds: float) -> bool:
    """Whether a call that may hang came back; one that fails is as good as no answer."""
    answered = threading.Event()

    def attempt() -> None:
        with contextlib.suppress(Exception):
            call()
            answered.set()

    threading.Thread(target=attempt, daemon=True).start()
    return answered.wait(seconds)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


class Conductor:
    """Rank 0: posts orders, takes part in them, collects results, names who died."""

    def __init__(self, store: Any, num_ranks: int, timeout_s: float) -> None:
        self._store = store
        self._num_ranks = num_ranks
        self._timeout_s = timeout_s
        self._watch = Watch(second_connection(store), [f"heart/{r}" for r in range(num_ranks)])
        self._number = 0
        self._wire: Wire | None = None
        self.silent_s = idle_silence_s(timeout_s)

    def use(self, wire: Wire) -> None:
        """Measure over this wire from now on."""
        self._wire = wire

    def gather(self, name: str) -> list[Any]:
        """What every rank posted under a name, by rank.

        Raises
        ------
        ProbeError
            Ranks are missing after the timeout; the message names them.
        """
        keys = [f"{name}/{rank}" for rank in range(self._num_ranks)]
        deadline = time.monotonic() + self._timeout_s
        while not self._store.check(keys):
            if time.monotonic() > deadline:
                missing = [r for r, key in enumerate(keys) if not self._store.check([key])]
                raise ProbeError(
                    f"{rank_list(missing)} did not join the probe within {self._timeout_s:g} s; "
                    f"every rank of the group must call it",
                    missing[0] if missing else None,
                )
            time.sleep(0.01)
        return [json.loads(text) for text in self._store.multi_get(keys)]

    def post(self, order: Order) -> None:
        """Tell all ranks what comes next."""
        self._store.set(f"order/{self._number}", order.to_text())
        self._number += 1

    def run(self, order: Order) -> dict[int, Any]:
        """Have an order carried out and return the results by rank.

        Raises
        ------
        ProbeError
            A rank died, stopped or failed, or the time ran out; ``rank`` is the one to blame.
        """
        assert self._wire is not None
        self.post(order)
        number, waiting = self._number, {rank for rank in order.answering() if rank != 0}
        try:
            own = carry_out(order, 0, self._wire)
        except Exception as error:
            raise self._blame(f"rank 0: {_first_line(error)}") from error
        results = self._collect([(rank, f"result/{number}/{rank}") for rank in sorted(waiting)])
        if 0 in order.answering():
            results[0] = own
        return results

    def samples(self, order: Order) -> dict[RankPair, PairSamples]:
        """The samples of an order that measures pairs, by (source, target)."""
        results = self.run(order)
        peers = dict(order.pairs) | {j: i for i, j in order.pairs}
        return {(r, peers[r]): PairSamples.from_json(found) for r, found in results.items()}

    def _collect(self, keys: list[tuple[int, str]]) -> dict[int, Any]:
        names = [name for _, name in keys]
        pause, looked, deadline = _POLL_S[0], 0.0, time.monotonic() + 2 * self._timeout_s
        while names and not self._store.check(names):
            now = time.monotonic()
            if self._store.check(["failed"]):
                raise self._blame(self._store.get("failed").decode())
            if now - looked > SILENT_S / 6:
                looked = now
                self._watch.look()
                if silent := self._watch.silent(self.silent_s):
                    raise _dead(silent, self.silent_s)
            if now > deadline:
                late = [rank for rank, name in keys if not self._store.check([name])]
                raise ProbeError(f"{rank_list(late)} gave no result in time", late[0])
            time.sleep(pause)
            pause = min(2 * pause, _POLL_S[1])
        found = self._store.multi_get(names) if names else []
        for name in names:
            self._store.delete_key(name)
        return {rank: json.loads(text) for (rank, _), text in zip(keys, found, strict=True)}

    def _blame(self, report: str) -> ProbeError:
        """Who is silent is to blame; who reported is only a witness."""
        silent = self._watch.wait_for_silence()
        if silent:
            return _dead(silent, SILENT_S, f" ({report})")
        witness = int(report.split(":")[0].removeprefix("rank "))
        return ProbeError(f"a measurement failed on {report}", witness)

    def abort(self, message: str, rank: int | None) -> None:
        """Tell all ranks to give up, and why."""
        self.post(Order("abort", settings={"message": message, "rank": rank}))

    def forget_orders(self) -> None:
        """Remove the orders from the store, once everyone has read the last."""
        for number in range(self._number):
            self._store.delete_key(f"order/{number}")


def idle_silence_s(timeout_s: float) -> float:
    """How long a rank may be silent before it is taken for dead without any other sign."""
    return max(SILENT_S, min(10.0, timeout_s))


def rank_list(ranks: Iterable[int]) -> str:
    """Ranks as a person names them.

    >>> rank_list([3]), rank_list([1, 2])
    ('rank 3', 'ranks 1, 2')
    """
    numbers = [str(rank) for rank in ranks]
    return f"rank{'s' if len(numbers) != 1 else ''} {', '.join(numbers)}"


def _dead(silent: list[int], seconds: float, report: str = "") -> ProbeError:
    return ProbeError(
        f"{rank_list(silent)} died or stopped: no heartbeat for {seconds:g} s{report}", silent[0]
    )
