"""`smolvm`: its own published image, with QEMU. It has no option for the accelerator."""

import json
import sys
import time

began = time.perf_counter()
sys.path.pop(0)  # this directory, which has a file of its name
from smolvm import SmolVM  # type: ignore[import-not-found] # noqa: E402

imported = time.perf_counter() - began
COMMANDS = 10

began = time.perf_counter()
vm = SmolVM(backend="qemu")
try:
    vm.run("true")
    first = time.perf_counter() - began
    commands = []
    for _ in range(COMMANDS):
        began = time.perf_counter()
        vm.run("true")
        commands.append(time.perf_counter() - began)
finally:
    began = time.perf_counter()
    vm.stop()
    stopped = time.perf_counter() - began
print(json.dumps({"import": imported, "first": first, "commands": commands, "stop": stopped}))
