"""The public kernels: one import for everything that computes. Each op documents itself."""

from gearshift.kernels.linear_cross_entropy import linear_cross_entropy
from gearshift.kernels.linear_logprob import linear_logprob
from gearshift.kernels.linear_loss import PolicyLoss
from gearshift.kernels.linear_ppo import linear_ppo_loss
from gearshift.kernels.logprob import logprob_entropy

__all__ = [
    "PolicyLoss",
    "linear_cross_entropy",
    "linear_logprob",
    "linear_ppo_loss",
    "logprob_entropy",
]
