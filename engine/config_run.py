"""The knobs of a run that do not change what it learns: its folder, its checkpoints."""

from dataclasses import dataclass

from gearshift.engine.config_fields import Bounded, knob


@dataclass(frozen=True, kw_only=True)
class RunConfig(Bounded):
    """The run folder and what is written to it."""

    dir: str = knob("runs/latest", "run folder; must be empty or new unless resumed")
    steps: int = knob(100, "PPO steps", least=1)
    seed: int = knob(0, "of data order, sampling and initialisation", least=0)
    resume: str = knob("auto", "auto: continue the run folder's last checkpoint; none; or a path")
    save_every: int = knob(0, "PPO steps between checkpoints; 0: only at the end", least=0)
    keep_checkpoints: int = knob(2, "older checkpoints are deleted", least=1)
    export: bool = knob(True, "write Hugging Face directories of actor and critic at the end")
    sample_every: int = knob(5, "PPO steps between sample tables; 0: never", least=0)
    samples: int = knob(4, "rows of a sample table", least=1)
    trackers: list[str] = knob([], "any of tensorboard, wandb, trackio")
    tracker_project: str = knob("gearshift", "project name for wandb and trackio")
    threads: int = knob(0, "CPU threads per rank; 0: cores / ranks on this node", least=0)
