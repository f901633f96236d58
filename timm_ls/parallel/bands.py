"""Where the bands of an image and of its levels lie: arithmetic that all ranks do alike.

A map's rows are divided by its cuts: rank `r` of `R` holds rows `cuts[r]` to `cuts[r + 1]`, `cuts[R]` is the height.
"""
from typing import Sequence, Tuple

from ..ops.capture import ceil_div

__all__ = ['BandSize', 'Cuts', 'Spans', 'even_cuts', 'level_cuts', 'overlap', 'spans', 'strided_cuts']

Cuts = Tuple[int, ...]
Spans = Tuple[Tuple[int, int], ...]  # first row and row after the last, of each rank; they may overlap


class BandSize(Tuple[int, int]):
    """Rows and columns of a rank's band, as blocks take the size of a map, which knows where the band lies."""

    cuts: Cuts

    @classmethod
    def of(cls, cuts: Cuts, rank: int, width: int) -> 'BandSize':
        """Return the size of a rank's band."""
        size = cls((cuts[rank + 1] - cuts[rank], width))
        size.cuts = cuts
        return size


def spans(cuts: Cuts) -> Spans:
    """Return the rows of each rank."""
    return tuple(zip(cuts, cuts[1:]))


def overlap(a: Tuple[int, int], b: Tuple[int, int]) -> Tuple[int, int]:
    """Return the rows that are in both; the second is not larger than the first if there are none."""
    return max(a[0], b[0]), min(a[1], b[1])


def even_cuts(height: int, ranks: int, unit: int) -> Cuts:
    """Divide rows as evenly as whole units allow; by single rows where there are too few units for all ranks."""
    return nearest_cuts([height * rank for rank in range(ranks)], ranks, height, unit)


def level_cuts(image_cuts: Cuts, reduction: int, height: int, unit: int) -> Cuts:
    """Divide a level of the pyramid where the image is divided, to the nearest whole unit.

    Args:
        image_cuts: Of the image.
        reduction: The level's stride in the image.
        height: Rows of the level.
        unit: Rows that had better stay together, those of a window.
    """
    return nearest_cuts(image_cuts[:-1], reduction, height, unit)


def nearest_cuts(numerators: Sequence[int], denominator: int, height: int, unit: int) -> Cuts:
    """Return the cuts nearest to some fractions of rows, at whole units, or else at rows, one for each rank at least.

    Raises:
        ValueError: There are fewer rows than ranks.
    """
    ranks = len(numerators)
    if height < ranks:
        raise ValueError(
            f'A map of {height} rows cannot be divided over {ranks} ranks: each needs one at every level. Take larger'
            ' images or fewer ranks.')
    step = unit * denominator
    cuts = (0, *(min(height, (2 * n + step) // (2 * step) * unit) for n in numerators[1:]), height)
    if all(start < stop for start, stop in spans(cuts)):
        return cuts
    rows = [0]
    for rank, n in enumerate(numerators[1:], start=1):
        nearest = (2 * n + denominator) // (2 * denominator)
        rows.append(min(max(nearest, rows[-1] + 1), height - (ranks - rank)))
    return (*rows, height)


def strided_cuts(cuts: Cuts, stride: int) -> Cuts:
    """Return the cuts of what a map becomes with a stride: a row goes to the rank that holds its center."""
    return tuple(ceil_div(cut, stride) for cut in cuts)
