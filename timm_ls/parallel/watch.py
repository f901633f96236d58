"""Who is still there: a heartbeat of every rank, by which an error can name the rank that was lost."""
import threading
import time
from typing import ClassVar, Dict, List, Optional

import torch.distributed as dist

from .._compat import default_store

__all__ = ['Watch']

PERIOD = 1.  # seconds from beat to beat


class Watch:
    """A thread that tells the others, through the store of the process groups, that this rank is alive.

    A rank that waits for others is alive; one whose process ended or is stopped is not.
    """

    of_groups: ClassVar[Dict[dist.ProcessGroup, 'Watch']] = {}

    def __init__(self, group: dist.ProcessGroup):
        self.ranks: List[int] = dist.get_process_group_ranks(group)
        self.store = dist.PrefixStore('timm_ls/alive', default_store())
        self.verdict: Optional[str] = None  # who was lost, as soon as somebody has found out
        if len(self.ranks) > 1:
            self.beat()
            threading.Thread(target=self.keep_beating, daemon=True).start()

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> 'Watch':
        """Return the one of a group."""
        if group not in cls.of_groups:
            cls.of_groups[group] = cls(group)
        return cls.of_groups[group]

    def beat(self) -> None:
        """Say that this rank is alive, and hear who is not."""
        self.store.add(str(dist.get_rank()), 1)
        if self.verdict is None and self.store.check(['verdict']):
            self.verdict = self.store.get('verdict').decode()

    def keep_beating(self) -> None:
        """Say it until the store is gone."""
        while dist.is_initialized():
            try:
                self.beat()
            except (RuntimeError, ValueError):
                return
            time.sleep(PERIOD)

    def beats(self) -> List[int]:
        """Return how often each rank has said that it is alive."""
        return [self.store.add(str(rank), 0) for rank in self.ranks]

    def explain(self) -> Optional[str]:
        """Return what is wrong if ranks were lost, None if all are alive.

        The first who finds out tells the others, and leaves them the time to hear it: they lose it in turn when it ends
        with its error, and perhaps the store with it.
        """
        if len(self.ranks) == 1:
            return None
        try:
            before = self.beats()
            for _ in range(3):
                if self.verdict is not None:
                    return self.verdict
                time.sleep(PERIOD)
            lost = [rank for rank, old, new in zip(self.ranks, before, self.beats()) if old == new]
            if lost and self.verdict is None:
                names = f'Rank {lost[0]} was' if len(lost) == 1 else f'Ranks {", ".join(map(str, lost))} were'
                self.store.set('verdict', f'{names} lost, of ranks {self.ranks} that share an image.')
                time.sleep(2 * PERIOD)
                self.beat()
        except RuntimeError:
            if self.verdict is None:
                return 'The store of the process groups was lost, and with it who holds it, rank 0 or torchrun.'
        return self.verdict
