"""Write docs/plan.md's table: `python -m gearshift.launch.docs.plan` plans every recipe.

Model ids of the recipes are read as published architectures, so that nothing is downloaded.
"""

import sys
from pathlib import Path

import yaml

from gearshift.engine.plan.hardware import GB, Hardware, hardware
from gearshift.launch.commands.plan import planned

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
START, END = "<!-- plans -->\n", "<!-- end of plans -->\n"
SHAPES = {
    "Qwen/Qwen2.5-0.5B-Instruct": "shape:qwen2.5-0.5b",
    "Qwen/Qwen2.5-7B": "shape:qwen2.5-7b",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": "shape:qwen2.5-7b",
    "Qwen/Qwen3-8B": "shape:qwen3-8b",
    "Qwen/Qwen2.5-7B-Instruct": "shape:qwen2.5-7b",
    "Qwen/Qwen2.5-14B-Instruct": "shape:qwen2.5-14b",
    "Qwen/Qwen2.5-32B-Instruct": "shape:qwen2.5-32b",
    "Skywork/Skywork-Reward-V2-Qwen3-0.6B": "shape:qwen3-0.6b",
    "Skywork/Skywork-Reward-V2-Qwen3-8B": "shape:qwen3-8b",
    "meta-llama/Llama-3.1-8B-Instruct": "shape:llama3-8b",
    "meta-llama/Llama-3.1-70B-Instruct": "shape:llama3-70b",
    "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2": "shape:llama3-8b",
}
# Recipe, GPU, GPUs per node, nodes, GB of a host.
CASES = (
    ("0.5b_24gb", "rtx4090", 1, 1, 64),
    ("7b_1xh200", "h200", 1, 1, 128),
    ("7b_qlora_24gb", "rtx4090", 1, 1, 64),
    ("7b_lora", "l40s", 1, 1, 64),
    ("7b_lora", "h100", 1, 1, 64),
    ("8b_8xh100", "h100", 8, 1, 1000),
    ("14b_8xh100", "h100", 8, 1, 1000),
    ("32b_8xh100", "h100", 8, 1, 1000),
    ("70b_lora_8xh100", "h100", 8, 1, 1000),
    ("70b_multinode", "h100", 8, 8, 1000),
    ("70b_multinode", "h100", 8, 4, 1000),
    ("70b_multinode", "h100", 8, 2, 1000),
    ("papers/ppo_vapo_7b_8xh100", "h100", 8, 1, 1000),
    ("papers/vc_ppo_7b_8xh100", "h100", 8, 1, 1000),
    ("papers/sao_8b_8xh100", "h100", 8, 1, 1000),
    ("papers/gspo_8b_8xh100", "h100", 8, 1, 1000),
)


def offline(recipe: str) -> tuple[str, list[str]]:
    """(the recipe's file, overrides that name its models by their architectures, and leave out
    liger-kernel, which need not be installed where the page is made)."""
    path = RECIPES / f"{recipe}.yaml"
    sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    named = {role: sections[role] for role in ("actor", "critic") if role in sections}
    named |= {f"rewards.{i}": reward for i, reward in enumerate(sections["rewards"])}
    overrides = [f"--{key}.path={SHAPES[m['path']]}" for key, m in named.items() if "path" in m]
    everyone = [*named, "reference", *(f"rewards.{i}" for i in range(len(sections["rewards"])))]
    overrides += [f"--{key}.liger=never" for key in dict.fromkeys(everyone)]
    return str(path), overrides


def row(recipe: str, place: Hardware) -> str:
    """A line of the table."""
    made, advice = planned(*offline(recipe), place)
    host = max(phase.host for phase in made.phases)
    actor = made.config.actor  # the recipes leave both roles' to the plan
    cells = [
        f"`{recipe}`",
        f"{place.nodes} x {place.gpus_per_node} x {place.name}, {place.host_bytes / GB:.0f} GB",
        f"{made.peak.total / GB:.1f} of {place.usable / GB:.1f} ({made.peak.name})",
        f"{host / GB:.0f} of {max(0, place.usable_host) / GB:.0f}",
        f"{actor.sleep}, {'yes' if actor.gradient_checkpointing else 'no'}",
        str(made.tp),
        f"{min(made.config.ppo.micro_tokens or 0, made.most_tokens)} of {made.most_tokens}",
        f"{made.kv_slots} of {made.kv_wanted}",
        f"{made.step_seconds:.0f}" if made.fits else "",
        "FITS" if made.fits else f"DOES NOT FIT: {made.refuse_reason}; {advice}",
    ]
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """All recipes on their hardware."""
    head = (
        "| recipe | hardware, host memory | GPU GB at the peak | host GB | sleep, recompute | tp"
        " | tokens a micro-batch, of what fits | KV slots | s per step | verdict |\n"
        "|---|---|---|---|---|---|---|---|---|---|\n"
    )
    return head + "".join(f"{row(name, hardware(*place))}\n" for name, *place in CASES)


def replaced(page: str) -> str:
    """The page with a fresh table."""
    before, _, rest = page.partition(START)
    return before + START + table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/plan.md")
    target.write_text(replaced(target.read_text(encoding="utf-8")), encoding="utf-8")
