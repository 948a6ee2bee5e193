"""DeepSpeed JSON files: found by path or name, and validated before any model loads.

A JSON owns ZeRO, precision, clipping, offload and communication. Optimizer, schedule and batch
sizes belong to the run's YAML. DeepSpeed itself ignores unknown top-level keys and keeps "auto" as
a string; both are refused here.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from gearshift.engine.config.errors import ConfigError, choices, did_you_mean, refuse_if

# Sibling of engine/, in a checkout and in an installed package alike.
SHIPPED = Path(__file__).resolve().parents[2] / "ds_configs"

ONE = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")

# What DeepSpeed reads and this trainer supports: plain values, then sections.
GRADIENT_KEYS = {
    "communication_data_type",
    "data_types",
    "gradient_allreduce_op",
    "gradient_clipping",
    "gradient_predivide_factor",
    "prescale_gradients",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
}
SECTIONS = {
    "aio",
    "bf16",
    "checkpoint",
    "comms_logger",
    "csv_monitor",
    "data_types",
    "flops_profiler",
    "fp16",
    "tensorboard",
    "timers",
    "wandb",
    "zero_optimization",
}
KEYS = {
    *GRADIENT_KEYS,
    *SECTIONS,
    *ONE,
    "disable_allgather",
    "dump_state",
    "log_level",
    "memory_breakdown",
    "steps_per_print",
    "wall_clock_breakdown",
}
GRAD_DTYPES = ("fp32", "bf16")
NO_GRADIENTS = ("a frozen model has no gradients", "remove it")

OURS = {
    "activation_checkpointing": "set gradient_checkpointing of the role in the run's YAML instead",
    "optimizer": "set actor.optimizer or critic.optimizer in the run's YAML instead",
    "scheduler": "set optimizer.schedule and optimizer.warmup in the run's YAML instead",
    "train_batch_size": "set ppo.minibatch_size in the run's YAML instead",
    "managed_gradient_accumulation": "the training loop decides when to step; remove it",
    "hybrid_engine": "generation is configured by `rollout` in the run's YAML; remove it",
    "tensor_parallel": "generation is configured by `rollout.tp` in the run's YAML; remove it",
    "pipeline": "pipeline parallelism is not supported; remove it",
    "torch_autocast": "precision is bf16 or fp32, not autocast; use bf16",
    "data_efficiency": "data is configured by `data` in the run's YAML; remove it",
    "autotuning": "the micro-batch size is ppo.micro_batch_size in the run's YAML; remove it",
}

# Of zero_optimization; without gradients they have nothing to act on.
GRADIENT_ZERO_KEYS = (
    "allgather_partitions",
    "contiguous_gradients",
    "offload_optimizer",
    "overlap_comm",
    "reduce_bucket_size",
    "reduce_scatter",
    "round_robin_gradients",
    "sub_group_size",
    "zero_quantized_gradients",
)


def load(name_or_path: str, *, frozen: bool | None = None) -> dict[str, Any]:
    """A validated DeepSpeed configuration: a file, or a name in ds_configs/ with or without .json.

    frozen: whether the model is never trained; None: whether the file's name begins with `frozen_`.
    Raises ConfigError naming the file, the key, the value and the fix.
    """
    path = find(name_or_path)
    frozen = path.name.startswith("frozen_") if frozen is None else frozen
    config = _read(path)
    try:
        _check_keys(config, frozen)
        _check_batch(config)
        _check_precision(config)
        _check_zero(config["zero_optimization"], frozen)
        if not frozen:
            _check_gradients(config)
        _check_by_deepspeed(config)
    except ConfigError as error:  # the checks name the key, we add the file
        raise error.at(path.name) from None
    return config


def find(name_or_path: str) -> Path:
    """The file itself where there is one, else the shipped file of that name.

    The shipped actor_X and critic_X are both trained_X.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    shipped = SHIPPED / f"{_present_name(name_or_path.removesuffix('.json'))}.json"
    if shipped.is_file():
        return shipped
    names = sorted(file.stem for file in SHIPPED.glob("*.json"))
    fix = choices(_present_name(path.stem), names)
    raise ConfigError(name_or_path, "no such DeepSpeed file", fix)


