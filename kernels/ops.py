"""The public kernels: one import for everything that computes. Each op documents itself."""

from gearshift.kernels.adamw import adamw_split_step
from gearshift.kernels.head.cross_entropy import linear_cross_entropy
from gearshift.kernels.head.logprob import linear_logprob
from gearshift.kernels.head.loss import PolicyLoss
from gearshift.kernels.head.ppo import linear_ppo_loss
from gearshift.kernels.head.scores import logprob_entropy
from gearshift.kernels.kl_gae import Advantages, kl_estimate, kl_reward_gae
from gearshift.kernels.paged_attention import paged_attention
from gearshift.kernels.sample import sample_tokens
from gearshift.kernels.value_loss import ValueLoss, value_loss
from gearshift.kernels.whiten import whiten

__all__ = [
    "Advantages",
    "PolicyLoss",
    "ValueLoss",
    "adamw_split_step",
    "kl_estimate",
    "kl_reward_gae",
    "linear_cross_entropy",
    "linear_logprob",
    "linear_ppo_loss",
    "logprob_entropy",
    "paged_attention",
    "sample_tokens",
    "value_loss",
    "whiten",
]
