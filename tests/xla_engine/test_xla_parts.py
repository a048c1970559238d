"""What fabric-xla registers is what its classes say of themselves."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fabric_core import Fabric, Registry, UnsupportedError
from fabric_core.requirements import missing_requirements
from fabric_core.targets import import_target

OFFERS = [offer for offer in Registry(environ={}).offers() if offer.distribution == "fabric-xla"]


@pytest.mark.parametrize("offer", OFFERS, ids=[f"{o.spec.kind} {o.spec.name}" for o in OFFERS])
def test_a_part_is_the_same_part_when_its_class_is_passed(offer: Any) -> None:
    cls = import_target(offer.spec.target, offer.full_name)
    carried = vars(cls)["spec"]
    assert type(carried) is type(offer.spec)
    assert (carried.target, carried.options) == (offer.spec.target, {})
    assert missing_requirements(offer.spec) == []


def test_importing_torch_xla_does_not_make_xla_the_automatic_choice() -> None:
    import torch_xla  # noqa: F401 - which sets PJRT_DEVICE

    assert Fabric().plan.accelerator.name != "tpu"


@pytest.mark.parametrize("precision", ["16-mixed", "64-true"])
def test_other_precisions_are_refused(precision: str) -> None:
    with pytest.raises(UnsupportedError, match=f"'xla' cannot work with the precision '{precision}'"):
        Fabric(accelerator="tpu", devices=1, precision=precision)


def test_sharding_keeps_weights_in_float32() -> None:
    with pytest.raises(UnsupportedError, match="'xla_fsdp' cannot work with the precision 'bf16-true'"):
        Fabric(accelerator="tpu", devices=1, strategy="xla_fsdp", precision="bf16-true")


PAGE = Path(__file__).parents[2] / "docs" / "xla.md"
BLOCKS = dict(re.findall(r"^```python\n# xla/(\S+)\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE))


@pytest.mark.parametrize(
    ("name", "devices", "printed"), [("tpu.py", 1, "tensor("), ("mesh.py", 4, "{'data': 2")]
)
def test_the_programs_of_the_documentation_run(
    name: str, devices: int, printed: str, xla_program: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(BLOCKS[name])
    assert xla_program(tmp_path / name, devices=devices).stdout.startswith(printed)
