"""Which figures a PPO step reports, under the field's names (those of TRL where it has one)."""

import torch
from torch import Tensor

from gearshift.engine.batch import Experience, Rollout
from gearshift.engine.cluster import distributed
from gearshift.engine.metrics import StepMetrics


def report_experience(
    metrics: StepMetrics, experience: Experience, rewards: Tensor, kl: Tensor, *, critic: bool
) -> None:
    """Figures of a judged rollout; rewards and kl are [B, R], per token.

    objective/kl sums over a response's tokens and averages over responses, in nats.
    """
    mask = experience.response_mask
    total = rewards.sum(1)
    metrics.add_mean("objective/kl", kl.sum(1))
    metrics.add_std("objective/kl_std", kl.sum(1))
    metrics.add_mean("objective/kl_per_token", kl, mask)
    metrics.add_mean("objective/entropy", -experience.logprobs.sum(1))
    metrics.add_mean("objective/non_score_reward", total - experience.scores)
    metrics.add_mean("objective/rlhf_reward", total)
    if critic:
        metrics.add_explained_variance(
            "critic/vf_explained_var", experience.values, experience.returns, mask
        )


def report_rollout(
    metrics: StepMetrics, rollout: Rollout, scores: Tensor, by_name: dict[str, Tensor]
) -> None:
    """Figures of a scored rollout; scores [B] are as the rewards gave them."""
    lengths = rollout.lengths
    metrics.add_mean("objective/scores", scores)
    metrics.add_std("objective/scores_std", scores)
    for name, values in by_name.items():
        metrics.add_mean(f"rewards/{name}/mean", values)
    metrics.add_mean("response_length/mean", lengths)
    metrics.add_min("response_length/min", lengths)
    metrics.add_max("response_length/max", lengths)
    metrics.add_mean("response/finished_fraction", rollout.finished)
    metrics.add_sum("generated_tokens", lengths)
    metrics.add_sum("tokens", lengths + rollout.prompt_mask.sum(1))


def report_streams(metrics: StepMetrics, moved: dict[str, dict[str, float]]) -> None:
    """stream/<role>_ratio, bytes that came to the device over the least that scoring needs, and
    stream/<role>_gb, what one rank brought. Ranks bring equal parts."""
    for role, figures in moved.items():
        for name, value in figures.items():
            metrics.add_value(f"stream/{role}_{name}", value)


def report_policy(
    metrics: StepMetrics, micro: Experience, stats: dict[str, Tensor], *, first: bool
) -> Tensor:
    """Figures of one actor micro-batch; stats are [N], of its live tokens.

    first: nothing has been updated since the rollout, so every ratio should be 1.
    Returns [sum of the tokens' KL(pi_old || pi), tokens] in float64.
    """
    log_ratio = (stats["logprobs"] - micro.logprobs[micro.response_mask]).clamp(-20, 20)
    ratio = log_ratio.exp()
    kl = (ratio - 1 - log_ratio).double()  # k3 on samples of pi_old
    metrics.add_mean("policy/approxkl_avg", kl)
    metrics.add_mean("policy/clipfrac_avg", stats["clipped"])
    metrics.add_mean("policy/entropy_avg", stats["entropy"])
    metrics.add_mean("val/ratio", ratio)
    metrics.add_variance("val/ratio_var", ratio)
    if first:
        metrics.add_max("rollout/ratio_first_max", (ratio - 1).abs())
    return torch.stack([kl.sum(), kl.new_tensor(kl.numel())])


def report_loss(metrics: StepMetrics, name: str, part: Tensor, pieces: int) -> None:
    """Mean over optimizer steps of a loss that is the sum of `pieces` micro-batches' parts on every
    rank; called with each part."""
    parts = pieces * distributed.world_size()
    metrics.add_mean(name, part * parts, part.new_tensor(1 / parts))


def add_throughput(figures: dict[str, float]) -> dict[str, float]:
    """The reduced figures of a step, with tokens per second over all ranks."""
    step, generate = figures["timing_s/step"], figures["timing_s/generate"]
    return figures | {
        "throughput/tokens_per_s": figures["tokens"] / step,
        "throughput/generated_tokens_per_s": figures["generated_tokens"] / generate,
    }
