"""The canary: a digest of little work done as modules are trained and drawn from, by which processes are told apart.

Processors, libraries' versions and variables that nobody thought of choose kernels, and kernels choose bytes. Processes
of different canaries make different bytes. That equal ones make equal bytes is likely, not proven: a kernel may be
chosen by the size of its input.
"""

from __future__ import annotations

import hashlib
from functools import cache

import torch
from torch import Tensor, nn

from fedfactory_ray.cluster.devices import autocast
from fedfactory_ray.generation.edm import sample_sigma
from fedfactory_ray.generation.samplers import dpmpp, karras_sigmas
from fedfactory_ray.generation.unet import Denoiser
from fedfactory_ray.settings.sections import GeneratorConfig

NETWORK = GeneratorConfig(channels=(16, 32), attention_levels=(1,), prediction="gaussian", components=16)
SIDE, IMAGES, SEED = 16, 8, 0


def canary(device: torch.device, precision: str) -> str:
    """SHA-256, in hexadecimal, of what this process computes on `device` in `precision`, with the threads that torch
    has: gradients of one training step of a small network with attention, and the images that it draws after it.

    Computed once a process. Torch's global generators are left as they were.
    """
    return _canary(device, precision, torch.get_num_threads())


def joined(*canaries: str) -> str:
    """The canaries of processes that did parts of one piece of work: one where all agree. Empty ones count too."""
    return "+".join(sorted({each for canary in canaries for each in canary.split("+")}))


@cache
def _canary(device: torch.device, precision: str, threads: int) -> str:
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if on_cuda else []):
        torch.default_generator.manual_seed(SEED)
        if on_cuda:
            torch.cuda.manual_seed(SEED)
        work = compute(device, precision)
    digest = hashlib.sha256()
    for tensor in work:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def compute(device: torch.device, precision: str) -> list[Tensor]:
    """The work, float32 each: gradients of all parameters, and images (n, 1, S, S). Seeds no global generator."""
    draw = torch.Generator(device).manual_seed(SEED)
    images = torch.rand((IMAGES, 1, SIDE, SIDE), generator=draw, device=device) * 2 - 1
    network = Denoiser(NETWORK, 1, SIDE)
    nn.init.xavier_uniform_(network.unet.conv_out.weight)  # it starts at 0, and no gradient would pass
    network = network.to(device)
    network.fit_statistics(images)
    data, sigma = network.standardise(images), sample_sigma(IMAGES, NETWORK.noise_mean, NETWORK.noise_std, draw)
    noise = torch.randn(data.shape, generator=draw, device=device)
    parameters: list[Tensor] = [*network.parameters()]
    with autocast(device, precision):
        loss = network.loss(data, sigma, noise)
    # No optimiser: to import one costs a second where images are drawn, and it computes element by element.
    gradients = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        torch._foreach_add_(parameters, gradients, alpha=-NETWORK.learning_rate)

    def denoise(x: Tensor, level: Tensor) -> Tensor:
        with autocast(device, precision):
            return network(x, level.to(device, torch.float32).expand(len(x)))

    with torch.inference_mode():
        drawn = dpmpp(denoise, noise * 40.0, karras_sigmas(2, 0.01, 40.0, 7.0))
    return [*gradients, network.restore(drawn)]
