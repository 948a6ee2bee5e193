"""A process that has imported everything and forks the ranks of other processes' tests.

A rank that starts from nothing imports PyTorch, DeepSpeed and transformers for 5 to 15 seconds;
a forked one begins at once. Started by on_ranks.py, one per test process: reads one request per
line on stdin, answers with the ranks' exit statuses on stdout, and ends when stdin does.
"""

import gc
import json
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What a launcher grants the other ranks when one has failed, before it kills them.
GRACE_S = 5.0


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


def be_a_rank(request: dict, rank: int) -> None:
    """Runs the script as rank `rank` in this process, which was forked for it; never returns."""
    status = 1
    try:
        os.setpgid(0, 0)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for target, source in ((0, nothing), (1, log), (2, log)):
            os.dup2(source, target)
        ranks = str(request["ranks"])
        os.environ.clear()
        os.environ.update(request["environment"])
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": request["port"]}
        script = request["script"]
        sys.argv = [script, *request["arguments"]]
        runpy.run_path(script, run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # nothing of the parent's is cleaned up twice


def run(request: dict) -> list[int]:
    """Forks the ranks and waits; returns their statuses, negative for a signal's."""
    ranks = []
    for rank in range(request["ranks"]):
        child = os.fork()
        if not child:
            be_a_rank(request, rank)
        ranks.append(child)
    statuses: dict[int, int] = {}
    end = time.monotonic() + request["timeout"]
    while len(statuses) < len(ranks):
        for child in set(ranks) - statuses.keys():
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                statuses[child] = os.waitstatus_to_exitcode(status)
                if statuses[child]:
                    end = min(end, time.monotonic() + GRACE_S)
        if time.monotonic() > end:
            for child in set(ranks) - statuses.keys():
                os.kill(child, signal.SIGKILL)
            end = float("inf")
        time.sleep(0.01)
    return [statuses[child] for child in ranks]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    sys.path.insert(0, str(ROOT))
    warm_up()
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
