"""A backward pass on the CPU before the device is there."""

import torch

from fabric_core import Fabric, SetupError

torch.ones(1, requires_grad=True).sum().backward()
try:
    Fabric(accelerator="tpu", devices=1).launch()
except SetupError as error:
    print(error)
