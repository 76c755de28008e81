"""Batch normalizations as long training leaves them, and worse: what folding has to get right."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def roughen_batch_norms(model: nn.Module, seed: int = 0) -> None:
    """Moves every batch normalization off its defaults: a fourth of its gammas negative and, where it has eight
    channels or more, an eighth exactly zero; betas of either sign; means and variances of their own."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.affine and module.running_mean is not None:
            gamma = 0.5 + torch.rand(module.num_features, generator=generator)
            order = torch.randperm(module.num_features, generator=generator)
            gamma[order[: -(-module.num_features // 4)]] *= -1
            module.weight.copy_(gamma)
            module.bias.normal_(0, 0.3, generator=generator)
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    zero_some_gammas(model, seed)


@torch.no_grad()
def zero_some_gammas(model: nn.Module, seed: int = 0) -> None:
    """Sets an eighth of every batch normalization's gammas to exactly zero, as pruning does; after training, which
    moves such gammas off zero again."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.affine:
            order = torch.randperm(module.num_features, generator=generator)
            module.weight[order[: module.num_features // 8]] = 0
