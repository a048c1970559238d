"""The checks of the precision that scales losses; becomes its tests/test_conformance.py."""

from fabric_core.testing import PrecisionConformance


class TestPrecision(PrecisionConformance):
    name = "sample"
    computes = "float16"
    scales_loss = True
    growth_within = 100
