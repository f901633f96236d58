"""The region-matching loss of EsViT, on the last map of a backbone.

Paper: `Efficient Self-supervised Vision Transformers for Representation Learning` - https://arxiv.org/abs/2106.09785

Trained by a loss on whole views alone, multi-stage models with sparse attention lose the correspondence between regions
that plain vision transformers show. This loss asks each region of a student's view for what the teacher says about the
region that is most like it in another view of the same image.
"""
from typing import List, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from lightly.models.modules.center import Center
from torch.utils.checkpoint import checkpoint

__all__ = ['RegionLoss', 'Regions', 'match_regions']


class Regions(NamedTuple):
    """One view of each image of a batch, region by region; views may differ in their number N of regions.

    Attributes:
        features: The last map of the backbone, [B, N, C].
        logits: What the head makes of each region, [B, N, K].
    """

    features: torch.Tensor
    logits: torch.Tensor


@torch.no_grad()
def match_regions(features: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return the index [B, N] of the region of `others` [B, M, C] with the largest cosine to each of `features`.

    Args:
        features: Regions of one view, [B, N, C].
        others: Regions of another view of the same images, [B, M, C].
    """
    return (F.normalize(features, dim=-1) @ F.normalize(others, dim=-1).mT).argmax(-1)


class RegionLoss(nn.Module):
    """Cross-entropy between the regions of the student's views and their matches in the teacher's.

    The teacher sees the first T views of each image, the student all S. For each pair of a teacher's view t and a
    student's view s != t, with features z and logits y of the regions i of s and j of t,

        L(t, s) = -1/N_s sum_i p_t[j*(i)] . log p_s[i],   j*(i) = argmax_j cos(z_s[i], z_t[j])
        p_t[j]  = softmax((y_t[j] - center) / teacher_temp)
        p_s[i]  = softmax(y_s[i] / student_temp)

    and the loss is the mean of L over images and pairs. The center follows the mean of y_t over the regions of all
    views, images and processes. Neither the teacher nor the match has a gradient.

    Computes in float32, in float64 if the logits are; call it outside of autocast.

    Args:
        output_dim: Logits K per region.
        student_temp: Temperature of the student.
        center_momentum: Share of the center that a step keeps.
    """

    def __init__(self, output_dim: int, student_temp: float = .1, center_momentum: float = .9):
        super().__init__()
        self.student_temp = student_temp
        self.center = Center((1, output_dim), momentum=center_momentum)

    def forward(self, student: List[Regions], teacher: List[Regions], teacher_temp: float) -> torch.Tensor:
        """Return the loss and update the center.

        Args:
            student: All views.
            teacher: The first of them, in the same order.
            teacher_temp: Temperature of the teacher.

        Raises:
            ValueError: No two views differ.
        """
        pairs = len(teacher) * len(student) - min(len(teacher), len(student))
        if pairs == 0:
            raise ValueError(
                f'Expected two views or more, got {len(teacher)} of the teacher and {len(student)} of the student.')
        outputs = [at_least_float32(view.logits.detach()) for view in teacher]
        targets = [
            Regions(view.features, ((y - self.center.value) / teacher_temp).softmax(-1))
            for view, y in zip(teacher, outputs)]
        # recomputed in the backward pass: several tensors of [B, N, K] for each view, where K is 65,536, fill a memory
        losses = [
            checkpoint(self.cross_entropy, view, targets[:s] + targets[s + 1:], use_reentrant=False)
            for s, view in enumerate(student)]
        self.center.update(torch.cat([y.flatten(0, 1) for y in outputs]))
        return torch.stack(losses).sum() / pairs

    def cross_entropy(self, view: Regions, targets: List[Regions]) -> torch.Tensor:
        """Return the sum over teacher's views t of L(t, s), mean over images, for one view s of the student.

        Args:
            view: The student's view.
            targets: The teacher's other views, p_t in place of logits.
        """
        y = at_least_float32(view.logits) / self.student_temp
        target = torch.zeros_like(y)
        for other in targets:
            match = match_regions(view.features, other.features)
            target += other.logits.gather(1, match[..., None].expand_as(y))
        return F.cross_entropy(y.flatten(0, 1), target.flatten(0, 1))


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Return `x` in float32, or as it is if it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