def _present_name(name: str) -> str:
    """trained_X for actor_X and critic_X: configurations name one file twice by its role."""
    role, _, rest = name.partition("_")
    return f"trained_{rest}" if role in ("actor", "critic") else name


def offloaded(config: dict[str, Any], what: Literal["param", "optimizer"]) -> str | None:
    """ "cpu" or "nvme" where the weights or the optimizer live there; None on the device."""
    device = (config["zero_optimization"].get(f"offload_{what}") or {}).get("device", "none")
    return None if device == "none" else device


def frozen_on(trained: dict[str, Any]) -> dict[str, Any]:
    """Settings of a frozen model that is computed on the weights of one with these settings."""
    zero = trained["zero_optimization"]
    kept = {k: v for k, v in zero.items() if not k.startswith("offload")}
    kept = {k: v for k, v in kept.items() if k not in GRADIENT_ZERO_KEYS}
    found = {key: trained[key] for key in ONE} | {"zero_optimization": kept}
    kept["stage"] = 3 if zero["stage"] == 3 else 0
    if trained.get("bf16", {}).get("enabled"):
        found["bf16"] = {"enabled": True}
    return found


def check_nvme(config: dict[str, Any]) -> None:
    """Raises ConfigError where an NVMe folder is missing: DeepSpeed would make it on any disk."""
    for what in ("param", "optimizer"):
        if offloaded(config, what) != "nvme":
            continue
        folder = config["zero_optimization"][f"offload_{what}"].get("nvme_path")
        if folder is None or not Path(folder).is_dir():
            raise ConfigError(
                f"zero_optimization.offload_{what}.nvme_path",
                "no such folder",
                "copy the JSON, set the path of a mounted NVMe disk, and name the copy in "
                "`deepspeed`",
                value=folder,
            )


def _read(path: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for index, (key, _) in enumerate(pairs):
            twice = key in dict(pairs[:index])
            refuse_if(twice, path.name, f"{key} is given twice", "keep one of them")
        return dict(pairs)

    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"not JSON: {error}") from None
    refuse_if(not isinstance(config, dict), str(path), "must hold one JSON object")
    return config


def _check_keys(config: dict[str, Any], frozen: bool) -> None:
    for key, value in config.items():
        refuse_if(key in OURS, key, "not read from a DeepSpeed JSON here", OURS.get(key, ""))
        refuse_if(key not in KEYS, key, "no such key", did_you_mean(key, KEYS, "remove it"))
        wrong = key in SECTIONS and not isinstance(value, dict)
        refuse_if(wrong, key, "must be an object, as {...}", value=value)
        refuse_if(frozen and key in GRADIENT_KEYS, key, *NO_GRADIENTS)
    for key, value in _leaves(config):
        refuse_if(value == "auto", key, "write the value", "nothing fills it in", value)
    fixes = {"zero_optimization": '{"stage": 3}', "gradient_clipping": "1.0, or to 0 for none"}
    for key in ["zero_optimization", *ONE] + ([] if frozen else ["gradient_clipping"]):
        refuse_if(key not in config, key, "missing", f"set it to {fixes.get(key, 1)}")


def _check_batch(config: dict[str, Any]) -> None:
    fix = (
        "the training loop accumulates by itself, see ppo.micro_batch_size and ppo.minibatch_size "
        "in the run's YAML"
    )
    for key in ONE:
        refuse_if(config[key] != 1, key, "must be 1", fix, config[key])


