"""Which checkpoint a run goes on from, and whether it is a checkpoint of this run."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from gearshift.engine.checkpoint import store
from gearshift.engine.cluster import distributed
from gearshift.engine.config import load as config_load
from gearshift.engine.config.errors import refuse_if
from gearshift.engine.config.schema import RunConfig

# What a resumed run may change without becoming another run: patterns of keys. All else decides
# what is learned.
MAY_CHANGE = (
    "run.*",
    "critic.patience",
    "critic.least_rise",
    "critic.share_base",
    "guards.*",
    "rollout.*",
    "eval.*",
    "*.attn",
    "*.liger",
    "*.deepspeed",
    "*.gradient_checkpointing",
    "*.lora.generate",
    "*.sleep",
    "*.batch_size",
    "data.bad_rows",
    "rewards.*.timeout_s",
    "rewards.*.retries",
    "rewards.*.urls",
    "ppo.micro_batch_*",
    "ppo.score_batch_*",
    "ppo.max_logprob_error",
)
# What no run.resume_changed accepts: the order of the prompts and the row ids follow from them.
MUST_MATCH = ("run.task", "run.seed", "ppo.prompts_per_step", "ppo.samples_per_prompt")
# Of a DeepSpeed JSON: where states lie may change, what is computed may not.
DEEPSPEED_MUST_MATCH = ("gradient_clipping", "bf16", "data_types", "prescale_gradients")


def choose(run: RunConfig) -> tuple[Path | None, list[str]]:
    """The checkpoint that `run.resume` names, checked byte by byte, and remarks. A collective.

    "auto" is the run folder's last checkpoint that is whole. Raises ValueError where a path holds
    no whole checkpoint, or where none in the run folder is.
    """
    if run.resume == "none":
        return None, []
    if run.resume != "auto":
        found = fault(Path(run.resume))
        fix = "use auto, none or the path of a whole checkpoint"
        refuse_if(found, "run.resume", str(found), fix, repr(run.resume))
        return Path(run.resume), []
    folder, remarks = Path(run.dir) / "checkpoints", list[str]()
    # Rank 0's listing is everybody's: each candidate is a collective, whoever misses it.
    for candidate in reversed(distributed.all_gather_objects(store.steps(folder))[0]):
        found = fault(candidate)
        if not found:
            remarks = [f"{remark}; going on from {candidate.name}" for remark in remarks]
            return candidate, remarks
        remarks.append(f"{candidate}: {found}")
    if remarks:
        raise ValueError(
            f"run.resume=auto: no whole checkpoint: {'; '.join(remarks)}; delete {folder}, or "
            "choose a new run.dir"
        )
    return None, []


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, the same on every rank. A collective.

    Each rank reads its share of the files.
    """
    found: str | None
    try:
        if not checkpoint.is_dir():
            raise ValueError("no checkpoint there")
        manifest = store.read_manifest(checkpoint)
    except (ValueError, OSError) as error:
        found = str(error)
    else:
        files = sorted(manifest["files"].items())
        mine = files[distributed.rank() :: distributed.world_size()]
        faults = (store.fault(checkpoint, name, entry) for name, entry in mine)
        found = next((entry for entry in faults if entry), None)
    told = distributed.all_gather_objects(found and (distributed.host(), found))
    first = next((entry for entry in told if entry), None)
    if first is None or all(told):
        return first and first[1]
    return f"{first[1]} (on {first[0]})"


def identity(
    config: Mapping[str, Any],
    deepspeed: Mapping[str, dict],
    tokenizer: str,
    bases: Mapping[str, str],
) -> dict:
    """What a resumed run is compared by. config: the whole one as plain values. bases: fingerprints
    of the frozen models under adapters, by role."""
    kept = {
        role: {key: deepspeed[role].get(key) for key in DEEPSPEED_MUST_MATCH}
        for role in ("actor", "critic")
        if role in deepspeed
    }
    about = {"config": dict(config), "deepspeed": kept, "tokenizer": tokenizer}
    return about | {"bases": dict(bases)}


