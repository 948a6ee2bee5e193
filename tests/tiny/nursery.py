"""A process that has imported everything and forks the ranks of other processes' tests.

A rank that starts from nothing imports PyTorch, DeepSpeed and transformers for 5 to 15 seconds;
a forked one begins at once. Started by on_ranks.py, one per test process: reads one request per
line on stdin, answers with the ranks' exit statuses on stdout, and ends when stdin does.
"""

import gc
import json
import os
import runpy
import sys
from pathlib import Path

from tests.families.forks import forked

ROOT = Path(__file__).resolve().parents[2]


def warm_up() -> None:
    """Imports what ranks need, and has DeepSpeed look for its accelerator."""
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  ZeRO imports it, and inductor
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification  # noqa: F401

    from gearshift.launch import session, train  # noqa: F401
    from tests.tiny import run as tiny_run  # noqa: F401

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # the children's collectors then leave the shared pages alone


def run(request: dict) -> list[int]:
    """Forks the ranks of a script and waits; returns their statuses."""

    def work() -> int:
        sys.argv = [request["script"], *request["arguments"]]
        runpy.run_path(request["script"], run_name="__main__")
        return 0

    ranks, environment = request["ranks"], request["environment"]
    log = Path(request["log"])
    return forked(request["timeout"], work, log, ranks=ranks, environment=environment)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    sys.path.insert(0, str(ROOT))
    warm_up()
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
