"""The training passes of a step, on one process or shared out among several."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from gsem.distributed import current
from gsem.rng import seeded


def at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _Passes(nn.Module):
    """All passes of one draw in one call: DistributedDataParallel takes one call before each backward."""

    def __init__(self, network: Callable[[Tensor], Tensor]):
        super().__init__()
        self.network = network

    def forward(self, *images: Tensor) -> list[Tensor]:
        return [at_least_float32(self.network(x)) for x in images]


class TrainingPasses:
    """The passes whose gradients train `model`: images → logits, in float32 or float64.

    With several processes, each passes its rows of a batch, and the gradient is that of the mean over the batch. On one
    process nothing is communicated, and every method is a plain computation.

    Args:
        model: whose weights and statistics are trained.
        network: what runs: the model, or its compiled form.
    """

    def __init__(self, model: nn.Module, network: Callable[[Tensor], Tensor]):
        self.model, self.processes = model, current()
        self.run: nn.Module = _Passes(network)

    def __call__(self, *images: Tensor) -> list[Tensor]:
        """The logits of each of the batches `images`, in their order."""
        return self.run(*images)

    def join(self, x: Tensor) -> None:
        """From the first call on, gradients are averaged over the processes. `x`: any images, for a look at the model.

        The model is in train mode. Its weights and buffers become those of the first process.
        """
        if not self.processes.several or not isinstance(self.run, _Passes):
            return
        # A network may have weights for other uses. DistributedDataParallel looks for them at every step if it must.
        probe = copy.deepcopy(self.model)
        weights = [p for p in probe.parameters() if p.requires_grad]
        with seeded(0, x.device):
            grads = torch.autograd.grad(probe(x[:2]).sum(), weights, allow_unused=True)
        unused = self.processes.any(any(g is None for g in grads))
        self.run = self.processes.parallel(self.run, unused=unused)

    def of_draw(self, left: int) -> AbstractContextManager:
        """Around the passes of a draw, forward and backward, after which `left` more draws follow.

        Gradients are summed over the draws first, and after the last of them over the processes.
        """
        if not self.processes.several or left == 0:
            return nullcontext()
        return self.run.no_sync()  # type: ignore[operator]

    def mean(self, losses: Tensor, batch: int) -> Tensor:
        """Of the losses of this process's rows, the part whose mean over the processes is the mean over the batch."""
        if not self.processes.several:
            return losses.mean()
        return losses.sum() * (self.processes.size / batch)

    def agree(self, loss: Tensor, hits: Tensor, finite: Tensor, share: float) -> None:
        """After a step, what was computed on this process's rows becomes that of the batch, in place.

        Running statistics become the average over the processes, since the folded model reads them. (Those of a
        `SharedBatchNorm2d` are equal already, and layers in eval mode do not change theirs.)

        Args:
            loss: as `mean` gives it. hits: counts. finite: whether all is finite, which it then is on all processes.
            share: of the batch's images, those of this process.
        """
        if not self.processes.several:
            return
        layers = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.training]
        layers = [m for m in layers if not isinstance(m, nn.SyncBatchNorm)]
        statistics = [b for m in layers for b in m.buffers(recurse=False) if b.is_floating_point()]
        shares = [b * share for b in statistics]
        broken = (~finite).float()
        self.processes.sum_(loss, hits, broken, *shares)
        for b, mean in zip(statistics, shares, strict=True):
            b.copy_(mean)
        loss /= self.processes.size
        finite.copy_(broken == 0)
