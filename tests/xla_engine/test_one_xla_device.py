"""One XLA device in this process: what lazy tensors demand of a strategy, and all the verbs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dropping_out
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fabric_core import CheckpointError, ConfigurationError, Fabric, OptionsError, SetupError, WrongTypeError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch_xla")


@pytest.fixture
def fabric() -> Iterator[Any]:
    with Fabric(accelerator="tpu", devices=1) as fabric:
        yield fabric


def compilations() -> int:
    import torch_xla.debug.metrics as metrics

    found = metrics.metric_data("CompileTime")
    return 0 if found is None else int(found[0])


class Tied(nn.Module):
    """Two layers with one weight, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last.weight = self.first.weight
        self.register_buffer("steps", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x)))


def test_the_flags_mean_one_device_of_xla(fabric: Any) -> None:
    assert fabric.plan.strategy.name == "xla"
    assert fabric.plan.precision.spec.target_name == "fabric_xla.precisions.full:XLAFullPrecision"
    assert fabric.plan.launcher is None
    assert (fabric.device, fabric.world_size, fabric.global_rank) == (torch.device("xla:0"), 1, 0)


def test_parameters_stay_the_same_objects_and_shared_weights_stay_shared(fabric: Any) -> None:
    plain = Tied()
    before = dict(plain.named_parameters())
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    model, optimizer = fabric.setup(plain, optimizer)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert model.first.weight is model.last.weight
    assert {p.device.type for p in optimizer.param_groups[0]["params"]} == {"xla"}
    assert model.steps.device.type == "xla"
    start = model.first.weight.cpu().clone()
    fabric.backward(model(torch.ones(2, 4, device=fabric.device)).square().sum())
    optimizer.step()
    assert not torch.equal(model.first.weight.cpu(), start)


def test_an_optimizer_that_has_collected_state_goes_on_with_it(fabric: Any) -> None:
    def steps(model: nn.Module, optimizer: Any, device: Any, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(torch.arange(8.0, device=device).reshape(2, 4)).square().mean().backward()
            optimizer.step()

    torch.manual_seed(3)
    here, there = nn.Linear(4, 4), nn.Linear(4, 4)
    there.load_state_dict(here.state_dict())
    for model in (here, there):
        model.optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        steps(model, model.optimizer, "cpu", 3)
    steps(here, here.optimizer, "cpu", 3)
    model, optimizer = fabric.setup(there, there.optimizer)
    steps(model, optimizer, fabric.device, 3)
    assert (model.weight.cpu() - here.weight).abs().max() < 1e-6


def test_optimizers_may_be_set_up_apart(fabric: Any) -> None:
    plain = nn.Linear(4, 2)
    early = torch.optim.SGD([plain.weight], lr=0.1)
    model = fabric.setup_module(plain)
    late = torch.optim.SGD([model.bias], lr=0.1)
    early, late = fabric.setup_optimizers(early, late)
    start = {name: value.cpu().clone() for name, value in model.state_dict().items()}
    fabric.backward(model(torch.ones(1, 4, device=fabric.device)).sum())
    early.step()
    late.step()
    for name, value in model.state_dict().items():
        assert torch.allclose(value.cpu(), start[name] - 0.1), name


def test_no_graph_is_compiled_twice_and_none_grows(fabric: Any) -> None:
    model = nn.Linear(4, 2)
    model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters(), lr=0.01))
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(torch.randn(40, 4)), batch_size=4))
    compiled = []
    for (batch,) in loader:
        fabric.backward(model(batch).square().mean())
        fabric.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=False)
        optimizer.step()
        optimizer.zero_grad()
        compiled.append(compilations())
    assert compiled[3:] == [compiled[3]] * 7
    evaluated = []
    with torch.no_grad():
        total = torch.zeros((), device=fabric.device)
        for (batch,) in loader:
            total += model(batch).sum()
            evaluated.append(compilations())
    assert evaluated[2:] == [evaluated[2]] * 8, "without an optimizer, each batch ends a step"


