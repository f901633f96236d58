"""What ranks tell each other: rows of their bands, and sums; differentiable, with errors that name a lost rank.

Gradients follow one rule: what is trained is the sum of the ranks' losses. A rank's gradient of a tensor that is equal
on all ranks is its own share, so a sum over ranks has a sum over ranks as its derivative, and an exchange of rows its
transpose: gradients go back to where the rows came from and are added up.
"""
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, TypeVar, Union

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .bands import Cuts, Spans, overlap
from .watch import Watch

__all__ = ['Bands', 'all_reduce_sum', 'exchange_rows', 'group_of']

T = TypeVar('T')
Mesh = Union[DeviceMesh, dist.ProcessGroup]


def group_of(mesh: Mesh) -> dist.ProcessGroup:
    """Return the process group of a mesh.

    Raises:
        ValueError: The mesh has several dimensions.
    """
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            names = mesh.mesh_dim_names or ()
            raise ValueError(
                f'A mesh of {mesh.ndim} dimensions {names}: choose the one that divides the rows, such as'
                f' mesh[{names[-1] if names else "rows"!r}].')
        return mesh.get_group()
    return mesh


class Bands:
    """The ranks that share an image, and how its levels are divided.

    One object for all layers of a model. A copy of the model has a copy of it, with the same ranks.

    Attributes:
        group: Their process group.
        rank: This rank, within the group.
        ranks: How many there are.
        image: Cuts of the image that is passing.
        levels: Cuts of its levels, as far as it has passed.
        cuts: Cuts of the map that convolutions work on now.
        traffic: What this rank has sent, by kind and bytes, while `recorded_traffic` asks for it.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.rank = dist.get_rank(group)
        self.ranks = dist.get_world_size(group)
        self.image: Cuts = ()
        self.levels: List[Cuts] = []
        self.cuts: Cuts = ()
        self.traffic: Optional[List[Tuple[str, int]]] = None
        self.watch = Watch.of(group)

    def __deepcopy__(self, memo: Dict[int, Any]) -> 'Bands':
        copy = memo[id(self)] = Bands(self.group)
        return copy

    def global_rank(self, rank: int) -> int:
        """Return the rank in the world of one of these."""
        return dist.get_global_rank(self.group, rank)

    def run(self, kind: str, sent: int, function: Callable[[], T]) -> T:
        """Run something that all ranks take part in.

        Args:
            kind: Its name.
            sent: Bytes of this rank's part.
            function: What to run.

        Raises:
            RuntimeError: A rank was lost; the message names it.
        """
        if self.traffic is not None:
            self.traffic.append((kind, sent))
        try:
            return function()
        except RuntimeError as error:
            lost = self.watch.explain()
            if lost is None:
                raise
            raise RuntimeError(f'{lost} Rank {dist.get_rank()} was in {kind}.') from error

    @contextmanager
    def recorded_traffic(self) -> Iterator[List[Tuple[str, int]]]:
        """Collect what this rank sends within: (kind, bytes) of each call."""
        self.traffic = []
        try:
            yield self.traffic
        finally:
            self.traffic = None

    def all_reduce(self, x: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
        """Return a reduction over all ranks, without a gradient."""
        x = x.detach().clone(memory_format=torch.contiguous_format)
        self.run('all_reduce', num_bytes(x), lambda: dist.all_reduce(x, op, group=self.group))
        return x

    def gather_numbers(self, numbers: Sequence[int], device: torch.device) -> List[List[int]]:
        """Return some integers of every rank, as many of each."""
        mine = torch.tensor(numbers, dtype=torch.int64, device=device)
        all_of_them = [torch.empty_like(mine) for _ in range(self.ranks)]
        self.run('all_gather', num_bytes(mine), lambda: dist.all_gather(all_of_them, mine, group=self.group))
        return [each.tolist() for each in all_of_them]

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Return the first rank's tensor."""
        source = self.global_rank(0)
        self.run('broadcast', num_bytes(x), lambda: dist.broadcast(x, source, group=self.group))
        return x


def num_bytes(x: torch.Tensor) -> int:
    """Return how much a tensor's values take."""
    return x.numel() * x.element_size()


def all_reduce_sum(x: torch.Tensor, bands: Bands) -> torch.Tensor:
    """Return the sum over all ranks."""
    return _AllReduceSum.apply(x, bands)


class _AllReduceSum(torch.autograd.Function):
    """The sum over ranks, whose derivative is one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bands: Bands) -> torch.Tensor:
        ctx.bands = bands
        return bands.all_reduce(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        return _AllReduceSum.apply(grad, ctx.bands), None


def exchange_rows(
        x: torch.Tensor,
        bands: Bands,
        dim: int,
        have: Spans,
        need: Spans,
        pad: Tuple[int, int] = (0, 0),
) -> torch.Tensor:
    """Return the rows that this rank needs of a map whose rows lie on several ranks.

    Args:
        x: The rows that this rank has.
        bands: The ranks.
        dim: Dimension of rows.
        have: The rows that each rank has; no row is on two.
        need: The rows that each rank needs.
        pad: Rows of zeros to add before and after them.
    """
    return _ExchangeRows.apply(x, bands, dim, have, need, pad)


class _ExchangeRows(torch.autograd.Function):
    """`exchange_rows`; its transpose adds up what overlaps."""

    @staticmethod
    def forward(
            ctx: Any,
            x: torch.Tensor,
            bands: Bands,
            dim: int,
            have: Spans,
            need: Spans,
            pad: Tuple[int, int],
    ) -> torch.Tensor:
        ctx.settings = bands, dim, have, need, pad
        return send_rows(x, bands, dim, have, need, pad)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        bands, dim, have, need, pad = ctx.settings
        grad = grad.narrow(dim, pad[0], grad.shape[dim] - sum(pad))
        return _ExchangeRows.apply(grad, bands, dim, need, have, (0, 0)), None, None, None, None, None


def send_rows(
        x: torch.Tensor,
        bands: Bands,
        dim: int,
        have: Spans,
        need: Spans,
        pad: Tuple[int, int],
) -> torch.Tensor:
    """Send rows from where they are to where they are needed, and add up those that come from several ranks."""
    (start, stop), (first, last) = have[bands.rank], need[bands.rank]
    shape = list(x.shape)
    shape[dim] = pad[0] + max(0, last - first) + pad[1]
    out = x.new_zeros(shape)
    inner = out.narrow(dim, pad[0], max(0, last - first))

    messages, sent, parts = [], 0, []
    for peer in range(bands.ranks):
        low, high = overlap((start, stop), need[peer])
        if low < high and peer != bands.rank:
            part = x.narrow(dim, low - start, high - low).contiguous()
            messages.append(dist.P2POp(dist.isend, part, bands.global_rank(peer), bands.group))
            sent += num_bytes(part)
        low, high = overlap(have[peer], (first, last))
        if low < high:
            target = inner.narrow(dim, low - first, high - low)
            if peer == bands.rank:
                part = x.narrow(dim, low - start, high - low)
            else:
                part = torch.empty_like(target, memory_format=torch.contiguous_format)
                messages.append(dist.P2POp(dist.irecv, part, bands.global_rank(peer), bands.group))
            parts.append((target, part))

    def communicate() -> None:
        for work in dist.batch_isend_irecv(messages):
            work.wait()

    if messages:
        bands.run('exchange_rows', sent, communicate)
    for target, part in parts:  # in the order of ranks: sums are the same every time
        target.add_(part)
    return out
