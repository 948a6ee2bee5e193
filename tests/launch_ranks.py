"""Starts a ranks_*.py script under a real launcher and reads what each rank wrote."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def launch(
    script: str, ranks: int, out: Path, *args: str, launcher: str = "deepspeed", timeout: int = 300
) -> list[list[dict]]:
    """Runs tests/<script> OUT ARGS on `ranks` gloo ranks; returns each rank's JSON lines.

    Fails with the end of the output if a rank fails; kills the ranks if they hang.
    """
    path = Path(__file__).with_name(script)
    commands = {
        "deepspeed": [
            str(Path(sys.executable).with_name("deepspeed")),
            *("--num_accelerators", str(ranks), "--master_port", free_port()),
        ],
        "torchrun": [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)),
            *("--master_addr", "127.0.0.1", "--master_port", free_port()),
        ],
        "python": [sys.executable],
    }
    command = [*commands[launcher], str(path), str(out), *args]
    stale = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    environment = {key: value for key, value in os.environ.items() if key not in stale}
    process = subprocess.Popen(
        command,
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output[-6000:]
    files = [out / f"rank{rank}.jsonl" for rank in range(ranks)]
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