def test_batches_come_to_the_device_in_order(fabric: Any) -> None:
    data = TensorDataset(torch.arange(12.0).reshape(6, 2), torch.arange(6))
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=2))
    seen = [(inputs, labels) for inputs, labels in loader]
    assert {tensor.device.type for pair in seen for tensor in pair} == {"xla"}
    assert torch.cat([labels for _, labels in seen]).tolist() == [0, 1, 2, 3, 4, 5]
    assert loader.device == torch.device("xla:0")


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
def test_clipping_is_that_of_pytorch(fabric: Any, norm_type: float) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(4, 3)
    inputs = torch.randn(5, 4)
    plain(inputs).square().sum().backward()
    expected = torch.linalg.vector_norm(
        torch.cat([p.grad.reshape(-1) for p in plain.parameters()]), norm_type
    )
    factor = min(1.0, 0.5 / (float(expected) + 1e-6))
    gradients = [p.grad * factor for p in plain.parameters()]
    twin = nn.Linear(4, 3)
    twin.load_state_dict(plain.state_dict())
    model, optimizer = fabric.setup(twin, torch.optim.SGD(twin.parameters(), lr=0.1))
    fabric.backward(model(inputs.to(fabric.device)).square().sum())
    norm = fabric.clip_gradients(model, optimizer, max_norm=0.5, norm_type=norm_type)
    assert norm.shape == ()
    assert abs(norm.item() - float(expected)) < 1e-4
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.allclose(parameter.grad.cpu(), gradient, atol=1e-6)


def test_a_norm_that_is_not_finite_is_an_error_unless_told_otherwise(fabric: Any) -> None:
    model = nn.Linear(2, 1)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    fabric.backward((model(torch.ones(1, 2, device=fabric.device)) * torch.inf).sum())
    with pytest.raises(RuntimeError, match=r"norm of order 2\.0 .* cannot be clipped"):
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
    norm = fabric.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=False)
    assert not torch.isfinite(norm.cpu())


def test_a_closure_is_called_by_the_step(fabric: Any) -> None:
    model = nn.Linear(2, 1)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.5))
    start = model.bias.cpu().clone()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(4, 2, device=fabric.device)).mean()
        fabric.backward(loss)
        return loss

    first, second = (optimizer.step(closure).item() for _ in range(2))
    assert torch.allclose(model.bias.cpu(), start - 1.0)
    assert abs(first - second - 1.5) < 1e-5


def test_holding_gradients_back_warns_once_and_changes_nothing(fabric: Any) -> None:
    model = nn.Linear(2, 1)
    model = fabric.setup(model)
    warned = pytest.warns(UserWarning, match="'xla' cannot hold back the synchronisation")
    with warned, fabric.no_backward_sync(model):
        fabric.backward(model(torch.ones(1, 2, device=fabric.device)).sum())
    with fabric.no_backward_sync(model):
        fabric.backward(model(torch.ones(1, 2, device=fabric.device)).sum())
    assert model.weight.grad.cpu().tolist() == [[2.0, 2.0]]


def test_the_verbs_between_ranks_answer_for_one(fabric: Any) -> None:
    tensor = torch.arange(3.0, device=fabric.device)
    assert fabric.all_gather(tensor).cpu().tolist() == [[0.0, 1.0, 2.0]]
    assert fabric.all_reduce(tensor, reduce_op="sum").cpu().tolist() == [0.0, 1.0, 2.0]
    assert fabric.all_reduce({"loss": 2}, reduce_op="mean")["loss"].item() == 2.0
    assert fabric.broadcast({"a": [1, tensor]})["a"][1] is tensor
    fabric.barrier("here")
    with fabric.rank_zero_first():
        pass


def test_random_numbers_of_the_device_follow_the_seed(fabric: Any) -> None:
    def draw() -> list[float]:
        return torch.rand(4, device=fabric.device).cpu().tolist()

    fabric.seed_everything(5)
    first = draw()
    assert draw() != first
    fabric.seed_everything(5)
    assert draw() == first
    fabric.seed_everything(6)
    assert draw() != first


