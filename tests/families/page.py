"""Write docs/families.md: every causal-LM family of transformers, made tiny and put through a run.

    python -m tests.families.page [--out FILE] [FAMILY ...]

A family's run has three parts, each in processes of its own with limits of time and memory: a tiny
checkpoint is written; one rank makes a PPO step; two ranks make the same under ZeRO-3 with tensor
parallelism. Sampling takes the most likely token, so that responses can be held to transformers'
own forward of each row alone, and between the two runs all figures can be compared.
"""

import argparse
import json
import os
import re
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import torch
import transformers
import yaml
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FAMILIES

from gearshift.launch import train
from tests.families.forks import forked
from tests.families.tiny import make, tokenizer

SECONDS = 150
OUTCOMES = ("works", "works padded", "refused", "wrong", "traceback", "not built")
MEMORY = 6 << 30  # bytes that a process may have of its own
REWARD = '''
import json, os

def score(prompts, completion_ids, **columns):
    """No two prompts the same; writes down what it sees."""
    with open(f"seen{os.environ['RANK']}.jsonl", "a") as file:
        for prompt, ids in zip(prompts, completion_ids):
            file.write(json.dumps([prompt, list(map(int, ids))]) + "\\n")
    return [len(set(ids)) / 4 + len(prompt) / 9 for prompt, ids in zip(prompts, completion_ids)]
'''
VERSIONS = f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"
HEAD = """\
# Families

Does mine work? Every causal-LM family of {versions}, as a tiny random model in fp32 on CPU ranks:
a whole run of one PPO step on one rank (with a critic where the family has one), and the same on
two ranks under ZeRO-3 with `rollout.tp: 2`, or 1 where that is refused. A family works where

- each sampled token is the likeliest by transformers' own forward of its row alone;
- training's log-probs are those of sampling, and gradients are finite and not zero;
- two ranks sample the same tokens as one, and all figures of their steps are equal to 0.2 %.

Made by `python -m tests.families.page`, which tries what this page does not have yet.
Kernels of GPUs, bf16, long texts and real weights are no part of it.

{counts}

"refused": by one line at the start. "not built": transformers itself makes no tiny model of the
family from its defaults here, for the reason given.
Padded: rows that cannot lie end to end are padded, and prompts are generated in a padded batch.

| family | class | outcome | rows | generation | critic | tp | in which words |
|---|---|---|---|---|---|---|---|
"""
KEYED = re.compile(r"(rank \d+.*?: )?[a-z_]+(\.\w+)*[=:]")  # how a mistake's line begins
CLOSE = 2e-3  # of figures of two ways to compute one thing, in fp32


def step(folder: str, zero: str, tp: int, estimator: str) -> int:
    """A PPO step of this rank, as `launch/train.py` makes it; returns its exit status."""
    Path(folder).mkdir(exist_ok=True)
    os.chdir(folder)
    Path("reward.py").write_text(REWARD)
    texts = [" ".join(f"w{3 + (7 * i + j) % 61}" for j in range(2 + 3 * i)) for i in range(4)]
    Path("prompts.jsonl").write_text("".join(f'{{"prompt": "{text}"}}\n' for text in texts))
    named = {"tokenizer": "../tokenizer"}  # beside the model, its type would decide how it is read
    settings = {
        "run": {"dir": "run", "steps": 1, "threads": 1, "hang_timeout_s": 0, "export": False},
        "actor": {"path": "../policy", "deepspeed": f"trained_{zero}.json"} | named,
        "critic": {"deepspeed": f"trained_{zero}.json"} | named,
        "reference": {"deepspeed": "frozen_zero3.json"},
        "rewards": [{"name": "different", "function": "reward.py:score"}],
        "data": {"sources": [{"path": "prompts.jsonl"}], "max_prompt_tokens": 12},
        "sampling": {"max_new_tokens": 6, "top_k": 1},
        "rollout": {"tp": tp},
        "ppo": {"prompts_per_step": 4, "minibatch_size": 4, "micro_batch_size": 2, "epochs": 1}
        | {"estimator": estimator},
    }
    Path("run.yaml").write_text(yaml.safe_dump(settings))
    return train.main(["--config", "run.yaml"])


@torch.no_grad()
def judge(folder: str) -> int:
    """Whether each sampled token is the likeliest by transformers' own forward of its row."""
    model = AutoModelForCausalLM.from_pretrained("policy").float().eval()
    encode = tokenizer()
    for prompt, response in seen(Path(folder)):
        ids = torch.tensor([encode(prompt).input_ids + response])
        logits = model(input_ids=ids, use_cache=False).logits[0, -len(response) - 1 : -1]
        short = logits.max(-1).values - logits[torch.arange(len(response)), response]
        if not short.max() < CLOSE:
            print(f"sampled tokens are {float(short.max()):.2g} nats from the likeliest")
            return 1
    return 0


def seen(folder: Path) -> list[tuple[str, list[int]]]:
    """(prompt, response ids) of a run, sorted."""
    lines = [line for file in folder.glob("seen*.jsonl") for line in file.read_text().splitlines()]
    return sorted(json.loads(line) for line in lines)


def figures(folder: Path) -> dict[str, float]:
    """What a step computed, and no cost."""
    line = json.loads((folder / "run/metrics.jsonl").read_text().splitlines()[0])
    named = ("loss/", "objective/", "policy/", "val/", "critic/", "actor/", "rollout/", "response")
    return {name: value for name, value in line.items() if name.startswith(named)}


