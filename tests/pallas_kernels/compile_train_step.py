"""Compiles a training step for TPUs that are not there: `python compile_train_step.py TOPOLOGY CONFIG [--name=value ...]`.

Prints as JSON which kernels the program has, how often, and the memory on the chip that they ask for beyond what the
compiler grants unasked; the bytes that a chip moves in a step, counted as `hola plan` counts them, all kernels and fusions
by the shapes of what they read and write, loops as often as they run; and the bytes of temporaries.
"""

import collections
import dataclasses
import json
import re
import sys
from typing import Any

from train.overrides import load, override, pairs
from train.plan import hlo
from train.plan.compile import training
from train.plan.cost import cost
from train.plan.topology import topology


def compiled(name: str, path: str, *settings: str) -> dict[str, Any]:
    config = load(path)
    for setting, value in pairs(list(settings)):
        config = override(config, setting, value)
    place = topology(name)
    made = training(config, place.devices)
    program = made.lower(config.global_batch, config.row).compile()
    text = program.as_text()
    calls = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    names = [re.search(r"%([\w]+?)[.\d]* = ", line)[1] for line in calls]
    heads = [max(int(n) for n in re.findall(r"f32\[\d+,(\d+),256,256\]", line) or [0]) for line in calls]
    spent = cost(hlo.parse(text), place.chip)
    return {
        "implementation": made.layout.choice.name,
        "kernels": collections.Counter(names),
        "heads": max(heads),
        "limits": [limit for line in calls for limit in re.findall(r'"scoped_memory_configs":\[([^\]]+)\]', line)],
        "traffic": spent.traffic,
        "temporary": program.memory_analysis().temp_size_in_bytes,
        "unknown_loops": spent.unknown,
        "mesh": dataclasses.asdict(config.mesh),
    }


if __name__ == "__main__":
    print(json.dumps(compiled(*sys.argv[1:])))