def test_a_checkpoint_holds_nothing_of_xla_and_comes_back(fabric: Any, tmp_path: Path) -> None:
    plain = Tied()
    model, optimizer = fabric.setup(plain, torch.optim.Adam(plain.parameters(), lr=0.1))
    fabric.backward(model(torch.ones(2, 4, device=fabric.device)).sum())
    optimizer.step()
    path = tmp_path / "new" / "last.ckpt"
    lazy = torch.ones(2, device=fabric.device) * 3
    fabric.save(path, {"model": model, "optimizer": optimizer, "step": 1, "more": [lazy]})
    loaded = torch.load(path, weights_only=True)
    assert loaded["more"][0].tolist() == [3.0, 3.0]
    devices = {t.device.type for t in loaded["model"].values()}
    devices |= {t.device.type for own in loaded["optimizer"]["state"].values() for t in own.values()}
    assert devices == {"cpu"}
    saved = model.first.weight.cpu().clone()
    with torch.no_grad():
        model.first.weight.zero_()
    rest = fabric.load(path, {"model": model, "optimizer": optimizer})
    assert torch.equal(model.first.weight.cpu(), saved)
    assert model.first.weight.device.type == "xla"
    assert rest["step"] == 1
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        fabric.load(tmp_path / "none.ckpt")


def test_the_format_of_xla_moves_what_others_leave_on_the_device(tmp_path: Path) -> None:
    from fabric_xla.checkpoint_io import XLAFile

    path = tmp_path / "x.ckpt"
    XLAFile().save(path, {"a": torch.arange(3, device="xla:0") + 1, "b": "text"})
    assert torch.load(path, weights_only=True)["a"].tolist() == [1, 2, 3]
    assert XLAFile().load(path)["b"] == "text"
    XLAFile().remove(path)
    assert not path.exists()


