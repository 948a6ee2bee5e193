"""Which trainable parameters no backward pass has reached, on any rank, at any ZeRO stage."""

import torch
from torch import nn

from gearshift.engine.cluster import distributed


class GradientWatch:
    """Watches a module's trainable parameters from its making to the first call of `unreached`.

    By hooks on the accumulation of gradients, which see what DeepSpeed then takes away: under ZeRO
    a parameter has no `.grad` after a backward pass, and its partition reads 0 where there never
    was one. Where an earlier layer multiplies by 0 a gradient of zeros still arrives and counts.
    """

    def __init__(self, module: nn.Module):
        trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self._names = [name for name, _ in trainable]
        self._reached: set[str] = set()
        self._hooks = [
            p.register_post_accumulate_grad_hook(lambda _, name=name: self._reached.add(name))
            for name, p in trainable
        ]

    def unreached(self, device: torch.device) -> list[str]:
        """Names, in the module's order; the same on all ranks. A collective.

        Ends the watch: later calls cost nothing and find nothing.
        """
        if not self._hooks:
            return []
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        here = torch.tensor([name in self._reached for name in self._names], device=device)
        anywhere = distributed.global_max(here.int()).bool().tolist()
        return [name for name, hit in zip(self._names, anywhere, strict=True) if not hit]
