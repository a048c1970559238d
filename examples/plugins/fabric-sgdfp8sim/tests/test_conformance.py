"""What fabric-core expects of a plugin and of a precision, against a loop that rounds by hand."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fabric_core.testing import ManifestConformance, PrecisionConformance


def rounded(x: Tensor) -> Tensor:
    """The nearest numbers of the format; the gradient is that of ``x``."""
    return x.detach().clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) + (x - x.detach())


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(rounded(x), rounded(layer.weight), layer.bias)


class TestManifest(ManifestConformance):
    distribution = "fabric-sgdfp8sim"


class TestSimulatedFP8(PrecisionConformance):
    name = "sgdfp8sim"

    def plain_forward(self, module: nn.Module, inputs: Tensor) -> Tensor:
        for layer in filter(lambda layer: isinstance(layer, nn.Linear), module.modules()):
            layer.forward = partial(linear, layer)
        output: Tensor = module(inputs)
        return output