def faults(folder: Path, other: Path | None = None) -> str:
    """What is wrong with a finished run by itself, or beside another of the same model."""
    found = figures(folder)
    for name in ("rollout/logprob_error_max", "rollout/ratio_first_max"):
        if not found[name] < CLOSE:
            return f"{name} is {found[name]:.2g}"
    norms = [value for name, value in found.items() if name.endswith("grad_norm")]
    if not all(0 < norm < 1e6 for norm in norms):
        return f"norms of gradients are {norms}"
    if other is None:
        return ""
    if seen(folder) != seen(other):
        return "two ranks sample other tokens than one"
    for name, value in figures(other).items():
        if abs(found[name] - value) > CLOSE * max(1.0, abs(value)):
            return f"{name} is {found[name]:.4g} on two ranks, {value:.4g} on one"
    return ""


def told(statuses: list[int], log: str) -> tuple[str, str]:
    """(works, refused or traceback; in which words) of a run."""
    lines = [line for line in log.splitlines() if "gearshift: error" in line]
    if not any(statuses):
        return "works", ""
    mistake = lines[0].partition("error")[2].lstrip(": ") if lines else ""
    if 2 in statuses and KEYED.match(mistake):
        return "refused", mistake
    if -signal.SIGKILL in statuses and not any(status > 0 for status in statuses):
        return "traceback", f"no end in {SECONDS} s"
    said = [line for line in log.splitlines() if line.strip()]
    return "traceback", mistake or (said or [f"statuses {statuses}"])[-1]


def limited(folder: Path, work: Callable[[], int], ranks: int = 1) -> tuple[list[int], str]:
    """(exit statuses, what was printed) of `work` in `folder`, with limits of time and memory."""

    def here() -> int:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        os.chdir(folder)
        return work()

    log = folder / "log"
    log.unlink(missing_ok=True)
    return forked(SECONDS, here, log, ranks=ranks), log.read_text(errors="replace")


def tried(family: str, folder: Path) -> list[str]:
    """A row of the table, without its first cell."""
    return [" ".join(cell.replace("|", "/").split())[:300] for cell in _tried(family, folder)]


def _tried(family: str, folder: Path) -> list[str]:
    statuses, log = limited(folder, lambda: make(family))
    name = FAMILIES[family]
    if any(statuses):
        return [name, "not built", "", "", "", "", told(statuses, log)[1]]
    estimator = "gae"
    outcome, words = told(*limited(folder, lambda: step("one", "zero0", 1, "gae")))
    if outcome == "refused" and re.search("critic|Classification", words):
        estimator = "reinforce_pp"
        outcome, words = told(*limited(folder, lambda: step("one", "zero0", 1, estimator)))
    log = (folder / "log").read_text(errors="replace")
    rows = "padded" if "rows are padded" in log else "packed"
    engine = "padded" if "generating with a padded batch" in log else "paged"
    critic = "yes" if estimator == "gae" else "none"
    if outcome != "works":
        return [name, outcome, "", "", "", "", words]
    wrong = faults(folder / "one")
    if not wrong and any(limited(folder, lambda: judge("one"))[0]):
        wrong = (folder / "log").read_text().splitlines()[-1]
    tp, words = "2", ""
    for size in (2, 1) if not wrong else ():
        tp = str(size)
        shutil.rmtree(folder / "two", ignore_errors=True)
        run = limited(folder, lambda: step("two", "zero3", size, estimator), ranks=2)  # noqa: B023
        outcome, more = told(*run)
        words = "; ".join(filter(None, [words, more]))
        if outcome != "refused" or "rollout.tp" not in more:
            break
    if outcome == "works" and not wrong:
        wrong = faults(folder / "two", folder / "one")
    if wrong:
        return [name, "wrong", rows, engine, critic, tp, wrong]
    if outcome == "works" and "padded" in (rows, engine):
        outcome = "works padded"
    if outcome == "refused":
        outcome = "works, but not under ZeRO-3"
    return [name, outcome, rows, engine, critic, tp, words]


def read(file: Path) -> dict[str, list[str]]:
    """The rows of a page that was made with the same versions, by family."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    if VERSIONS not in text:
        return {}
    lines = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return {name.strip("`"): row for name, *row in lines if row[1] != "not tried"}


def page(rows: dict[str, list[str]]) -> str:
    """The whole page."""
    counts = Counter(rows.get(family, ["", "not tried"])[1] for family in FAMILIES)
    told = "\n".join(f"- {name}: {counts[name]}" for name in dict.fromkeys([*OUTCOMES, *counts]))
    lines = [
        f"| `{family}` | "
        + " | ".join(rows.get(family, [FAMILIES[family], "not tried"] + [""] * 5))
        for family in sorted(FAMILIES)
    ]
    return HEAD.format(versions=VERSIONS, counts=told) + "".join(f"{line} |\n" for line in lines)


def warm_up() -> None:
    """Imports once, for all processes that are forked, what each would import for seconds."""
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  and with it all of inductor

    from gearshift.launch import session  # noqa: F401
    from gearshift.launch.report import page  # noqa: F401

    with tempfile.TemporaryDirectory(prefix="gearshift-") as scratch, chdir(scratch):
        make("llama")
        AutoModelForCausalLM.from_pretrained("policy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="none: all that the page does not have")
    parser.add_argument("--out", type=Path, default=Path("docs/families.md"))
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    train.quiet_libraries()
    warm_up()
    rows = read(arguments.out)
    for family in arguments.families or sorted(set(FAMILIES) - set(rows)):
        with tempfile.TemporaryDirectory(prefix="gearshift-") as scratch:
            start = time.monotonic()
            rows[family] = row = tried(family, Path(scratch))
            print(f"{family}, {time.monotonic() - start:.0f} s: {' | '.join(row)}", flush=True)
            if row[1] in ("wrong", "traceback"):
                print((Path(scratch) / "log").read_text(errors="replace")[-3000:], flush=True)
        arguments.out.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
