"""Import what the arguments name, as ``module:attribute``, and report what that took since this process began."""

import importlib
import sys
import time

began = time.perf_counter(), time.process_time()
for name in sys.argv[1:]:
    module, _, attribute = name.partition(":")
    getattr(importlib.import_module(module), attribute)
wall, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
modules = list(sys.modules)

from report import report  # noqa: E402  (its own imports do not count)

report(
    wall=wall,
    cpu=cpu,
    modules=len(modules),
    dynamo=sum(module.startswith("torch._dynamo") for module in modules),
    numpy=sum(module.split(".")[0] == "numpy" for module in modules),
)