def _check_precision(config: dict[str, Any]) -> None:
    problem = (
        "its loss scaling skips optimizer steps and its range is too small for log-prob ratios"
    )
    wrong = config.get("fp16", {}).get("enabled")
    refuse_if(wrong, "fp16.enabled", problem, "use bf16, or neither for fp32", "true")
    accumulation = config.get("data_types", {}).get("grad_accum_dtype", "fp32")
    key, wrong = "data_types.grad_accum_dtype", accumulation not in GRAD_DTYPES
    refuse_if(wrong, key, "must be fp32 or bf16", value=accumulation)
    wrong = config.get("bf16", {}).get("check_grad_overflow") is False
    problem = "gradients that are not finite would reach the weights"
    refuse_if(wrong, "bf16.check_grad_overflow", problem, "remove it", "false")


def _check_gradients(config: dict[str, Any]) -> None:
    clip = config["gradient_clipping"]
    wrong = isinstance(clip, bool) or not isinstance(clip, (int, float)) or not clip >= 0
    refuse_if(wrong, "gradient_clipping", "must be a number, 0 for none", value=clip)
    wrong = config["zero_optimization"].get("compute_grad_norm") is False
    problem = "the norm tells whether the gradients are finite"
    refuse_if(wrong, "zero_optimization.compute_grad_norm", problem, "remove it", "false")
    reduction = config.get("gradient_allreduce_op", "mean")
    problem = "must be mean, which the loss is scaled for"
    refuse_if(reduction != "mean", "gradient_allreduce_op", problem, value=reduction)


def _check_zero(zero: dict[str, Any], frozen: bool) -> None:
    stage: Any = zero.get("stage")
    key = "zero_optimization.stage"
    wrong = type(stage) is not int or stage not in (0, 1, 2, 3)
    refuse_if(wrong, key, "must be 0, 1, 2 or 3", value=stage)
    wrong = frozen and stage in (1, 2)
    refuse_if(wrong, key, "a frozen model needs stage 3 or 0", value=stage)
    key, wrong = "zero_optimization.offload_param", "offload_param" in zero and stage < 3
    refuse_if(wrong, key, f"needs stage 3, not {stage}", "remove it")
    key, wrong = "zero_optimization.offload_optimizer", "offload_optimizer" in zero and stage == 0
    refuse_if(wrong, key, "needs stage 1, 2 or 3", "remove it")
    for key in GRADIENT_ZERO_KEYS:
        refuse_if(frozen and key in zero, f"zero_optimization.{key}", *NO_GRADIENTS)


def _check_by_deepspeed(config: dict[str, Any]) -> None:
    """DeepSpeed's own parser: types and names inside every section."""
    with _silence():  # its import warns of a missing GPU, which reading a file does not need
        from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    try:
        DeepSpeedConfig(config)
    except ValidationError as error:
        raise _told(error.title, error.errors()[0]) from None
    except (DeepSpeedConfigError, AssertionError, TypeError, ValueError) as error:
        raise ConfigError("", " ".join(str(error).split())) from None


@contextmanager
def _silence() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _told(model: str, problem: Any) -> ConfigError:
    """pydantic's first problem in one line. model: the section's class in DeepSpeed."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    known = DeepSpeedZeroConfig.model_fields
    section = {"DeepSpeedZeroConfig": "zero_optimization", "DeepSpeedBF16Config": "bf16"}
    key = ".".join([section.get(model, model), *map(str, problem["loc"])])
    if problem["type"] != "extra_forbidden":
        return ConfigError(key, problem["msg"], value=problem["input"])
    if model != DeepSpeedZeroConfig.__name__ or len(problem["loc"]) > 1:
        return ConfigError(key, "no such key", "remove it")
    names = {entry.alias or name for name, entry in known.items()}
    return ConfigError(key, "no such key", did_you_mean(problem["loc"][0], names, "remove it"))


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, (dict, list)):
        yield key, value
        return
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for name, entry in entries:
        yield from _leaves(entry, f"{key}.{name}" if key else str(name))
