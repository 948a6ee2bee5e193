"""RMSNorm, RoPE and SwiGLU as single kernels, where liger-kernel is installed and there is a GPU.

Plain modules launch about ten kernels for each and keep their intermediate results for backward
(Hsu et al. 2024, "Liger Kernel").
"""

import importlib.util
import logging
import warnings
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel

from gearshift.engine.rollout.graphs import has_experts


def fuses(hf_config: Any, wanted: str) -> bool:
    """Whether a model of this configuration has fused layers on a GPU of this installation.

    wanted: "auto" or "never", see the key `liger`. Not where liger-kernel would compute something
    else: it takes the usual activation for granted and knows no biases of an MLP. Its expert layers
    have not been tried in CUDA graphs.
    """
    text = hf_config.get_text_config()
    activation = getattr(text, "hidden_act", None) or getattr(text, "hidden_activation", None)
    usual = activation in (None, "silu", "swish", "gelu_pytorch_tanh")
    other = getattr(text, "mlp_bias", False) or has_experts(text)
    return wanted == "auto" and usual and not other and text.model_type in _families()


def fuse(module: PreTrainedModel, wanted: str) -> None:
    """Gives the module's layers their fused forms; their weights and names stay."""
    if not torch.cuda.is_available() or not fuses(module.config, wanted):
        return
    apply = _families()[module.config.get_text_config().model_type]
    # The losses are ours. The trunk, since some of its functions know no class but the causal LM's.
    apply(model=module.base_model, cross_entropy=False, fused_linear_cross_entropy=False)


@cache
def _families() -> dict[str, Any]:
    """liger-kernel's function for each model type; empty where it is not installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return {}
    # It tries every vendor's backend and tells of each that is not installed.
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    return MODEL_TYPE_TO_APPLY_LIGER_FN
