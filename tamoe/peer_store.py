"""Exchange of rows inside a node by stores into the peers' memory, without messages or host waits.

Shape suffixes: P ranks of the node, D numbers of a row, N rows to send from, n rows sent, R rows
that the receive buffer holds.
"""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist

from tamoe.kernel_calls import KernelCall, library_of
from tamoe.kernel_library import MAX_PEERS
from tamoe.peer_memory import allocate
from tamoe.topology.errors import InputError, KernelError, RankTimeoutError, whole
from tamoe.waiting import checked_timeout

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class PeerStore:
    """Receive buffers of the ranks of one node, and the exchange that fills them.

    On a GPU the buffers stay until the process ends, so make one and keep it. Exchanges follow each
    other on the device, whatever their streams, and cannot be captured in a CUDA graph: each has a
    number of its own.

    Parameters
    ----------
    group
        Ranks of one node, at most 64; None is the default group. Making one is a collective call.
    capacity_rows
        R, rows that each rank can receive in one exchange, the same at all ranks.
    width, dtype, device
        D and what the rows are.
    timeout_s
        How long the device waits for its peers in an exchange, > 0.

    Raises
    ------
    InputError
        An argument is not allowed, or ``capacity_rows``, ``width`` or ``dtype`` differ between
        ranks; the latter on every rank.
    KernelError
        There are no kernels for the device, or its ranks cannot map each other's memory.
    """

    def __init__(
        self,
        group: ProcessGroup | None,
        *,
        capacity_rows: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        timeout_s: float = 60.0,
    ) -> None:
        self.capacity_rows = whole("capacity_rows", capacity_rows, 0)
        self.width = whole("width", width, 0)
        self.num_ranks = dist.get_world_size(group)
        if self.num_ranks > MAX_PEERS:
            raise InputError(f"group has {self.num_ranks} ranks; allowed: at most {MAX_PEERS}")
        device = torch.device(device)
        library = library_of(torch.empty(0, device=device))
        if library is None:
            raise KernelError(f"no kernels for {device}: rows cannot be stored into peers' memory")
        if timeout_s is None:
            raise InputError("timeout_s is None; allowed: > 0 seconds, since a device cannot ask")
        self._timeout_ns = int(cast(float, checked_timeout(timeout_s)) * 1e9)
        on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with on_device:  # NCCL gathers there
            _require_equal(self.capacity_rows, self.width, dtype, group)
        self._library = library
        self._row_bytes = self.width * dtype.itemsize
        header = library.code("peer_header_bytes", self.num_ranks)
        buffer_bytes = self.capacity_rows * self._row_bytes
        self._memory = allocate(header + buffer_bytes, group, device, library)
        self.rank = self._memory.rank
        own = self._memory.own[header : header + buffer_bytes]
        self.buffer_RD = own.view(dtype).view(self.capacity_rows, self.width)
        self._status = torch.zeros(1, dtype=torch.int64, device=device)
        self._epoch = 0
        self._last: torch.cuda.Event | None = None  # behind the last exchange; None on the CPU

    def exchange(
        self,
        row_ND: torch.Tensor,
        send_count_P: torch.Tensor,
        source_n: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Send rows to the ranks and fill ``buffer_RD`` with theirs; a collective call.

        Parameters
        ----------
        row_ND
            Rows, ``[N, D]``.
        send_count_P
            ``[P]`` int64 on the device: rows for each rank, >= 0, in all at most as many as there
            are to send.
        source_n
            Row of each one to send, sorted by the rank that it goes to; None is 0, 1, 2 … Entries
            behind the sum of the counts are not read.

        Returns
        -------
        torch.Tensor
            ``[P]`` int64: rows received from each rank. They lie in ``buffer_RD`` by sender, each
            one's in its order, until this is called again.

        Raises
        ------
        InputError
            A shape, dtype or device is not allowed. What went wrong on the device,
            :meth:`check` tells.
        KernelError
            A CUDA graph is being captured.
        """
        self._refuse(row_ND, send_count_P, source_n)
        if row_ND.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                raise KernelError("peer stores cannot be captured in a CUDA graph")
            if self._last is not None:
                torch.cuda.current_stream(row_ND.device).wait_event(self._last)
        self._epoch += 1
        received_count_P = torch.empty_like(send_count_P)
        call = KernelCall(self._library, row_ND)
        addresses = (ctypes.c_void_p * self.num_ranks)(*self._memory.addresses)
        call.run(
            "peer_store",
            addresses,
            self.num_ranks,
            self.rank,
            self._epoch,
            call.ready(row_ND),
            call.ready(source_n, torch.int64),
            len(row_ND),
            len(row_ND) if source_n is None else len(source_n),
            self._row_bytes,
            self.capacity_rows,
            call.ready(send_count_P),
            received_count_P.data_ptr(),
            self._status.data_ptr(),
            self._timeout_ns,
        )
        if row_ND.is_cuda:
            self._last = torch.cuda.current_stream(row_ND.device).record_event()
        return received_count_P

    def check(self) -> None:
        """Wait for the last exchange and raise if it failed; what was received is then not whole.

        Raises
        ------
        RankTimeoutError
            A rank did not answer in time; ``rank`` is its number in the group.
        InputError
            A rank would receive more rows than its buffer holds, or gave counts that are not
            allowed.
        """
        if self._last is not None:
            self._last.synchronize()  # it may be on another stream than this one
        status = int(self._status)
        if status > 0:
            seconds = self._timeout_ns / 1e9
            raise RankTimeoutError(
                f"rank {status - 1} of the node did not answer rank {self.rank} within "
                f"{seconds:g} s in exchange {self._epoch} of peer stores",
                rank=status - 1,
            )
        if status < -MAX_PEERS:
            raise InputError(
                f"send_count_P of rank {-status - 1 - MAX_PEERS} of the node is below 0 or more "
                f"than its rows to send; allowed: >= 0, in all at most as many as there are"
            )
        if status < 0:
            raise InputError(
                f"rank {-status - 1} of the node would receive more rows than capacity_rows, "
                f"{self.capacity_rows}; allow for more"
            )

    def _refuse(
        self, row_ND: torch.Tensor, send_count_P: torch.Tensor, source_n: torch.Tensor | None
    ) -> None:
        buffer_RD = self.buffer_RD
        if row_ND.ndim != 2 or row_ND.shape[1] != self.width or row_ND.dtype != buffer_RD.dtype:
            raise InputError(
                f"row_ND is {row_ND.dtype} of shape {tuple(row_ND.shape)}; allowed: "
                f"{buffer_RD.dtype}, [N, {self.width}]"
            )
        if send_count_P.shape != (self.num_ranks,) or send_count_P.dtype != torch.int64:
            raise InputError(
                f"send_count_P is {send_count_P.dtype} of shape {tuple(send_count_P.shape)}; "
                f"allowed: torch.int64, [{self.num_ranks}]"
            )
        if source_n is not None and (source_n.ndim != 1 or source_n.dtype not in _INTEGERS):
            raise InputError(
                f"source_n is {source_n.dtype} of shape {tuple(source_n.shape)}; allowed: "
                f"integers, [n]"
            )
        given = ("row_ND", row_ND), ("send_count_P", send_count_P), ("source_n", source_n)
        for name, tensor in given:
            if tensor is not None and tensor.device != buffer_RD.device:
                raise InputError(f"{name} is on {tensor.device}; allowed: {buffer_RD.device}")


def _require_equal(
    capacity_rows: int, width: int, dtype: torch.dtype, group: ProcessGroup | None
) -> None:
    """Refuse buffers of different sizes: peers would store beyond the end of the smaller one."""
    own = f"capacity_rows {capacity_rows}, width {width}, {dtype}"
    told_P: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told_P, own, group=group)
    if len(set(told_P)) > 1:
        found = "; ".join(f"rank {rank}: {told}" for rank, told in enumerate(told_P))
        raise InputError(
            f"capacity_rows, width or dtype differ between the ranks of the node; allowed: the "
            f"same on all ranks. {found}"
        )
