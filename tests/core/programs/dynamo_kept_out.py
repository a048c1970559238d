"""Trains, compiles and looks around, with the compiler kept out or not, and prints what it saw as JSON.

The two runs have to print the same but for ``loaded``: what had loaded ``torch._dynamo`` by when.
"""

from __future__ import annotations

import copy
import inspect
import io
import json
import pickle
import sys
import warnings
from typing import Any

from fabric_core.without_dynamo import keep_dynamo_out

keep_dynamo_out()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

seen: dict[str, Any] = {}
loaded: dict[str, bool] = {}


def note(event: str) -> None:
    loaded[event] = "torch._dynamo" in sys.modules


def numbers(module: torch.nn.Module) -> list[list[float]]:
    return [parameter.detach().flatten().tolist() for parameter in module.parameters()]


class MySGD(torch.optim.SGD):
    """Overrides the step, and calls the one above."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class MyOwn(torch.optim.Optimizer):
    """Has a step that is decorated with nothing."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=group["lr"])


def optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    classes = {name: cls for name, cls in vars(torch.optim).items() if inspect.isclass(cls)}
    return {
        **{n: c for n, c in classes.items() if issubclass(c, torch.optim.Optimizer)},
        "MySGD": MySGD,
        "MyOwn": MyOwn,
    }


def train_with(cls: type[torch.optim.Optimizer]) -> list[list[float]]:
    """Every method of an optimizer, a copy of it and its state included."""
    torch.manual_seed(3)
    model = torch.nn.Linear(4, 3, bias=False)
    optimizer = cls(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    if cls is not torch.optim.LBFGS:  # whose copies cannot step, in PyTorch either
        optimizer = pickle.loads(pickle.dumps(copy.deepcopy(optimizer)))
        model.weight = optimizer.param_groups[0]["params"][0]

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        closure()
        optimizer.step(closure)
        optimizer.load_state_dict(optimizer.state_dict())
    scheduler.step()
    optimizer.zero_grad(set_to_none=False)
    return numbers(model)


def look_at_optimizers() -> None:
    for name, cls in optimizers().items():
        if name not in ("Optimizer", "SparseAdam"):
            seen[name] = train_with(cls)
            note(name)


def look_at_hooks() -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters())
    order: list[str] = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: order.append("pre")),
        optimizer.register_step_post_hook(lambda *_: order.append("post")),
        optimizer.register_state_dict_post_hook(lambda *_: order.append("state")),
    ]
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.state_dict()
    for handle in handles:
        handle.remove()
    with torch.autograd.profiler.profile() as profile:
        optimizer.step()
        optimizer.zero_grad()
    seen["hooks"] = order
    seen["profiled"] = sorted(event.name for event in profile.function_events if "Optimizer" in event.name)
    seen["grad_mode"] = torch.is_grad_enabled()
    try:
        optimizer.step(lambda: 1 / 0)
    except ZeroDivisionError:
        seen["grad_mode_after_an_error"] = torch.is_grad_enabled()
    note("hooks")


def look_at_ddp() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.manual_seed(5)
    model = DistributedDataParallel(torch.nn.Linear(3, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        with model.no_sync():
            model(torch.ones(1, 3)).sum().backward()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    seen["ddp"] = numbers(model)
    seen["ddp's reducer"] = model._use_python_reducer
    seen["ddp's signature"] = str(inspect.signature(DistributedDataParallel))
    note("ddp")
    for _ in range(2):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    saved = io.BytesIO()
    torch.save({"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    saved.seek(0)
    torch.load(saved)
    torch.amp.GradScaler("cpu")
    note("the rest of a training")


def look_at_fsdp() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(11)
    model = fully_shard(torch.nn.Linear(3, 3), mesh=init_device_mesh("cpu", (1,)))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    seen["fsdp"] = [parameter.full_tensor().flatten().tolist() for parameter in model.parameters()]
    note("fsdp")


def look_at_the_compiler() -> None:
    """After which nothing may tell that it was kept out."""
    torch._dynamo.reset()
    note("the compiler")
    seen["mode"] = torch._dynamo.utils.get_optimize_ddp_mode()
    torch.manual_seed(7)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    stepped = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        compiled(torch.ones(2, 4)).sum().backward()
        stepped()
        optimizer.zero_grad()

    @torch.compile(backend="eager")
    def whole(inputs: torch.Tensor) -> torch.Tensor:
        loss = model(inputs).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return torch.compiler.disable(lambda: loss.detach())()

    for _ in range(2):
        seen["loss"] = whole(torch.ones(2, 4)).item()
    seen["compiled"] = numbers(model)
    counters = torch._dynamo.utils.counters
    seen["graphs"] = dict(counters["stats"])
    seen["breaks"] = sorted(reason.partition("\n")[0] for reason in counters["graph_break"])
    ddp = torch.compile(DistributedDataParallel(torch.nn.Linear(3, 3)), backend="eager")
    ddp(torch.ones(1, 3)).sum().backward()


def look_at_pytorch() -> None:
    """What the functions are that were changed meanwhile."""
    train_with(torch.optim.SGD)
    for name in ("state_dict", "load_state_dict", "zero_grad", "add_param_group"):
        function = torch.optim.Optimizer.__dict__[name].__wrapped__
        seen[name] = vars(function)["__dynamo_disable"].__qualname__
    for name, cls in optimizers().items():
        seen[f"{name}.step"] = code_places(cls.step)
    seen["DistributedDataParallel"] = code_places(DistributedDataParallel.__init__)
    seen["found"] = [
        name for name in ("torch.distributed", "torch.fx.passes") if "__getattr__" in vars(sys.modules[name])
    ]
    seen["finders"] = [repr(finder) for finder in sys.meta_path if "fabric" in repr(finder)]


def code_places(function: Any) -> list[str]:
    places = []
    while function is not None:
        code = getattr(function, "__code__", None)
        places.append("" if code is None else f"{code.co_filename}:{code.co_firstlineno}")
        function = getattr(function, "__wrapped__", None)
    return places


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    look_at_optimizers()
    look_at_hooks()
    look_at_ddp()
    look_at_fsdp()
    look_at_the_compiler()
    look_at_pytorch()
    dist.destroy_process_group()
    sys.stdout.write(json.dumps({"seen": seen, "loaded": loaded}))
