"""What the parts of our distributions declare as their options is what their constructors take."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fabric_core import Registry
from fabric_core.registry import Offer
from fabric_core.requirements import missing_requirements
from fabric_core.resolve.declared import REQUIRED, declared_options, options_class
from fabric_core.resolve.stated import check_preset
from fabric_core.targets import import_target

if TYPE_CHECKING:
    from conftest import Run

OFFERS = [offer for offer in Registry(environ={}).offers() if offer.distribution.startswith("fabric-")]
of_every_part = pytest.mark.parametrize(
    "offer", OFFERS, ids=[f"{o.spec.kind} {o.full_name} {i}" for i, o in enumerate(OFFERS)]
)

ABSENT = inspect.Parameter.empty
ELSEWHERE = {"forward_sync_buffers"}
"""What DistributedDataParallel calls an option of ``ddp`` that has the older name."""


def arguments_of_ddp() -> dict[str, Any]:
    """Those of DistributedDataParallel that strategies leave to users."""
    from fabric_backends.strategies import ddp

    found = inspect.signature(ddp.DistributedDataParallel).parameters
    return {
        name: parameter.default
        for name, parameter in found.items()
        if name not in ddp._DECIDED_HERE | ELSEWHERE
    }


def arguments_of_the_writer() -> dict[str, Any]:
    from torch.utils.tensorboard import SummaryWriter

    from fabric_backends.loggers.tensorboard import WRITER_OPTIONS

    found = inspect.signature(SummaryWriter).parameters
    return {name: found[name].default for name in WRITER_OPTIONS}


def options_of_deepspeed() -> dict[str, Any]:
    from fabric_deepspeed.options import Options

    return {each.name: each.default for each in fields(Options)}


FURTHER: dict[str, Callable[[], dict[str, Any]]] = {
    "DDPOptions": arguments_of_ddp,
    "ShardedDDPOptions": arguments_of_ddp,
    "LocalSGDOptions": arguments_of_ddp,
    "TensorBoardOptions": arguments_of_the_writer,
    "StrategyOptions": options_of_deepspeed,
}
"""For constructors that hand ``**options`` on: what takes them, with the defaults there, by the declaration's name."""


def keywords(cls: type) -> dict[str, Any]:
    """The keywords of a constructor and their defaults, and those of the next class in line, if it hands some on."""
    found: dict[str, Any] = {}
    for base in cls.__mro__[:-1]:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                found.setdefault(parameter.name, parameter.default)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def keywords_as_written(target: str) -> dict[str, Any]:
    """The same of a class whose module cannot be imported here, as its source states them; not of its bases."""
    module, _, name = target.partition(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None
    tree = ast.parse(Path(str(spec.origin)).read_text(encoding="utf-8"))
    (cls,) = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name)
    (made, *_) = [
        *(node.args for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"),
        ast.parse("lambda self: 0", mode="eval").body.args,  # type: ignore[attr-defined]
    ]
    names = [argument.arg for argument in (*made.args[1:], *made.kwonlyargs)]
    missing = [None] * (len(made.args) - 1 - len(made.defaults))
    defaults = [*missing, *made.defaults, *made.kw_defaults]
    values = [ABSENT if default is None else ast.literal_eval(default) for default in defaults]
    return dict(zip(names, values, strict=True))


def constructor(offer: Offer) -> dict[str, Any]:
    if missing_requirements(offer.spec) and offer.distribution == "fabric-xla":
        return keywords_as_written(offer.spec.target_name)
    return keywords(import_target(offer.spec.target, offer.full_name))


@of_every_part
def test_every_part_declares_its_options_and_they_are_those_of_its_constructor(offer: Offer) -> None:
    assert offer.spec.options_type is not None
    declared = {option.name: option.default for option in declared_options(offer.spec).values()}  # type: ignore[union-attr]
    given = constructor(offer).items()
    taken = {name: REQUIRED if default is ABSENT else default for name, default in given}
    name = options_class(offer.spec).__name__
    if (
        name == "XLAFSDPOptions"
    ):  # the rest is compared where torch_xla is: tests/xla_engine/test_xla_options.py
        declared = {option: declared[option] for option in taken}
    elif name in FURTHER:
        further = FURTHER[name]()
        known = {option: default for option, default in further.items() if option not in taken}
        newer = set(declared) - set(taken) - set(known)
        assert newer <= {"bucket_cap_mb_list", "batched_grad_copy", "skip_all_reduce_unused_params"}, (
            "what an older PyTorch may lack, and nothing else"
        )
        taken |= known | {option: declared[option] for option in newer}
    assert declared == taken
    assert {type(value) for value in declared.values()} == {type(value) for value in taken.values()}


@of_every_part
def test_every_preset_and_every_default_fits_its_declaration(offer: Offer) -> None:
    check_preset(offer.spec)
    for option in (declared_options(offer.spec) or {}).values():
        if option.default is not REQUIRED:
            option.form.take(option.default)


@of_every_part
def test_every_option_is_explained_unless_it_belongs_to_another_library(offer: Offer) -> None:
    silent = [option.name for option in (declared_options(offer.spec) or {}).values() if not option.help]
    assert silent == [] or offer.spec.name == "xla_fsdp"


@pytest.mark.parametrize("name", ["ddp", "ddp_sharded", "local_sgd", "deepspeed", "tensorboard"])
def test_what_hands_options_on_takes_each_that_it_declares(name: str) -> None:
    """Their constructors look at the names themselves: each is given, with the value that it has anyway."""
    (spec,) = {o.spec.target_name: o.spec for o in OFFERS if o.spec.name == name}.values()
    cls = import_target(spec.target, name)
    defaults = {option.name: option.default for option in (declared_options(spec) or {}).values()}
    cls(**defaults)
    with pytest.raises(ValueError, match="no_such_option"):
        cls(**defaults, no_such_option=1)


TYPES = {offer.spec.options_type for offer in OFFERS}
MODULES = sorted({path.partition(":")[0] for path in TYPES if isinstance(path, str)})


@pytest.mark.parametrize("module", MODULES)
def test_a_module_of_options_is_light(python: Run, least: Any, module: str) -> None:
    code = (
        "import fabric_core.specs, fabric_core.errors, logging, time; start = time.process_time(); "
        f"import {module}; used = time.process_time() - start; "
        "import sys; print(used, {'torch', 'numpy', 'click', 'deepspeed', 'torch_xla'} & set(sys.modules) or '')"
    )
    ended = python("-c", code)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split()[1:] == []
    assert least(lambda: float(python("-c", code).stdout), 0.030) < 0.030


def test_keywords_are_found_in_classes_and_in_their_source() -> None:

    class Part:
        def __init__(self, level: int = 1, *, rest: str) -> None:
            pass

    class Handing(Part):
        def __init__(self, own: bool = True, **options: Any) -> None:
            pass

    assert keywords(Part) == {"level": 1, "rest": ABSENT}
    assert keywords(Handing) == {"own": True, "level": 1, "rest": ABSENT}
    written = keywords_as_written("fabric_xla.strategies.xla_spmd:XLASPMDStrategy")
    assert set(written) == {"mesh_shape", "partition", "parallelize_fn", "auto_wrap_policy", "checkpoint"}
    assert keywords_as_written("fabric_xla.precisions.true:XLATruePrecision") == {"dtype": ABSENT}
    assert keywords_as_written("fabric_xla.precisions.mixed:XLAMixedPrecision") == {}
