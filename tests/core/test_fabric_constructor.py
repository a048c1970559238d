"""The constructor, coming and going, and everything that a Fabric says: on one process, with the core alone."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from fabric_core import (
    Accelerator,
    AcceleratorSpec,
    CheckpointIO,
    ClusterEnvironment,
    ConfigurationError,
    DevicesError,
    Fabric,
    Inventory,
    Launcher,
    LauncherSpec,
    LaunchJob,
    Logger,
    OptionsError,
    Plan,
    Precision,
    PrecisionSpec,
    Registry,
    SetupError,
    Strategy,
    StrategySpec,
    UnknownPluginError,
    UnsupportedError,
    WrongTypeError,
    hookimpl,
)
from fabric_core.parts.torch_file import TorchFile


class Many(Strategy):
    """A strategy with a process per device, none of which is started here."""

    def __init__(self, level: int = 1) -> None:
        self.level = level


class LaterLauncher(Launcher):
    """Starts nothing: it notes what it was asked for, and runs the function here, as if this were rank 0."""

    asked: list[tuple[int, int]]

    def __init__(self) -> None:
        self.asked = []

    def launch(self, function: Callable[[], Any], job: LaunchJob) -> Any:
        self.asked.append((job.num_processes, job.num_nodes))
        sizes = {"LOCAL_WORLD_SIZE": job.num_processes, "WORLD_SIZE": job.num_processes * job.num_nodes}
        ranks = {"RANK": 0, "LOCAL_RANK": 0, "NODE_RANK": 0, "FABRIC_LAUNCHED": 1}
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (sizes | ranks).items():
                patch.setenv(name, str(value))
            return function()


class FunctionLauncher(LaterLauncher):
    pass


class Tiny(Precision):
    pass


class Parts:
    """What a plugin distribution would offer."""

    @hookimpl
    def fabric_strategies(self) -> Iterator[StrategySpec]:
        yield StrategySpec("many", Many, supports=("*",), volunteers_for=("many",), launcher="later")
        yield StrategySpec("called", Many, supports=("*",), launcher="function")

    @hookimpl
    def fabric_launchers(self) -> Iterator[LauncherSpec]:
        yield LauncherSpec("later", LaterLauncher, interactive=True)
        yield LauncherSpec("function", FunctionLauncher, interactive=True, needs_function=True)

    @hookimpl
    def fabric_precisions(self) -> Iterator[PrecisionSpec]:
        yield PrecisionSpec("tiny", Tiny, aliases=("4",))


pytestmark = pytest.mark.usefixtures("core_alone")


@pytest.fixture
def _parts(core_alone: Registry) -> None:
    core_alone.register(Parts(), distribution="acme", version="1.0")


# -- what is chosen -----------------------------------------------------------------------------------------------


def test_the_core_alone_trains_on_one_cpu() -> None:
    fabric = Fabric()
    names = [choice.name for choice in fabric.plan]
    assert names == ["cpu", "single_device", "32-true", "local", "torch_file"]
    assert isinstance(fabric.plan, Plan)
    assert all(choice.reason for choice in fabric.plan)
    assert isinstance(fabric.accelerator, Accelerator)
    assert type(fabric.strategy).__name__ == "SingleDeviceStrategy"
    assert fabric.device == torch.device("cpu")
    assert (fabric.world_size, fabric.global_rank, fabric.local_rank, fabric.node_rank) == (1, 0, 0, 0)
    assert fabric.is_global_zero
    assert (fabric.callbacks, fabric.loggers) == ([], [])


@pytest.mark.parametrize("devices", [None, 0, "0", 1, "1", -1, "auto"], ids=repr)
def test_one_process_is_asked_for_in_many_ways(devices: Any) -> None:
    assert Fabric(devices=devices).world_size == 1


@pytest.mark.parametrize("devices", [[0], "0,", [1, 2], "1, 4"], ids=repr)
def test_a_cpu_has_no_indices(devices: Any) -> None:
    with pytest.raises(DevicesError, match="Ask for a count"):
        Fabric(accelerator="cpu", devices=devices)


@pytest.mark.parametrize("precision", [None, 32, "32", "32-true", " 32-TRUE "])
def test_full_precision_has_many_spellings(precision: Any) -> None:
    assert Fabric(precision=precision).plan.precision.name == "32-true"


def test_an_unknown_name_is_answered_with_those_that_there_are() -> None:
    with pytest.raises(
        UnknownPluginError, match=r"'singel_device'.*mean 'single_device'.*Installed: single_device"
    ):
        Fabric(strategy="singel_device")
    with pytest.raises(UnknownPluginError, match="fp12.*Installed: 32-true"):
        Fabric(precision="fp12")
    with pytest.raises(UnknownPluginError, match="gpux"):
        Fabric(accelerator="gpux")


@pytest.mark.parametrize("devices", ["two", -3, [0, 0], 1.5, True, "", [True], {}], ids=repr)
def test_devices_that_make_no_sense_are_refused_with_what_they_take(devices: Any) -> None:
    with pytest.raises(DevicesError, match=r"devices="):
        Fabric(accelerator="cpu", devices=devices)


def test_arguments_are_by_name_only_and_known() -> None:
    with pytest.raises(TypeError):
        Fabric("cpu")  # type: ignore[misc]
    with pytest.raises(TypeError, match="stratgy"):
        Fabric(stratgy="many")  # type: ignore[call-arg]


@pytest.mark.usefixtures("_parts")
def test_options_reach_the_part_by_name() -> None:
    fabric = Fabric(strategy="many", devices=2, strategy_options={"level": 3})
    assert isinstance(fabric.strategy, Many)
    assert fabric.strategy.level == 3
    assert fabric.plan.strategy.options == {"level": 3}
    with pytest.raises(OptionsError, match=r"no option 'lvel'. Did you mean 'level'\?"):
        Fabric(strategy="many", devices=2, strategy_options={"lvel": 3})
    with pytest.raises(OptionsError, match="an instance"):
        Fabric(strategy=Many(), strategy_options={"level": 3})
    with pytest.raises(OptionsError, match="no option 'x'"):
        Fabric(precision="tiny", precision_options={"x": 1})


@pytest.mark.usefixtures("_parts")
@pytest.mark.parametrize(
    "plugin",
    [Tiny(), [Tiny()], (Tiny(),), Tiny, "tiny", "TINY", "4", "tiny@acme", ["tiny"]],
    ids=lambda p: repr(p)[:12],
)
def test_a_precision_may_be_a_plugin_by_instance_class_or_name(plugin: Any) -> None:
    fabric = Fabric(plugins=plugin)
    assert type(fabric._parts.precision) is Tiny
    given = plugin[0] if isinstance(plugin, list | tuple) else plugin
    if isinstance(given, Tiny):
        assert fabric._parts.precision is given


@pytest.mark.usefixtures("_parts")
@pytest.mark.parametrize(
    "precision", [Tiny(), Tiny, "tiny", 4, f"{__name__}:Tiny"], ids=lambda p: repr(p)[:12]
)
def test_a_precision_is_taken_in_every_form(precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__, sys.modules["__main__"]))
    monkeypatch.setattr(sys.modules[__name__], "Tiny", Tiny, raising=False)
    assert type(Fabric(precision=precision)._parts.precision) is Tiny


@pytest.mark.usefixtures("_parts")
def test_two_plugins_of_a_kind_and_a_precision_given_twice_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="two parts of the kind precision"):
        Fabric(plugins=[Tiny(), "tiny"])
    with pytest.raises(ConfigurationError, match="given twice"):
        Fabric(precision="32-true", plugins=Tiny())
    with pytest.raises(ConfigurationError, match="given twice"):
        Fabric(precision=Tiny(), plugins=[Tiny()])
    with pytest.raises(WrongTypeError, match="plugins= takes parts"):
        Fabric(plugins=[Many()])
    with pytest.raises(WrongTypeError, match="none of them"):
        Fabric(plugins=[object()])
    with pytest.raises(UnknownPluginError, match="'nothing'"):
        Fabric(plugins="nothing")


def test_plugins_of_different_kinds_are_taken_together() -> None:
    class Environment(ClusterEnvironment):
        creates_processes_externally = True
        main_address = "127.0.0.1"
        main_port = 0

        def world_size(self) -> int:
            return 1

        def global_rank(self) -> int:
            return 0

        def local_rank(self) -> int:
            return 0

        def node_rank(self) -> int:
            return 0

    environment, checkpoint_io = Environment(), TorchFile()
    fabric = Fabric(plugins=[environment, checkpoint_io, Tiny])
    assert fabric._parts.cluster_environment is environment
    assert fabric._parts.checkpoint_io is checkpoint_io
    assert fabric.plan.precision.distribution == "passed in code"


def test_an_accelerator_of_a_stranger_works_by_instance_and_by_class() -> None:
    class Pretend(Accelerator):
        spec = AcceleratorSpec(
            "pretend", "", probe=lambda: Inventory(indices=(3,)), strategies={"one": "single_device"}
        )

        def device(self, index: int) -> torch.device:
            return torch.device("meta", index)

    for asked in (Pretend(), Pretend):
        fabric = Fabric(accelerator=asked)
        assert fabric.device == torch.device("meta", 3)
        assert fabric.plan.accelerator.name == "pretend"


def test_a_pair_that_nobody_vouches_for_is_tried_with_one_warning_at_the_line_of_the_user() -> None:
    class Strange(Strategy):
        pass

    with pytest.warns(
        UserWarning, match="Neither the strategy 'Strange' nor the accelerator 'cpu'"
    ) as caught:
        Fabric(accelerator="cpu", strategy=Strange())
    assert [(w.filename, w.category) for w in caught] == [(__file__, UserWarning)]


@pytest.mark.parametrize(
    ("callbacks", "expected"),
    [(None, []), ("one", ["one"]), (["one"], ["one"]), (("one", "two"), ["one", "two"]), ([], [])],
    ids=repr,
)
def test_callbacks_are_kept_in_a_list_of_our_own(callbacks: Any, expected: list[str]) -> None:
    given = repr(callbacks)
    fabric = Fabric(callbacks=callbacks)
    assert fabric.callbacks == expected
    fabric.callbacks.append("mine")
    assert repr(callbacks) == given


# -- no side effects ----------------------------------------------------------------------------------------------


def test_making_a_fabric_changes_nothing_in_the_process() -> None:
    script = """
        import gc, json, logging, os, signal, sys, threading, warnings
        import torch, torch.utils.data
        import fabric_core, fabric_core.fabric
        def look():
            return {
                "environ": dict(os.environ),
                "filters": [repr(f) for f in warnings.filters],
                "format": [warnings.formatwarning.__module__, warnings.showwarning.__module__],
                "handlers": [repr(h) for h in logging.getLogger().handlers],
                "loggers": sorted(n for n, l in logging.Logger.manager.loggerDict.items() if getattr(l, "handlers", 0)),
                "level": logging.getLogger().level,
                "compile": [torch.compile.__module__, torch.compile.__qualname__],
                "signals": [repr(signal.getsignal(s)) for s in signal.valid_signals()],
                "threads": sorted(t.name for t in threading.enumerate()),
                "hooks": [repr(sys.excepthook), repr(threading.excepthook)],
                "rng": torch.get_rng_state().tolist(),
                "dtype": str(torch.get_default_dtype()),
                "torch threads": torch.get_num_threads(),
                "path": list(sys.path), "cwd": os.getcwd(),
                "loader": [repr(vars(torch.utils.data.DataLoader).keys()), repr(torch.utils.data.DataLoader.__init__)],
                "module": [repr(torch.nn.Module.__call__), repr(torch.nn.Module.__setattr__)],
                "distributed": torch.distributed.is_available() and torch.distributed.is_initialized(),
            }
        torch.optim.SGD([torch.ones(1)], lr=0.1).zero_grad()  # makes PyTorch import the rest of itself
        before = look()
        from fabric_core import Fabric
        fabric = Fabric(accelerator="cpu")
        assert look() == before, {k: (v, look()[k]) for k, v in before.items() if look()[k] != v}
        model = torch.nn.Linear(2, 2)
        before = look()
        model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        loader = fabric.setup_dataloaders(torch.utils.data.DataLoader(torch.ones(4, 2)))
        after = look()
        assert after == before, {k: (v, after[k]) for k, v in before.items() if after[k] != v}
        for batch in loader:
            fabric.backward(model(batch).sum())
            optimizer.step()
        fabric.close()
        after = look()
        before["rng"] = after["rng"]  # a loader draws its base seed
        assert after == before, {k: (v, after[k]) for k, v in before.items() if after[k] != v}
    """
    environ = {"PATH": "/usr/bin:/bin", "FABRIC_PLUGINS_AUTOLOAD": "0"}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        env=environ,
    )
    assert result.returncode == 0, result.stderr


def test_an_error_in_the_loop_leaves_the_classes_of_pytorch_as_they_were() -> None:
    from torch.utils.data import BatchSampler

    before = [dict(vars(cls)) for cls in (DataLoader, BatchSampler, nn.Module, torch.optim.SGD)]
    model = nn.Linear(1, 1)
    torch.optim.SGD(model.parameters(), lr=0.1)

    def train(fabric: Fabric) -> None:
        fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        fabric.setup_dataloaders(DataLoader(torch.ones(2, 1)))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Fabric(accelerator="cpu").launch(train)
    after = [dict(vars(cls)) for cls in (DataLoader, BatchSampler, nn.Module, torch.optim.SGD)]
    for cls in (*before, *after):
        cls.pop("__abstractmethods__", None)
        cls.pop("_abc_impl", None)
        cls.pop("step", None)  # PyTorch puts its profiler around it when the first one is made
    assert after == before


# -- launching ----------------------------------------------------------------------------------------------------


def test_on_one_process_launching_is_optional_and_runs_the_function_here() -> None:
    fabric = Fabric()
    assert fabric.launch() is None
    assert fabric.launch() is None
    thread = threading.get_ident()
    result = fabric.launch(lambda f, a, b=1: (f is fabric, a, b, threading.get_ident() == thread), 2, b=3)
    assert result == (True, 2, 3, True)
    fabric.barrier("later")


def test_what_cannot_be_launched_is_refused() -> None:
    fabric = Fabric()
    with pytest.raises(WrongTypeError, match="takes a function, not a str"):
        fabric.launch("train")  # type: ignore[arg-type]
    with pytest.raises(WrongTypeError, match="it takes none"):
        fabric.launch(lambda: None)
    with pytest.raises(WrongTypeError, match="it takes none"):
        fabric.launch(lambda *, fabric: None)
    assert fabric.launch(lambda *args: len(args)) == 1
    assert fabric.launch(isinstance, Fabric) is True


def test_an_exception_in_a_launched_function_is_the_users() -> None:
    with pytest.raises(KeyError, match="mine"):
        Fabric().launch(lambda fabric: {}["mine"])


VERBS: dict[str, Callable[[Fabric], Any]] = {
    "setup": lambda f: f.setup(nn.Linear(1, 1)),
    "setup_module": lambda f: f.setup_module(nn.Linear(1, 1)),
    "setup_optimizers": lambda f: f.setup_optimizers(torch.optim.SGD(nn.Linear(1, 1).parameters())),
    "setup_dataloaders": lambda f: f.setup_dataloaders(DataLoader([1])),
    "backward": lambda f: f.backward(torch.ones(1, requires_grad=True)),
    "clip_gradients": lambda f: f.clip_gradients(nn.Linear(1, 1), None, clip_val=1.0),  # type: ignore[arg-type]
    "autocast": lambda f: f.autocast().__enter__(),
    "init_module": lambda f: f.init_module().__enter__(),
    "init_tensor": lambda f: f.init_tensor().__enter__(),
    "to_device": lambda f: f.to_device(torch.ones(1)),
    "barrier": lambda f: f.barrier(),
    "broadcast": lambda f: f.broadcast(1),
    "all_gather": lambda f: f.all_gather(1),
    "all_reduce": lambda f: f.all_reduce(1),
    "rank_zero_first": lambda f: f.rank_zero_first().__enter__(),
    "save": lambda f: f.save("x", {}),
    "load": lambda f: f.load("x"),
    "load_raw": lambda f: f.load_raw("x", nn.Linear(1, 1)),
}


@pytest.mark.usefixtures("_parts")
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_before_launch_says_what_to_do_first(verb: str, tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", strategy="many", devices=2)
    with pytest.raises(SetupError, match=rf"fabric\.{verb}\(\).*before fabric\.launch\(\).*'many' needs 2"):
        VERBS[verb](fabric)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_after_close_says_that_it_was_closed(verb: str) -> None:
    fabric = Fabric()
    fabric.launch()
    fabric.close()
    with pytest.raises(SetupError, match=rf"fabric\.{verb}\(\).*after fabric\.close\(\)"):
        VERBS[verb](fabric)


@pytest.mark.usefixtures("_parts")
def test_before_launch_the_plan_is_known_and_harmless_verbs_work(capsys: pytest.CaptureFixture[str]) -> None:
    fabric = Fabric(accelerator="cpu", devices=2)
    assert (fabric.world_size, fabric.global_rank, fabric.is_global_zero) == (2, 0, True)
    assert fabric.plan.strategy.name == "many"
    assert fabric.device.type == "cpu"
    fabric.print("hello", end="!")
    fabric.call("anything")
    fabric.log("loss", 1.0)
    assert capsys.readouterr().out == "hello!"
    fabric.close()


@pytest.mark.usefixtures("_parts")
def test_a_launcher_gets_the_size_of_the_job_and_the_fabric_is_closed_where_it_ran() -> None:
    class Noting:
        def log_metrics(self, metrics: Mapping[str, float], step: int | None) -> None: ...

        def finalize(self, status: str) -> None:
            statuses.append(status)

    statuses: list[str] = []
    fabric = Fabric(accelerator="cpu", strategy="many", devices=3, num_nodes=1, loggers=Noting())
    assert fabric.launch(lambda fabric, x: (fabric.world_size, x), 5) == (3, 5)
    assert fabric._parts.launcher.asked == [(3, 1)]  # type: ignore[union-attr]
    assert statuses == ["success"]
    with pytest.raises(SetupError, match="close"):
        fabric.launch(lambda fabric: None)

    def fail(fabric: Fabric) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Fabric(accelerator="cpu", strategy="many", devices=2, loggers=Noting()).launch(fail)
    assert statuses == ["success", "failed"]
    Fabric(accelerator="cpu", strategy="many", devices=2, loggers=Noting()).close()
    assert statuses == ["success", "failed"]  # a parent has logged nothing


@pytest.mark.usefixtures("_parts")
def test_a_strategy_that_runs_a_function_wants_one() -> None:
    fabric = Fabric(accelerator="cpu", strategy="called", devices=2)
    with pytest.raises(SetupError, match=r"'called' runs a function.*fabric\.launch\(function\)"):
        fabric.launch()
    assert fabric.launch(lambda fabric: 7) == 7


def test_more_processes_than_the_strategy_can_use_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"at most 1 device.*2 \* 1 = 2"):
        Fabric(accelerator="cpu", strategy="single_device", devices=2)


# -- closing ------------------------------------------------------------------------------------------------------


def test_closing_gives_everything_back_once_even_when_a_part_fails() -> None:
    order: list[str] = []

    class Noted(Logger):
        def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None: ...

        def save(self) -> None:
            order.append("save")

        def finalize(self, status: str) -> None:
            order.append(status)
            raise OSError("disk full")

    class NotedStrategy(Strategy):
        spec = StrategySpec("noted", "", supports=("cpu",))

        def teardown(self) -> None:
            order.append("strategy")

    class NotedPrecision(Precision):
        def teardown(self) -> None:
            order.append("precision")

    fabric = Fabric(strategy=NotedStrategy(), precision=NotedPrecision(), loggers=Noted())
    with pytest.raises(OSError, match="disk full"):
        fabric.close()
    assert order == ["save", "success", "strategy", "precision"]
    fabric.close()
    assert len(order) == 4


def test_as_a_context_manager_it_is_closed_at_the_end_and_says_how_it_went() -> None:
    class Noted(Logger):
        def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None: ...

        def finalize(self, status: str) -> None:
            statuses.append(status)

    statuses: list[str] = []
    with Fabric(loggers=[Noted()]) as fabric:
        fabric.barrier()
    with pytest.raises(ZeroDivisionError), Fabric(loggers=[Noted()]) as fabric:
        fabric.barrier()
        raise ZeroDivisionError
    assert statuses == ["success", "failed"]


def test_several_fabrics_live_side_by_side() -> None:
    one, two = Fabric(), Fabric()
    model = one.setup(nn.Linear(1, 1))
    one.close()
    assert two.setup(nn.Linear(1, 1))(torch.ones(1, 1)).shape == (1, 1)
    assert model(torch.ones(1, 1)).shape == (1, 1)


# -- callbacks and loggers ----------------------------------------------------------------------------------------


def test_call_reaches_every_callback_that_has_the_method_with_what_it_takes() -> None:
    seen: list[Any] = []

    class Picky:
        def on_event(self, a: int, *, b: int = 0) -> None:
            seen.append(("picky", a, b))

    class Greedy:
        def on_event(self, *args: int, **kwargs: int) -> None:
            seen.append(("greedy", args, kwargs))

    class Positional:
        def on_event(self, a: int, c: int = 5, /) -> None:
            seen.append(("positional", a, c))

    class Deaf:
        pass

    class Builtin:
        on_event = staticmethod(seen.append)

    class Attribute:
        on_event = "not callable"

    fabric = Fabric(callbacks=[Picky(), Deaf(), Greedy(), Positional()])
    fabric.call("on_event", 1, b=2, c=3)
    assert seen == [("picky", 1, 2), ("greedy", (1,), {"b": 2, "c": 3}), ("positional", 1, 5)]
    seen.clear()
    fabric.callbacks = [Builtin()]
    fabric.call("on_event", 1)
    assert seen == [1]
    fabric.call("on_other")
    fabric.callbacks = [Attribute()]
    with pytest.warns(
        UserWarning, match="Attribute has an attribute 'on_event' that is not callable"
    ) as caught:
        fabric.call("on_event")
    assert caught[0].filename == __file__


def test_an_error_in_a_callback_is_the_users() -> None:
    class Failing:
        def on_event(self) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Fabric(callbacks=Failing()).call("on_event")


def test_metrics_reach_every_logger_as_plain_numbers() -> None:
    class Keeping:
        def __init__(self) -> None:
            self.rows: list[Any] = []

        def log_metrics(self, metrics: Mapping[str, float], step: int | None) -> None:
            self.rows.append((dict(metrics), step))

    one, two = Keeping(), Keeping()
    fabric = Fabric(loggers=[one, two])
    assert fabric.logger is one
    assert fabric.loggers == [one, two]
    step = torch.tensor(3)
    fabric.log("loss", torch.tensor([0.5], requires_grad=True), step)
    step += 1
    fabric.log_dict({"a": torch.tensor(2), "b": 1.5, "c": True})
    rows = [({"loss": 0.5}, 3), ({"a": 2, "b": 1.5, "c": True}, None)]
    assert one.rows == two.rows == rows
    assert [type(value) for value in (one.rows[0][1], *one.rows[1][0].values())] == [int, int, float, bool]
    with pytest.raises(ConfigurationError, match="'image'"):
        fabric.log("image", torch.ones(2))
    with pytest.raises(SetupError, match=r"no logger.*Fabric\(loggers="):
        Fabric().logger  # noqa: B018
    with pytest.raises(WrongTypeError, match="log_metrics"):
        Fabric(loggers=object())


def test_seed_everything_is_there_as_a_method_of_class_and_object(monkeypatch: pytest.MonkeyPatch) -> None:
    from fabric_core.data import seed

    monkeypatch.setattr(seed, "_state", type(seed._state)())
    assert Fabric.seed_everything(7) == 7
    first = torch.rand(2)
    assert Fabric().seed_everything() == 7
    assert torch.equal(torch.rand(2), first)


def test_rank_zero_first_is_a_plain_block_on_one_process() -> None:
    fabric = Fabric()
    with fabric.rank_zero_first(), fabric.rank_zero_first(local=True):
        pass
    with pytest.raises(ZeroDivisionError), fabric.rank_zero_first():
        raise ZeroDivisionError


def test_the_plan_prints_as_plain_data() -> None:
    plan = Fabric(precision="32").plan.to_dict()
    assert json.loads(json.dumps(plan))["world_size"] == 1


def test_a_checkpoint_io_by_class_is_what_saves(tmp_path: Path) -> None:
    class Noting(CheckpointIO):
        paths: list[Path] = []

        def save(self, path: Path, checkpoint: Mapping[str, Any]) -> None:
            self.paths.append(path)

        def load(self, path: Path, *, weights_only: bool = True) -> dict[str, Any]:
            return {"weights_only": weights_only}

        def remove(self, path: Path) -> None: ...

    fabric = Fabric(plugins=Noting)
    fabric.save(tmp_path / "x", {})
    assert Noting.paths == [tmp_path / "x"]
    assert fabric.load("x", weights_only=False) == {"weights_only": False}


def test_nothing_warns_on_the_ordinary_way() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Fabric(
            accelerator="cpu", strategy="auto", devices="auto", num_nodes=1, precision="32-true"
        ) as fabric:
            fabric.setup(nn.Linear(1, 1))
