"""The checks of a precision: number formats, the passes through a model, and the scaling of losses."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from fabric_core import Fabric
from fabric_core.contracts.precision import Precision
from fabric_core.registry import Offer, default_registry
from fabric_core.testing.conformance import PartConformance
from fabric_core.testing.needs import need_plan
from fabric_core.testing.programs import small_training
from fabric_core.testing.programs.small_training import CLIPPED, loss_of
from fabric_core.testing.ranks import on_ranks


class PrecisionConformance(PartConformance):
    """Checks of a precision.

    A subclass states its table of number formats; what it leaves out is float32, or follows from the others. Formats
    are ``torch.dtype`` objects or their names.

    Attributes:
        weights: What ``setup`` makes of a model in float32. float32 by default.
        buffers: The same of its buffers. As the weights by default.
        inputs: What the model gets when it is called with float32. As the weights by default.
        computes: What a matrix product of the model's inputs and weights comes out as. As the weights by default.
        outputs: What the user gets back. By default the wider of ``computes`` and float32.
        made: The format of new tensors within ``init_context``. As the weights by default.
        scales_loss: Whether losses are scaled, by which the other checks of a scale are asked for.
        growth_within: After how many good steps a scale has grown, at the latest. 2000 by default, as PyTorch has it.
        most: The largest difference to the plain computation, relative to the largest value that is compared, and in
            trainings to how far the parameters moved. By default 8 units in the last place of ``computes``.
        strategy: Under which strategy it is found and trains, where it is for certain ones only; ``"auto"`` by default.
        accelerator: Which device it trains on; ``"cpu"`` by default. Where there is none, checks are skipped.
    """

    kind = "precision"

    weights: ClassVar[torch.dtype | str] = torch.float32
    buffers: ClassVar[torch.dtype | str | None] = None
    inputs: ClassVar[torch.dtype | str | None] = None
    computes: ClassVar[torch.dtype | str | None] = None
    outputs: ClassVar[torch.dtype | str | None] = None
    made: ClassVar[torch.dtype | str | None] = None
    scales_loss: ClassVar[bool] = False
    growth_within: ClassVar[int] = 2000
    most: ClassVar[float | None] = None
    strategy: ClassVar[str] = "auto"
    accelerator: ClassVar[str] = "cpu"

    def plain_forward(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """The plain computation that losses and gradients are compared with, in PyTorch alone.

        By default the model in ``weights``; under ``torch.autocast`` where ``computes`` is a half precision and the
        weights are not.

        Args:
            module: A model in float32, of its own.
            inputs: In float32.
        """
        weights, computes = self._weights, self._computes
        context: Any = nullcontext()
        if computes is not weights and computes in (torch.float16, torch.bfloat16):
            context = torch.autocast(inputs.device.type, computes)
        with context:
            output: Tensor = module.to(weights)(inputs.to(weights))
        return output.to(self._outputs)

    @classmethod
    def find(cls) -> Offer:
        """The offer that is for the strategy; where none was stated, the one that is for any."""
        registry = default_registry()
        offers = registry.named(cls.kind, cls.name)
        fitting = [offer for offer in offers if cls.strategy in _scope(offer)]
        return registry.only(fitting or [offer for offer in offers if not _scope(offer)] or offers, cls.name)

    # -- the table of formats -------------------------------------------------------------------------------------

    def test_weights_have_the_stated_format(self) -> None:
        """After ``setup``, which leaves the names and the number of parameters as they are."""
        module = _Everything()
        names = list(module.state_dict())
        with self._ready() as precision:
            converted = precision.convert_module(module)
        found = {name: value.dtype for name, value in converted.named_parameters()}
        assert list(converted.state_dict()) == names, "the conversion renames parameters or buffers"
        assert set(found.values()) == {self._weights}, f"the weights are {found}, not {self._weights}"

    def test_buffers_have_the_stated_format_and_counters_stay_counters(self) -> None:
        """A buffer of integers (how many batches were seen) must not become a float, which stops counting."""
        with self._ready() as precision:
            converted = precision.convert_module(_Everything())
        found = {name: value.dtype for name, value in converted.named_buffers()}
        wanted = self._dtype(self.buffers, self._weights)
        assert found["norm.num_batches_tracked"] is torch.int64, "a counter was converted"
        assert found["norm.running_mean"] is wanted, f"buffers are {found['norm.running_mean']}, not {wanted}"

    def test_new_tensors_have_the_stated_format(self) -> None:
        """What is made within ``init_context``, and afterwards the default is what it was."""
        wanted = self._dtype(self.made, self._weights)
        with self._ready() as precision:
            with precision.init_context():
                tensor, layer = torch.ones(2, device=self._device), nn.Linear(2, 2)
            assert tensor.dtype is wanted, f"a new tensor is {tensor.dtype}, not {wanted}"
            assert layer.weight.dtype is wanted, f"a new layer is {layer.weight.dtype}, not {wanted}"
            assert torch.ones(1).dtype is torch.float32, "after init_context, new tensors are still converted"

    def test_inputs_computation_and_outputs_have_the_stated_formats(self) -> None:
        """What the model gets, what it computes in, what the user gets back, and what the loss is."""
        seen: list[torch.dtype] = []

        class Spy(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                result = super().forward(x)
                seen.extend((x.dtype, result.dtype))
                return result

        with self._ready() as precision:
            module = precision.convert_module(Spy(4, 4)).to(self._device)
            output = precision.wrap_forward(module)(torch.ones(2, 4, device=self._device))
        wanted = (self._dtype(self.inputs, self._weights), self._computes, self._outputs)
        assert (*seen, output.dtype) == wanted, "what the model gets, computes in, and gives back"
        assert output.mean().dtype is self._outputs

    def test_collections_of_inputs_keep_their_form_and_what_is_no_float(self) -> None:
        """Token ids, masks, texts and ``None`` reach the model as they are, however deep they lie."""
        ids, mask, number = torch.tensor([1, 2]), torch.tensor([True, False]), torch.ones(2)
        given = {"ids": ids, "deep": [("text", None, 3, mask), {"x": number}], "empty": []}
        with self._ready() as precision:
            found = precision.convert_input(given)
        assert found["ids"].dtype is torch.int64, "integers were converted"
        assert found["deep"][0][3].dtype is torch.bool, "a mask was converted"
        assert found["deep"][0][:3] == ("text", None, 3), "what is no tensor was changed"
        assert isinstance(found["deep"][0], tuple), "a tuple became something else"
        assert found["empty"] == []
        assert found["deep"][1]["x"].dtype is self._dtype(self.inputs, self._weights)
        assert torch.equal(found["ids"], ids), "integers were changed"
        assert number.dtype is torch.float32, "the caller's own tensor was changed"

    def test_collections_of_outputs_keep_their_form_and_what_is_no_float(self) -> None:
        """Likewise on the way back."""
        given = {"best": torch.tensor([3]), "deep": [(torch.ones(2, dtype=self._computes), None)]}
        with self._ready() as precision:
            found = precision.convert_output(given)
        assert found["best"].dtype is torch.int64, "integers were converted"
        assert found["deep"][0][0].dtype is self._outputs
        assert found["deep"][0][1] is None

    # -- passes through a model -----------------------------------------------------------------------------------

    def test_an_exception_in_a_forward_pass_comes_out_and_leaves_nothing_behind(self) -> None:
        """It is the same object; and neither autocast nor the default dtype of PyTorch outlives the pass."""
        failure = RuntimeError("the model fails")

        def forward(_: Tensor) -> Tensor:
            raise failure

        with self._ready() as precision:
            before = _global_state(self._device)
            with pytest.raises(RuntimeError) as raised:
                precision.wrap_forward(forward)(torch.ones(1, device=self._device))
            assert raised.value is failure, "the exception of a forward pass is replaced"
            assert _global_state(self._device) == before, (
                "a failed forward pass leaves a state of PyTorch changed"
            )
            for context in (precision.forward_context, precision.init_context):
                with pytest.raises(RuntimeError), context():
                    raise failure
                assert _global_state(self._device) == before, (
                    f"{context.__name__} leaves a state of PyTorch changed"
                )

    def test_a_forward_pass_restores_the_state_of_pytorch(self) -> None:
        """The state of autocast, the default dtype and whether gradients are recorded; also with passes in passes."""
        with self._ready() as precision:
            before = _global_state(self._device)
            inner = precision.wrap_forward(lambda x: x * 2)
            outer = precision.wrap_forward(lambda x: inner(x) + 1)
            with torch.no_grad():
                outer(torch.ones(1, device=self._device))
                assert not torch.is_grad_enabled(), "a forward pass turns the recording of gradients on"
            assert _global_state(self._device) == before, "a forward pass leaves a state of PyTorch changed"
            with precision.forward_context(), precision.forward_context():
                inside = _global_state(self._device)
            with precision.forward_context():
                assert _global_state(self._device) == inside, "contexts are not fresh: the second differs"

    def test_gradients_equal_the_plain_computation(self) -> None:
        """Loss, output and the gradient of every parameter, at true size."""
        inputs, targets = (part.to(self._device) for part in small_training.batches()[0])
        plain = small_training.model().to(self._device)
        expected = self.plain_forward(plain, inputs)
        loss_of(expected, targets).backward()  # type: ignore[no-untyped-call]
        with self._ready() as precision:
            trained = _Trained(precision, self._device)
            output = trained.output(inputs)
            trained.backward(loss_of(output, targets))
            precision.unscale_gradients(trained.optimizer)
            self._compare("the output", output, expected)
            for (name, mine), theirs in zip(
                trained.module.named_parameters(), plain.parameters(), strict=True
            ):
                assert mine.grad is not None, f"{name} has no gradient"
                assert mine.grad.dtype is mine.dtype, f"the gradient of {name} is {mine.grad.dtype}"
                self._compare(f"the gradient of {name}", mine.grad, theirs.grad)

    def test_steps_equal_the_plain_loop(self) -> None:
        """Several steps with two optimizers, of which each is told of its own parameters only."""
        with self._ready() as precision:
            trained = _Trained(precision, self._device, optimizers=2)
            plain = small_training.model().to(self._device)
            self.plain_forward(plain, small_training.batches()[0][0].to(self._device))  # which converts it
            steps = _optimizers(plain, 2)
            for inputs, targets in small_training.batches():
                inputs, targets = inputs.to(self._device), targets.to(self._device)
                loss_of(self.plain_forward(plain, inputs), targets).backward()  # type: ignore[no-untyped-call]
                trained.backward(loss_of(trained.output(inputs), targets))
                for optimizer in steps:
                    optimizer.step()
                    optimizer.zero_grad()
                trained.step()
            for (name, mine), theirs in zip(
                trained.module.named_parameters(), plain.parameters(), strict=True
            ):
                self._compare(f"{name} after {small_training.STEPS} steps", mine, theirs)

    def test_it_is_torn_down_twice_without_complaint(self) -> None:
        """It is, where a job fails while it is closed."""
        with self._ready() as precision:
            precision.teardown()
            precision.teardown()

    # -- the scale of the losses ----------------------------------------------------------------------------------

    def test_it_scales_losses_exactly_where_it_says_so(self) -> None:
        """``scales_loss`` decides whether a bare ``loss.backward()`` is refused."""
        with self._ready() as precision:
            trained = _Trained(precision, self._device)
            assert precision.scales_loss is self.scales_loss, "its scales_loss is not what the class states"
            assert (trained.scale() != 1.0) is self.scales_loss, f"a loss of 1 becomes {trained.scale()}"

    def test_an_overflow_skips_the_step_and_lowers_the_scale(self) -> None:
        """A step with infinite gradients would ruin the weights; a scale that stays would skip every step."""
        with self._scaling() as trained:
            before, weights = trained.scale(), trained.weights()
            assert trained.overflow() is None, "the step of an overflow returns something"
            assert _equal(weights, trained.weights()), "a step with infinite gradients changes the weights"
            assert trained.scale() < before, (
                f"the scale is {trained.scale()} after an overflow, and was {before}"
            )

    def test_a_skipped_step_leaves_the_optimizer_as_it_was(self) -> None:
        """Its momentum and its count of steps, too."""
        with self._scaling() as trained:
            trained.good_step()
            before = _flat_state(trained.optimizer)
            trained.overflow()
            assert _flat_state(trained.optimizer) == before, (
                "a skipped step changes the state of the optimizer"
            )

    def test_good_steps_raise_the_scale(self) -> None:
        """A scale that only ever falls loses more and more small gradients."""
        with self._scaling() as trained:
            before = trained.scale()
            for _ in range(self.growth_within):
                trained.good_step()
            after = trained.scale()
            assert after > before, f"after {self.growth_within} good steps the scale is still {after}"

    def test_the_state_of_the_scale_survives_a_restart(self) -> None:
        """Saved in a checkpoint and loaded into a fresh one, the next steps are the same to the last bit."""
        with self._scaling() as first, self._scaling() as second:
            first.overflow()
            first.good_step()
            file = io.BytesIO()
            torch.save([each.state_dict() for each in (first.precision, first.module, first.optimizer)], file)
            file.seek(0)
            of_precision, of_module, of_optimizer = torch.load(file, weights_only=True)
            assert second.scale() != first.scale(), (
                "the scale has not changed, so that nothing could be restored"
            )
            second.precision.load_state_dict(of_precision)
            second.module.load_state_dict(of_module)
            second.optimizer.load_state_dict(of_optimizer)
            assert second.scale() == first.scale(), "the scale is not what was saved"
            restored = repr(second.precision.state_dict())
            assert restored == repr(of_precision), f"of the state {of_precision}, only {restored} is restored"
            for trained in (first, second):
                trained.good_step()
                trained.overflow()
                trained.good_step()
            assert second.scale() == first.scale(), "the scale takes another way after a restart"
            assert _equal(first.weights(), second.weights()), "the weights take another way after a restart"
            assert repr(first.precision.state_dict()) == repr(second.precision.state_dict())

    def test_its_state_fits_into_a_checkpoint_and_into_a_fresh_one(self) -> None:
        """It is saved in every checkpoint, also where it is empty."""
        with self._ready() as precision:
            file = io.BytesIO()
            torch.save(precision.state_dict(), file)
        file.seek(0)
        with self._ready() as other:
            other.load_state_dict(torch.load(file, weights_only=True))
            assert repr(other.state_dict()) == repr(precision.state_dict()), (
                "its state is not what was loaded"
            )

    def test_gradients_are_unscaled_exactly_once_before_they_are_clipped(self) -> None:
        """Clipping looks at their true size; whoever clips twice, or steps afterwards, must not shrink them again."""
        inputs, targets = (part.to(self._device) for part in small_training.batches()[0])
        with self._scaling() as trained, self._scaling() as other:
            for each in (trained, other):
                each.backward(loss_of(each.output(inputs), targets))
            precision = trained.precision
            precision.unscale_gradients(trained.optimizer)
            once = trained.gradients()
            precision.unscale_gradients(trained.optimizer)
            assert _equal(once, trained.gradients()), "unscaling twice divides the gradients twice"
            trained.step()
            other.step()
            assert _equal(trained.weights(), other.weights()), (
                "a step after unscaling differs from one without"
            )

    # -- trainings ------------------------------------------------------------------------------------------------

    def test_a_training_by_name_equals_the_plain_loop(self) -> None:
        """One process, with clipping, through every verb that a loop uses."""
        self._need_device()
        if self.strategy == "auto":
            with _quiet(), Fabric(**self._flags(1)) as fabric:
                fabric.launch()
                trained = small_training.train(fabric, most=CLIPPED)
        else:
            need_plan(self.strategy, self.accelerator, 1)
            trained = self._on_ranks(1)[0]
        self._compare_training(trained)

    def test_a_training_by_name_on_two_processes_equals_the_plain_loop(self) -> None:
        """Each takes half of every batch."""
        self._need_device()
        need_plan(self.strategy, self.accelerator, 2)
        for trained in self._on_ranks(2):
            self._compare_training(trained)

    # -- how it is asked ------------------------------------------------------------------------------------------

    @property
    def _weights(self) -> torch.dtype:
        return self._dtype(self.weights, torch.float32)

    @property
    def _computes(self) -> torch.dtype:
        return self._dtype(self.computes, self._weights)

    @property
    def _outputs(self) -> torch.dtype:
        return self._dtype(self.outputs, torch.promote_types(self._computes, torch.float32))

    @property
    def _most(self) -> float:
        return 8 * torch.finfo(self._computes).eps if self.most is None else self.most

    @property
    def _device(self) -> torch.device:
        offer = default_registry().one("accelerator", self.accelerator)
        from fabric_core.testing.parts import made

        device: torch.device = made(offer, {}).device(0)
        return device

    def _dtype(self, stated: torch.dtype | str | None, otherwise: torch.dtype) -> torch.dtype:
        if stated is None:
            return otherwise
        dtype = stated if isinstance(stated, torch.dtype) else getattr(torch, stated, None)
        assert isinstance(dtype, torch.dtype), (
            f"{type(self).__name__} states {stated!r}, which is no dtype of PyTorch"
        )
        return dtype

    def _need_device(self) -> None:
        from fabric_core.resolve.hardware import probed

        self.make()
        found = probed(default_registry().one("accelerator", self.accelerator)).inventory
        if not found.available:
            pytest.skip(f"there is no {self.accelerator} here: {found.note}")

    @contextmanager
    def _ready(self) -> Iterator[Any]:
        """A new one, attached to its device."""
        self._need_device()
        precision = self.make()
        precision.attach(self._device)
        with _quiet():
            yield precision
        precision.teardown()

    @contextmanager
    def _scaling(self) -> Iterator[_Trained]:
        if not self.scales_loss:
            pytest.skip("it does not scale losses")
        with self._ready() as precision:
            yield _Trained(precision, self._device)

    def _compare(self, what: str, mine: Tensor, theirs: Tensor | None) -> None:
        assert theirs is not None
        mine, theirs = mine.detach().double(), theirs.detach().double()
        scale = max(theirs.abs().max().item(), torch.finfo(torch.float32).tiny)
        differ = (mine - theirs).abs().max().item() / scale
        assert math.isfinite(differ), f"{what} is not finite"
        assert differ <= self._most, (
            f"{what} differs by {differ:.1e} of its size, and {self._most:.1e} is allowed"
        )

    def _flags(self, devices: int) -> dict[str, Any]:
        name = f"{self.name.partition('@')[0]}"
        flags: dict[str, Any] = {"accelerator": self.accelerator, "devices": devices, "precision": name}
        if self.strategy != "auto":
            flags["strategy"] = self.strategy
        return {**flags, "precision_options": dict(self.options)} if self.options else flags

    def _on_ranks(self, processes: int) -> list[Any]:
        flags = self._flags(processes)
        program = "fabric_core.testing.programs.small_training"
        return on_ranks(program, {"fabric": flags, "most": CLIPPED}, processes=processes)

    def _compare_training(self, trained: Mapping[str, Any]) -> None:
        plain, began = small_training.model(), small_training.model().state_dict()
        steps = None
        losses = []
        for inputs, targets in small_training.batches():
            loss = loss_of(self.plain_forward(plain, inputs), targets)
            steps = steps or small_training.optimizer(plain)  # now that the weights are what they will be
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(plain.parameters(), CLIPPED)
            steps.step()
            steps.zero_grad()
            losses.append(loss.item())
        assert trained["losses"] == pytest.approx(losses, rel=self._most), "losses differ from the plain loop"
        end = plain.state_dict()
        far = max(_difference(value, began[name]) for name, value in end.items())
        differ = max(_difference(trained["parameters"][name], value) for name, value in end.items())
        assert differ <= self._most * far, f"parameters moved by {far:.1e}, and differ by {differ:.1e}"


class _Everything(nn.Module):
    """Weights, buffers of floats, and one that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)