def test_models_are_created_on_the_device(fabric: Any) -> None:
    with fabric.init_module():
        model = nn.Linear(4, 4)
    with fabric.init_tensor():
        tensor = torch.ones(2)
    assert model.weight.device.type == tensor.device.type == "xla"
    with fabric.init_module(empty_init=True):
        nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("precision", "weights", "inside"),
    [
        ("32-true", torch.float32, torch.float32),
        (32, torch.float32, torch.float32),
        ("bf16-mixed", torch.float32, torch.bfloat16),
        ("bf16", torch.float32, torch.bfloat16),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
        ("16-true", torch.float16, torch.float16),
    ],
)
def test_a_precision_means_what_it_means_everywhere(precision: Any, weights: Any, inside: Any) -> None:
    seen = []

    class Net(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output = super().forward(x)
            seen.append((output.dtype, torch.ones(1, device=x.device).dtype))
            return output

    with Fabric(accelerator="tpu", devices=1, precision=precision) as fabric:
        assert fabric.plan.precision.spec.target_name.startswith("fabric_xla.")
        plain = Net(4, 2)
        model, optimizer = fabric.setup(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
        output = model(torch.ones(3, 4, device=fabric.device))
        fabric.backward(output.sum())
        optimizer.step()
        assert model.weight.dtype == model.weight.grad.dtype == weights
        assert seen == [(inside, weights)]
        assert output.dtype == torch.float32
        with fabric.init_module():
            assert nn.Linear(1, 1).weight.dtype == weights
    assert torch.get_default_dtype() == torch.float32


def test_how_a_tpu_multiplies_can_be_said() -> None:
    from torch_xla.backends import get_mat_mul_precision, set_mat_mul_precision

    before = get_mat_mul_precision()
    try:
        with Fabric(accelerator="tpu", devices=1, precision_options={"matmul": "highest"}) as fabric:
            fabric.launch()
            assert get_mat_mul_precision() == "highest"
    finally:
        set_mat_mul_precision(before)


def test_a_resumed_training_is_bit_for_bit_one_that_was_never_interrupted(tmp_path: Path) -> None:
    found = dropping_out.compare(lambda: Fabric(accelerator="tpu", devices=1), tmp_path)
    assert found["differences"] == {"saved": [], "3": [], "4": [], "5": []}
    assert found["steps"] == {"saved": 8, "3": 5, "4": 4, "5": 3}


def test_random_numbers_do_not_depend_on_how_often_something_is_computed(fabric: Any, tmp_path: Path) -> None:
    def draw(between: Callable[[], object]) -> list[float]:
        fabric.seed_everything(5)
        drawn = []
        for _ in range(3):
            drawn.append(torch.rand(2, device=fabric.device))
            between()
        return torch.cat(drawn).tolist()

    model = fabric.setup(nn.Linear(2, 1))
    alone = draw(lambda: None)
    for between in (
        lambda: fabric.save(tmp_path / "x", {"model": model}),
        lambda: fabric.load(tmp_path / "x", {"model": model}),
        lambda: list(fabric.setup_dataloaders(DataLoader(TensorDataset(torch.ones(4, 2))))),
    ):
        assert draw(between) == alone


def test_every_state_of_the_random_numbers_can_be_saved_and_restored(fabric: Any) -> None:
    fabric.launch()
    accelerator = fabric.strategy.surroundings.accelerator
    for number in (0, 1, 2**63 - 1, 2**63, 2**64 - 1):
        accelerator.set_rng_state(torch.tensor([number], dtype=torch.uint64), fabric.device)
        state = accelerator.rng_state(fabric.device)
        drawn = torch.rand(2, device=fabric.device).tolist()
        accelerator.set_rng_state(state, fabric.device)
        assert torch.rand(2, device=fabric.device).tolist() == drawn


def test_a_save_beside_the_training_copies_and_goes_on(fabric: Any, tmp_path: Path) -> None:
    plain = Tied()
    model, optimizer = fabric.setup(plain, torch.optim.Adam(plain.parameters(), lr=0.1))
    on_host = torch.ones(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fabric.save(tmp_path / "beside", {"model": model, "more": [on_host]}, wait=False)
    saved = model.first.weight.cpu().clone()
    on_host.zero_()
    fabric.backward(model(torch.ones(2, 4, device=fabric.device)).sum())
    optimizer.step()
    fabric.save(tmp_path / "gone" / "x", {"model": model}, wait=False)
    loaded = torch.load(tmp_path / "beside", weights_only=True)
    assert torch.equal(loaded["model"]["first.weight"], saved)
    assert loaded["more"][0].tolist() == [1.0, 1.0]
    fabric.wait_for_save()
    (tmp_path / "file").touch()
    fabric.save(tmp_path / "file" / "below", {"model": model}, wait=False)
    with pytest.raises(CheckpointError, match="whose save was begun with wait=False, was not written"):
        fabric.wait_for_save()


def test_sharded_parameters_are_in_pieces_here_and_whole_for_everybody_else(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain, expected = Tied(), Tied()
    expected.load_state_dict(plain.state_dict())
    with Fabric(accelerator="tpu", strategy="xla_fsdp", devices=1) as fabric:
        model, optimizer = fabric.setup(plain, torch.optim.Adam(plain.parameters(), lr=0.1))
        assert optimizer.param_groups[0]["params"][0].shape == (128,), "a piece, laid flat and filled up"
        assert list(model.state_dict()) == list(expected.state_dict())
        assert [name for name, _ in model.named_parameters()] == [
            name for name, _ in expected.named_parameters()
        ]
        assert (
            model.state_dict()["first.weight"][:16].cpu().tolist() == expected.first.weight.flatten().tolist()
        )
        assert model.device == fabric.device
        fabric.save(tmp_path / "model", {"model": model, "optimizer": optimizer})
        saved = fabric.load(tmp_path / "model")["model"]
        assert list(saved) == list(expected.state_dict())
        for name, value in expected.state_dict().items():
            assert torch.equal(saved[name], value), name
        with pytest.raises(CheckpointError, match=r"missing keys: .*steps"):
            torch.save({k: v for k, v in saved.items() if k != "steps"}, tmp_path / "part")
            fabric.load_raw(tmp_path / "part", model)
        with pytest.raises(CheckpointError, match=r"first.bias has the shape \(9,\), and here \(4,\)"):
            torch.save({**saved, "first.bias": torch.ones(9)}, tmp_path / "other")
            fabric.load_raw(tmp_path / "other", model)
    with pytest.raises(OptionsError, match="checkpoint"):
        Fabric(accelerator="tpu", strategy="xla_fsdp", devices=1, strategy_options={"checkpoint": "half"})


def test_a_sharded_model_learns_whatever_was_done_to_it_before() -> None:
    """torch_xla goes back to the values that a parameter had when it was last changed in place."""
    torch.manual_seed(0)
    reference = nn.Linear(4, 2)
    with Fabric(accelerator="tpu", strategy="xla_fsdp", devices=1) as fabric:
        with torch.device(fabric.device):
            plain = nn.Linear(4, 2)
        with torch.no_grad():
            for parameter, value in zip(plain.parameters(), reference.parameters(), strict=True):
                parameter.copy_(value)
        model, optimizer = fabric.setup(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
        inputs = torch.randn(8, 4)
        losses = []
        for _ in range(3):
            losses.append(model(inputs.to(fabric.device)).square().mean())
            fabric.backward(losses[-1])
            optimizer.step()
            optimizer.zero_grad()
        losses = [loss.item() for loss in losses]
    step = torch.optim.SGD(reference.parameters(), lr=0.1)
    for loss in losses:
        expected = reference(inputs).square().mean()
        assert abs(loss - expected.item()) < 1e-6
        expected.backward()
        step.step()
        step.zero_grad()


def test_sharding_may_hold_gradients_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    reference = copy.deepcopy(plain)
    with Fabric(
        accelerator="tpu",
        strategy="xla_fsdp",
        devices=1,
        strategy_options={"auto_wrap_policy": {nn.Linear}, "activation_checkpointing": nn.Linear},
    ) as fabric:
        model, optimizer = fabric.setup(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
        inputs = torch.ones(2, 4, device=fabric.device)
        with fabric.no_backward_sync(model):
            fabric.backward(model(inputs).sum())
        fabric.backward(model(inputs).sum())
        optimizer.step()
        fabric.save(tmp_path / "after", {"model": model})
        after = fabric.load(tmp_path / "after")["model"]
    step = torch.optim.SGD(reference.parameters(), lr=0.1)
    for _ in range(2):
        reference(torch.ones(2, 4)).sum().backward()
    step.step()
    for name, value in after.items():
        assert (value - reference.state_dict()[name]).abs().max() < 1e-6, name


def test_sharding_refuses_weights_that_torch_xla_cannot_shard() -> None:
    refused = pytest.raises(SetupError, match=r"float32 only, and the Linear has some in torch\.float16")
    with Fabric(accelerator="tpu", strategy="xla_fsdp", devices=1) as fabric, refused:
        fabric.setup(nn.Linear(2, 2).half())


def test_a_change_of_a_gradient_shows_in_its_version(fabric: Any) -> None:
    """By it, the strategy knows between processes which gradients are averages already."""
    model = fabric.setup(nn.Linear(2, 1))

    def backward() -> tuple[int, int]:
        fabric.backward(model(torch.ones(1, 2, device=fabric.device)).sum())
        return id(model.weight.grad), model.weight.grad._version

    first = backward()
    model.weight.grad.mul_(0.5)
    clipped = id(model.weight.grad), model.weight.grad._version
    second = backward()
    assert len({first, clipped, second}) == 3
    assert second[0] == first[0], "added up in place"


def test_the_collectives_are_there_in_torch_xla(fabric: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between how many processes they work cannot be tried here; that they take what they are given, can."""
    from torch_xla.core import xla_model as xm

    from fabric_xla import collectives

    monkeypatch.setenv("XLA_ALWAYS_ALLREDUCE", "1")
    fabric.launch()
    tensor = torch.tensor([1.0, 3.0], device=fabric.device)
    for op in ("mean", "sum", "min", "max", "product"):
        assert collectives.all_reduce(tensor, op).cpu().tolist() == [1.0, 3.0]
        assert collectives.all_reduce(tensor > 2, op).cpu().tolist() == [False, True]
    assert collectives.all_reduce(tensor.bfloat16()).dtype is torch.bfloat16
    with pytest.raises(ConfigurationError, match="There is no reduction 'men'. Did you mean 'mean'"):
        collectives.all_reduce(tensor, "men")
    assert collectives.all_gather(tensor > 2).cpu().tolist() == [[False, True]]
    mine = tensor.clone().requires_grad_()
    collectives.all_gather_with_gradient(mine).mul(2.0).sum().backward()
    assert mine.grad.cpu().tolist() == [2.0, 2.0]
    gradients = [torch.ones(3, device=fabric.device), torch.ones(2, 2, device=fabric.device)]
    collectives.average_(gradients)
    xm.collective_broadcast(gradients)
    assert gradients[1].cpu().tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert collectives.exchange("word", b"here") == [b"here"]
    collectives.barrier("name")
    sent = collectives.broadcast_object({"a": [tensor.bfloat16()], "b": "text"}, 0)
    assert (sent["a"][0].device, sent["a"][0].dtype) == (fabric.device, torch.bfloat16)
    with pytest.raises(WrongTypeError, match="it does not pickle"):
        collectives.broadcast_object(lambda: 0, 0)


@pytest.mark.parametrize("options", [{}, {"auto_wrap_policy": {nn.Linear}}], ids=["one part", "parts"])
def test_an_evaluation_leaves_nothing_behind_that_is_out_of_date(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """torch_xla keeps parameters whole after a forward pass that no backward pass follows."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    reference = copy.deepcopy(plain)
    inputs = torch.randn(3, 4)
    step = torch.optim.SGD(reference.parameters(), lr=0.1)
    with Fabric(accelerator="tpu", strategy="xla_fsdp", devices=1, strategy_options=options) as fabric:
        model, optimizer = fabric.setup(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
        there = inputs.to(fabric.device)
        fabric.save(tmp_path / "first", {"model": model})
        first = copy.deepcopy(reference.state_dict())

        def evaluated() -> float:
            with torch.no_grad():
                return float((model(there).cpu() - reference(inputs)).abs().max())

        assert evaluated() < 1e-6
        for _ in range(2):
            fabric.backward(model(there).square().sum())
            reference(inputs).square().sum().backward()
            evaluated()
            optimizer.step()
            step.step()
            optimizer.zero_grad()
            step.zero_grad()
            assert evaluated() < 1e-5, "after a step"
        fabric.load(tmp_path / "first", {"model": model})
        reference.load_state_dict(first)
        assert evaluated() < 1e-6, "after a checkpoint was loaded"
        with torch.no_grad():
            for parameter in (*model.parameters(), *reference.parameters()):
                parameter.mul_(0.5)
        assert evaluated() < 1e-6, "after a change in place"


def test_gradients_that_were_held_back_are_dropped_with_the_others(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(4, 2)
    reference = copy.deepcopy(plain)
    inputs = torch.ones(2, 4)
    with Fabric(accelerator="tpu", strategy="xla_fsdp", devices=1) as fabric:
        model, optimizer = fabric.setup(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
        with fabric.no_backward_sync(model):
            fabric.backward(model(inputs.to(fabric.device)).sum())
        optimizer.zero_grad()
        fabric.backward(model(inputs.to(fabric.device)).sum())
        optimizer.step()
        fabric.save(tmp_path / "after", {"model": model})
        after = fabric.load(tmp_path / "after")["model"]
        assert torch.equal(after["bias"], reference.bias - 0.1 * 2)