def check(checkpoint: Path, ours: Mapping[str, Any], accepted: list[str]) -> None:
    """Raises ValueError where the checkpoint is of a run that would have learned something else.

    ours: of `identity`. accepted: patterns of keys whose changed values the user wants.
    """
    saved = json.loads((checkpoint / "state.json").read_bytes())["about"]
    changed = _changes(saved["config"], ours["config"])
    fixed = [key for key, pair in changed.items() if _must_match(key, pair)]
    changed = {k: v for k, v in changed.items() if k in fixed or not _may_change(k, accepted)}
    told = [f"{key}: {_short(old)} -> {_short(new)}" for key, (old, new) in changed.items()]
    for role in saved["deepspeed"].keys() & ours["deepspeed"].keys():
        pair = saved["deepspeed"][role], ours["deepspeed"][role]
        key = f"{role}.deepspeed"
        told += [
            f"{key} {name}: {_short(old)} -> {_short(new)}"
            for name, (old, new) in _changes(*pair).items()
            if not any(fnmatch(key, pattern) for pattern in accepted)
        ]
    if told:
        ways = "restore them, accept them in run.resume_changed, or start a new run"
        if fixed:
            ways = f"restore {' and '.join(fixed)}, or start a new run"
        raise ValueError(
            f"run.resume={str(checkpoint)!r}: was saved with other settings: {', '.join(told)}; "
            f"{ways}"
        )
    for role in saved.get("bases", {}).keys() & ours["bases"].keys():
        if saved["bases"][role] != ours["bases"][role]:
            raise ValueError(
                f"run.resume={str(checkpoint)!r}: its adapters are of another base than "
                f"{role}.path has now; give the model that they were trained on"
            )
    if saved["tokenizer"] != ours["tokenizer"]:
        raise ValueError(
            f"run.resume={str(checkpoint)!r}: was saved with another tokenizer (its tokens, "
            "special ids or chat template); give actor.tokenizer as it was, or start a new run"
        )


def same_run(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether the run that began in `folder` had this configuration, as far as it matters."""
    path = folder / "config.yaml"
    if not path.exists():
        return False
    before = asdict(config_load.load(str(path), []).config)
    return all(_may_change(key, []) for key in _changes(before, dict(config)))


def _may_change(key: str, accepted: list[str]) -> bool:
    return any(fnmatch(key, pattern) for pattern in (*MAY_CHANGE, *accepted))


def _must_match(key: str, pair: tuple[Any, Any]) -> bool:
    """Whether no list can accept the change; as for a dataset that comes or goes, whose position
    nobody has."""
    trains = not key.startswith("eval.")
    if key == "rollout.defer_stragglers":  # who waits, or nobody does
        return not all(pair)
    return key in MUST_MATCH or (trains and fnmatch(key, "*.sources.*.path") and None in pair)


def _changes(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """By key, values that differ; a key that one side lacks has None there."""
    before, after = dict(leaves(old, "")), dict(leaves(new, ""))
    keys = sorted(before.keys() | after.keys())
    pairs = {key: (before.get(key), after.get(key)) for key in keys}
    # A key that came after the run was saved had what is now its default.
    defaults = dict(leaves(asdict(config_load.load(None, []).config), ""))
    new_keys = {k for k in after.keys() - before.keys() if after[k] == defaults.get(k)}
    return {k: pair for k, pair in pairs.items() if pair[0] != pair[1] and k not in new_keys}


def leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Plain values inside a configuration, by their dotted keys below `key`."""
    if isinstance(value, dict):
        for name, entry in value.items():
            yield from leaves(entry, f"{key}.{name}" if key else name)
    elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        for index, entry in enumerate(value):
            yield from leaves(entry, f"{key}.{index}")
    else:
        yield key, value


def _short(value: Any) -> str:
    return json.dumps(value)
