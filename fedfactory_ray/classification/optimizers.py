"""torch's optimisers as they are without `torch.compile`, which no fit uses: the wrappers that hide them from it import
torch._dynamo, 1.7 s of CPU in every process that fits."""

from __future__ import annotations

from inspect import unwrap

import torch
from torch.optim import Optimizer


class Plain(Optimizer):
    """The methods that all optimisers share, unwrapped."""

    add_param_group = unwrap(Optimizer.add_param_group)
    zero_grad = unwrap(Optimizer.zero_grad)
    state_dict = unwrap(Optimizer.state_dict)
    load_state_dict = unwrap(Optimizer.load_state_dict)


class SGD(Plain, torch.optim.SGD):
    """Stochastic gradient descent, see torch."""

    step = torch.no_grad()(unwrap(torch.optim.SGD.step))


class AdamW(Plain, torch.optim.AdamW):
    """Loshchilov and Hutter 2019, see torch."""

    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))
