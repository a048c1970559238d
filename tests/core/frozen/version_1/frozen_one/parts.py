"""The parts: each method of version 1 of its contract, written out, and noted when it is called."""

import functools
import json
import os
import pickle
from contextlib import contextmanager, nullcontext
from pathlib import Path

import click
import torch

from fabric_core import (
    Accelerator,
    CheckpointError,
    CheckpointIO,
    ClusterEnvironment,
    ConfigurationError,
    Launcher,
    LaunchError,
    Logger,
    Precision,
    RankFailedError,
    Strategy,
)

CALLS = set()


def noted(method):
    """Note the call of a method."""

    @functools.wraps(method)
    def call(*args, **kwargs):
        CALLS.add(method.__qualname__)
        return method(*args, **kwargs)

    return call


class FrozenDevice(Accelerator):
    """The CPU."""

    process_group_backend = None
    binds_process_group = False
    process_group_timeout = 60.0

    @noted
    def device(self, index):
        return torch.device("cpu")

    @noted
    def setup_device(self, device):
        assert device == torch.device("cpu")

    @noted
    def move_batches(self, batches, move, device):
        for batch in batches:
            yield move(batch)

    @noted
    def teardown(self):
        pass


class Through(torch.nn.Module):
    """What forward passes go through."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class FrozenStrategy(Strategy):
    """One process on one device."""

    joint_setup = False
    owns_backward = False
    forward_only = False

    def __init__(self, patience=1):
        self.patience = patience

    @noted
    def attach(self, surroundings):
        super().attach(surroundings)
        self.environment = surroundings.cluster_environment
        assert (surroundings.processes_per_node, surroundings.num_nodes) == (1, 1)

    @property
    @noted
    def root_device(self):
        return self.surroundings.devices[0]

    @property
    @noted
    def world_size(self):
        return self.environment.world_size()

    @property
    @noted
    def global_rank(self):
        return self.environment.global_rank()

    @property
    @noted
    def local_rank(self):
        return self.environment.local_rank()

    @property
    @noted
    def node_rank(self):
        return self.environment.node_rank()

    @property
    @noted
    def store(self):
        return None

    @noted
    def connect(self):
        self.surroundings.accelerator.setup_device(self.root_device)

    @noted
    def module_init_context(self, empty_init=None):
        return torch.device(self.root_device)

    @noted
    def move_module(self, module):
        module.to(self.root_device)

    @noted
    def setup_module(self, module):
        return Through(module)

    @noted
    def setup_optimizer(self, optimizer):
        return optimizer

    @noted
    def setup_module_and_optimizers(self, module, optimizers, scheduler=None):
        return self.setup_module(module), [self.setup_optimizer(each) for each in optimizers], scheduler

    @property
    @noted
    def sampler_arguments(self):
        return {"num_replicas": 1, "rank": 0}

    @property
    @noted
    def loader_device(self):
        return self.root_device

    @noted
    def move_batches(self, batches, move):
        return self.surroundings.accelerator.move_batches(batches, move, self.root_device)

    @noted
    def backward(self, loss, module, *args, **kwargs):
        loss.backward(*args, **kwargs)

    @noted
    def optimizer_step(self, optimizer, step, closure):
        return self.surroundings.precision.optimizer_step(optimizer, step, closure)

    @noted
    def hold_gradient_sync(self, module):
        return nullcontext()

    @noted
    def accumulation_context(self, module, is_last):
        return super().accumulation_context(module, is_last)

    @noted
    def zero_gradients(self, optimizer, zero_grad, *args, **kwargs):
        zero_grad(*args, **kwargs)

    @noted
    def scale_gradients(self, module, factor):
        super().scale_gradients(module, factor)

    @noted
    def clip_gradients_norm(self, module, parameters, max_norm, norm_type=2.0, error_if_nonfinite=True):
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite)

    @noted
    def clip_gradients_value(self, module, parameters, clip_value):
        torch.nn.utils.clip_grad_value_(parameters, clip_value)

    @noted
    def barrier(self, name=None):
        pass

    @noted
    def broadcast(self, obj, src=0):
        return obj

    @noted
    def all_gather(self, tensor, group=None, sync_grads=False):
        return tensor.unsqueeze(0)

    @noted
    def all_reduce(self, tensor, op="mean", group=None):
        return tensor.clone()

    @noted
    def module_state_dict(self, module):
        return module.state_dict()

    @noted
    def load_module_state_dict(self, module, state, strict=True):
        module.load_state_dict(state, strict=strict)

    @noted
    def optimizer_state_dict(self, optimizer):
        return optimizer.state_dict()

    @noted
    def load_optimizer_state_dict(self, optimizer, state):
        optimizer.load_state_dict(dict(state))

    @noted
    def save_checkpoint(self, path, checkpoint):
        self.surroundings.checkpoint_io.save(path, checkpoint)

    @noted
    def load_checkpoint(self, path, *, weights_only=True):
        return self.surroundings.checkpoint_io.load(path, weights_only=weights_only)

    @noted
    def plain_value(self, value):
        return value

    @noted
    def teardown(self):
        pass


def each_tensor(data, convert):
    """The same collection with its floating-point tensors converted."""
    if isinstance(data, torch.Tensor):
        return convert(data) if data.is_floating_point() else data
    if isinstance(data, dict):
        return {key: each_tensor(value, convert) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return type(data)(each_tensor(value, convert) for value in data)
    return data


class FrozenDouble(Precision):
    """Weights and computation in float64, results in float32, losses times four."""

    scales_loss = True
    scale = 4.0
    unscaled = ()

    @noted
    def attach(self, device):
        super().attach(device)

    @noted
    def convert_module(self, module):
        return module.double()

    @noted
    def setup_optimizer(self, optimizer):
        pass

    @contextmanager
    def default_dtype(self):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    @noted
    def init_context(self):
        return self.default_dtype()

    @noted
    def forward_context(self):
        return self.default_dtype()

    @noted
    def convert_input(self, data):
        return each_tensor(data, torch.Tensor.double)

    @noted
    def convert_output(self, data):
        return each_tensor(data, torch.Tensor.float)

    @noted
    def wrap_forward(self, forward):
        return super().wrap_forward(forward)

    @noted
    def scale_loss(self, loss):
        return loss * self.scale

    @noted
    def unscale_gradients(self, optimizer):
        if optimizer not in self.unscaled:
            self.unscaled = (*self.unscaled, optimizer)
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad /= self.scale

    @noted
    def optimizer_step(self, optimizer, step, closure):
        self.unscale_gradients(optimizer)
        self.unscaled = ()
        return step() if closure is None else step(closure)

    @noted
    def state_dict(self):
        return {"scale": self.scale}

    @noted
    def load_state_dict(self, state_dict):
        self.scale = state_dict["scale"]

    @noted
    def teardown(self):
        pass


class FrozenCluster(ClusterEnvironment):
    """Ranks from the variables of the launcher."""

    @property
    @noted
    def creates_processes_externally(self):
        return "FROZEN_RANK" in os.environ

    @property
    def main_address(self):
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self):
        return int(os.environ.get("MASTER_PORT", "29500"))

    @noted
    def world_size(self):
        return int(os.environ.get("FROZEN_SIZE", "1"))

    @noted
    def global_rank(self):
        return int(os.environ.get("FROZEN_RANK", "0"))

    @noted
    def local_rank(self):
        return self.global_rank()

    @noted
    def node_rank(self):
        return 0

    @property
    def listen_fd(self):
        return None

    @property
    def single_node(self):
        return True

    def shared_store(self, timeout):
        return None

    @property
    @noted
    def requeue_requested(self):
        return False

    def accept_requeue(self):
        raise ConfigurationError("Nobody starts it again.")

    @noted
    def join(self):
        pass

    @noted
    def validate(self, processes_per_node, num_nodes):
        super().validate(processes_per_node, num_nodes)

    @noted
    def teardown(self):
        pass


class FrozenLauncher(Launcher):
    """One forked process."""

    @noted
    def launch(self, function, job):
        if job.num_processes != 1 or job.num_nodes != 1:
            raise LaunchError("frozen_launcher starts one process.")
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            self.run(function, writer)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            answer = pipe.read()
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code != 0:
            raise RankFailedError(f"rank 0 failed: {answer.decode()}", rank=0, exit_code=code)
        return pickle.loads(answer)

    def run(self, function, writer):
        """What the child does: it never returns."""
        variables = {"RANK": 0, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "NODE_RANK": 0, "WORLD_SIZE": 1}
        os.environ.update({name: str(value) for name, value in variables.items()})
        os.environ.update(FROZEN_RANK="0", FROZEN_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
        try:
            answer, code = pickle.dumps(function()), 0
        except BaseException as error:
            answer, code = f"{type(error).__name__}: {error}".encode(), 1
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(answer)
        os._exit(code)


class FrozenFile(CheckpointIO):
    """One file, that is there whole or not at all."""

    @noted
    def save(self, path, checkpoint):
        path = Path(path)
        part = path.with_name(f"{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(dict(checkpoint), part)
            os.replace(part, path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be written: {error}") from error

    @noted
    def load(self, path, *, weights_only=True):
        try:
            return torch.load(path, map_location="cpu", weights_only=weights_only)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    @noted
    def remove(self, path):
        Path(path).unlink(missing_ok=True)

    @noted
    def teardown(self):
        pass


class FrozenLog(Logger):
    """Lines of JSON."""

    def __init__(self, path="metrics.jsonl"):
        self.path = path
        self.lines = []

    @property
    def name(self):
        return "frozen"

    @noted
    def log_metrics(self, metrics, step=None):
        self.lines.append({"step": step, **metrics})

    @noted
    def log_hyperparams(self, params):
        self.lines.append(dict(params))

    @noted
    def save(self):
        Path(self.path).write_text("".join(f"{json.dumps(line)}\n" for line in self.lines), encoding="utf-8")

    @noted
    def finalize(self, status):
        self.lines.append({"status": status})
        self.save()

    @noted
    def teardown(self):
        pass


@click.command()
def thaw():
    """Say that nothing has thawed."""
    click.echo("nothing has thawed")