class _Trained:
    """A model under a precision, as ``Fabric`` would train it."""

    def __init__(self, precision: Precision, device: torch.device, optimizers: int = 1) -> None:
        self.precision = precision
        self.module = precision.convert_module(small_training.model()).to(device)
        self.optimizers = _optimizers(self.module, optimizers)
        for optimizer in self.optimizers:
            precision.setup_optimizer(optimizer)
        self._forward = precision.wrap_forward(self.module)
        self._device = device

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.optimizers[0]

    def output(self, inputs: Tensor) -> Tensor:
        output: Tensor = self._forward(inputs)
        return output

    def backward(self, loss: Tensor) -> None:
        self.precision.scale_loss(loss).backward()  # type: ignore[no-untyped-call]

    def step(self) -> Any:
        answers = [self.precision.optimizer_step(each, each.step, None) for each in self.optimizers]
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        return answers[0]

    def scale(self) -> float:
        """By what a loss is multiplied now."""
        return float(self.precision.scale_loss(torch.ones((), device=self._device)))

    def good_step(self) -> None:
        """A step of which all gradients are finite, and none of them is small."""
        self.backward(self._sum() / small_training.SMALL)
        self.step()

    def overflow(self) -> Any:
        """A step of which one gradient is infinite."""
        self.backward(self._sum() / small_training.SMALL)
        next(iter(self.module.parameters())).grad.fill_(math.inf)  # type: ignore[union-attr]
        return self.step()

    def _sum(self) -> Tensor:
        return torch.stack([parameter.sum() for parameter in self.module.parameters()]).sum()

    def weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.module.parameters()]

    def gradients(self) -> list[Tensor]:
        return [
            parameter.grad.clone() for parameter in self.module.parameters() if parameter.grad is not None
        ]


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max())


def _optimizers(module: Any, count: int) -> list[torch.optim.Optimizer]:
    if count == 1:
        return [small_training.optimizer(module)]
    return [small_training.optimizer(module.first), small_training.optimizer(module.last)]


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


def _flat_state(optimizer: torch.optim.Optimizer) -> str:
    return repr(optimizer.state_dict())


def _global_state(device: torch.device) -> tuple[Any, ...]:
    kind = device.type
    return (
        torch.is_autocast_enabled(kind),
        torch.get_autocast_dtype(kind),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
    )


def _scope(offer: Offer) -> tuple[str, ...]:
    spec: Any = offer.spec
    return tuple(name.lower() for name in spec.strategies)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
