"""One run: its folder, its models and the loop over PPO steps."""

import json
import platform
import shutil
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gearshift.engine import assemble
from gearshift.engine.batch import Experience
from gearshift.engine.checkpoint import resume
from gearshift.engine.checkpoint import save as checkpoint
from gearshift.engine.checkpoint import store as checkpoint_store
from gearshift.engine.checkpoint.export import export_role
from gearshift.engine.checkpoint.state import tokenizer_print
from gearshift.engine.cluster import claim, distributed, watchdog
from gearshift.engine.cluster.interrupt import agree_on_deadline, parse_deadline
from gearshift.engine.config import load as config_load
from gearshift.engine.config.errors import ConfigError, refuse_if
from gearshift.engine.config.load import Resolved
from gearshift.engine.config.schema import Config
from gearshift.engine.data.heldout import HeldOut, read_held_out
from gearshift.engine.data.streams import PromptStream, TextStream
from gearshift.engine.evaluate import Evaluation, check_columns, sample_rows
from gearshift.engine.guards import Alarm, GuardStop
from gearshift.engine.log.run_log import RunLog
from gearshift.engine.log.trackers import check_trackers
from gearshift.engine.plan import compare as ledger
from gearshift.engine.plan import start as plan_start
from gearshift.engine.ppo import PPOTrainer
from gearshift.engine.rollout.responses import limit_in
from gearshift.engine.rollout.stragglers import check_row, next_prompts
from gearshift.kernels.checks.self_check import self_check
from gearshift.launch import alike, profiler
from gearshift.launch.bench.table import plain_lines
from gearshift.launch.console import Console
from gearshift.launch.pretraining import Patience
from gearshift.launch.saver import Saver


class Session:
    """Everything is checked, in order of cost, before the run folder or a model is touched."""

    def __init__(self, resolved: Resolved, warnings: list[str]):
        self.resolved, self.config = resolved, resolved.config
        config = self.config
        self.folder = Path(config.run.dir)
        check_trackers(config.run.trackers)
        parse_deadline(config.run.save_by, time.time())
        self.device = distributed.start(config.run.threads, config.run.start_timeout_s)
        alike.check_programs(config)
        deadline = agree_on_deadline(config.run.save_by)
        self.fresh = claim.take(self.folder)
        self.resumed, remarks = resume.choose(config.run)
        remarks += check_folder(config, self.resumed)
        watchdog.start(config.run.hang_timeout_s, self.folder)
        distributed.seed_everything(config.run.seed)
        self.main = distributed.is_main()
        self.console = Console(config.run.steps, quiet=not self.main)
        checked = self_check(self.device)
        if checked:
            self.console.note(checked)
        self.blueprint = assemble.draw_up(config)
        alike.check_files(config, self.blueprint)
        if self.device.type == "cuda":
            remarks += assemble.slower_than_need_be(self.blueprint, distributed.world_size())
        config = self._plan(config)
        self.streams = self._open_streams(self.blueprint)
        self.blueprint.rewards.check(self.streams["prompts"].columns)
        self._check_limits(config.sampling.limit_key)
        if config.rollout.defer_stragglers:
            self.streams["prompts"].look(check_row)
        held_out = self._read_held_out()
        about = resume.identity(
            asdict(self.resolved.config),
            self.blueprint.deepspeed,
            tokenizer_print(self.blueprint.tokenizer),
            assemble.bases(self.blueprint),
        )
        if self.resumed:
            resume.check(self.resumed, about, config.run.resume_changed)
        self.hosts = distributed.all_gather_objects(distributed.host())
        self._announce([*warnings, *remarks])
        roles = assemble.build(self.blueprint, config.run.steps, self.streams.get("pretrain"))
        self.trainer = PPOTrainer(config, roles)
        self.trainer.redraw = self.streams["prompts"].redraw
        self.evaluation = Evaluation(
            config, roles.actor, held_out, self.blueprint.eval_rewards, self.trainer.residence
        )
        about |= {"environment": environment()}
        stateful = {**self.streams, "guards": self.trainer.guards}
        self.patience = Patience(config.critic) if config.run.task == "critic" else None
        if self.trainer.backlog:
            stateful["backlog"] = self.trainer.backlog
        if self.patience:
            stateful["patience"] = self.patience
        self.saver = Saver(
            config.run, self.trainer, stateful, about, self.console, deadline, config.eval.best_by
        )
        if self.resumed:
            for remark in checkpoint.load(self.resumed, self.trainer, stateful):
                self.console.note(remark)
            self.console.note(f"resumed from {self.resumed}")

    def _plan(self, config: Config) -> Config:
        """What the run leaves open is chosen; raises ValueError where it cannot fit."""
        machines = distributed.all_gather_objects(plan_start.this_machine(self.device))
        start = plan_start.plan_run(config, self.blueprint.cast, plan_start.least(machines))
        self.plan = start.plan
        self.console.note(start.said)
        if start.warning:
            self.console.warn(start.warning)
        if start.plan is None:
            return config
        self.config = start.plan.config
        self.blueprint = replace(self.blueprint, config=self.config)
        return self.config

    def train(self) -> None:
        """Steps until `run.steps`, saving on the way, then exports and reports.

        Raises GuardStop where a guard stops the run.
        """
        steps = self.config.run.steps
        if self.trainer.steps_done >= steps:
            self.console.note(f"run.steps={steps}: already done; raise it to go on")
        elif self._done:
            self.console.note(f"critic.patience: already done, {self.patience}; raise it to go on")
        with ExitStack() as undo, self.saver:
            if self.main and not self._done and self.fresh:
                undo.callback(shutil.rmtree, self.folder)
            log = self._open_log()
            if not self._done and self.trainer.steps_done == 0:
                self._evaluate_first(log)
            stopping = None
            while not (self._done or self.saver.ended or stopping):
                stopping = self._step(log)
                undo.pop_all()  # from here on there are figures to keep
            self.saver.finish(stopping=bool(stopping))
        # NCCL ends no group while a captured graph has its collectives.
        self.trainer.actor.sampler.release()
        if log:
            log.close()
        if stopping:
            raise GuardStop(stopping.text)
        if self.saver.ended:
            done = f"ended by {self.saver.ended} after step {self.trainer.steps_done}"
            self.console.note(f"{done}; the same command goes on from there")
        else:
            self._finish()
        if self.main:
            outcome = {"outcome": "stopped" if self.saver.ended else "finished"}
            (self.folder / "outcome.json").write_text(json.dumps(outcome) + "\n")

    @property
    def _done(self) -> bool:
        """Whether every step there is to take has been taken."""
        patience = bool(self.patience and self.patience.over)
        return patience or self.trainer.steps_done >= self.config.run.steps

    def _step(self, log: RunLog | None) -> Alarm | None:
        """Returns the alarm of a guard that stops the run: a step to look at, not to save."""
        prompts = next_prompts(self.streams["prompts"], self.trainer.backlog).to(self.device)
        step = self.trainer.steps_done + 1
        due = step in self.config.run.profile.steps
        trace = profiler.place(self.folder, step) if due else None
        with self.console.progress("generate") as progress, profiler.recording(trace, self.device):
            figures, experience = self.trainer.step(prompts, progress)
        used = ledger.mfu(self.plan, figures) if self.plan else None
        if used is not None:
            figures["perf/mfu"] = used  # the share of the GPUs' rate that was of use
        if self.patience:
            self.patience.see(figures)
        if trace:
            self._show_profile(trace, figures)
        alarms = self.trainer.guards.drain()
        stopping = next((alarm for alarm in alarms if alarm.stop), None)
        held_out: list[dict[str, Any]] = []
        if not stopping:
            found, held_out = self._evaluate()
            figures |= found
            self.saver.after_step(figures, last=self._done)
        # What is kept comes before what is shown: the terminal may be gone.
        rows = self._write(figures, experience, held_out, log) if log else []
        if not stopping:
            self.saver.publish()
        self._show(self.trainer.steps_done, figures, rows)
        for alarm in alarms:
            if not alarm.stop:
                self.console.warn(alarm.text)
        return stopping

    def _evaluate(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Figures and samples of held-out prompts, where an evaluation is due."""
        if not self.evaluation.due(self.trainer.steps_done):
            return {}, []
        with self.console.progress("evaluate") as progress:
            found = self.evaluation.run(progress)
        self.trainer.roles.moved()  # not counted as the next step's
        return found

    def _evaluate_first(self, log: RunLog | None) -> None:
        """The evaluation before the first step: the line of step 0."""
        figures, rows = self._evaluate()
        if log and figures:
            log.step(0, figures)
            log.samples(0, rows)
            log.sync()
        self.console.evaluation(0, figures)

    def _show_profile(self, trace: Path, figures: dict[str, float]) -> None:
        """The table of a profiled step; adds the share of it in which the device worked."""
        table = profiler.tabulate(trace, figures, self.plan)
        figures["perf/device_busy"] = table["device_busy"]
        for line in plain_lines(*profiler.rows(table), left=1):
            self.console.note(line)
        self.console.note(f"profile of step {table['step']}: {trace.parent}")

    def _write(
        self, figures: dict, experience: Experience, held_out: list[dict[str, Any]], log: RunLog
    ) -> list[dict[str, Any]]:
        """The step's lines of the run folder, on the disk; returns the samples to be shown."""
        run, step, rows = self.config.run, self.trainer.steps_done, []
        log.step(step, figures)
        log.samples(step, held_out)
        due = run.sample_every and step % run.sample_every == 0
        if due or step == 1 or self._done:
            scores, tokenizer = experience.scores, self.blueprint.tokenizer
            rows = sample_rows(experience, scores, tokenizer, run.samples)
            log.samples(step, rows)
        log.sync()
        return rows if due else []

    def _show(self, step: int, figures: dict, samples: list[dict[str, Any]]) -> None:
        self.console.step(step, figures)
        self.console.evaluation(step, figures)
        if step == 1 and self.plan:
            met = ledger.compare(self.plan, figures, first=True)
            self.console.note(f"memory planned/measured, GB: {', '.join(met)}")
        if samples:
            self.console.samples(step, samples)

    def _finish(self) -> None:
        trainer, tokenizer = self.trainer, self.blueprint.tokenizer
        if self.streams["prompts"].counts()["dropped"]:
            self.console.note(self.streams["prompts"].report())
        if self.patience and self.patience.over:
            self.console.note(f"{self.patience}: done after step {trainer.steps_done}")
        if self.config.run.export:
            if not self.patience:
                export_role(trainer.actor.lm, tokenizer, self.folder / "export" / "actor")
            if trainer.critic:
                export_role(trainer.critic.model, tokenizer, self.folder / "export" / "critic")
            self.console.note(f"exported {self.folder / 'export'}")
        if self.config.eval.best_by:
            self._tell_best(self.config.eval.best_by)
        if self.main:
            from gearshift.launch.report.page import write_report

            self.console.note(f"report {write_report(self.folder)}")

    def _tell_best(self, by: str) -> None:
        known = checkpoint_store.figures(self.folder / "checkpoints", by)
        best = checkpoint_store.best(known)
        if best:
            self.console.note(f"best by {by}: {best} ({known[best]:.4g})")

    def _open_streams(self, blueprint: assemble.Blueprint) -> dict[str, Any]:
        config, place = self.config, (distributed.rank(), distributed.world_size())
        ids = blueprint.cast["actor"].hf_config.vocab_size
        prompts = PromptStream(
            config.data,
            blueprint.tokenizer,
            prompts_per_step=config.ppo.prompts_per_step,
            samples_per_prompt=config.ppo.samples_per_prompt,
            seed=config.run.seed,
            rank=place[0],
            world_size=place[1],
            ids=ids,
        )
        streams: dict[str, Any] = {"prompts": prompts}
        if config.ppo.ptx_coef:
            streams["pretrain"] = TextStream(
                config.pretrain, blueprint.tokenizer, config.run.seed, *place, ids
            )
        return streams

    def _check_limits(self, key: str | None) -> None:
        """Raises ConfigError for a column of limits, by row, that responses cannot be cut by."""
        if key is None:
            return
        prompts = self.streams["prompts"]
        problem = f"no dataset has this column; there are {', '.join(prompts.columns)}"
        refuse_if(key not in prompts.columns, "sampling.limit_key", problem, value=key)
        prompts.look(lambda row: limit_in(row.get(key), key))

    def _read_held_out(self) -> list[HeldOut]:
        """Raises ConfigError for a row or a column that evaluation cannot use."""
        config = self.config
        actor = self.blueprint.cast["actor"]
        ids = actor.hf_config.vocab_size
        sets = read_held_out(config.eval, config.data, actor.tokenizer, ids)
        check_columns(sets, self.blueprint.eval_rewards)
        for held in sets:
            dropped = f", {held.dropped} dropped by their length" if held.dropped else ""
            self.console.note(f"held-out prompts {held.name}: {len(held.examples)}{dropped}")
        return sets

    def _announce(self, warnings: list[str]) -> None:
        """What the run reads, where it runs and who plays whom."""
        for text in warnings:
            self.console.warn(text)
        prompts = self.streams["prompts"]
        sources = [
            f"{entry['path']} ({entry['rows']} rows)" for entry in prompts.counts()["sources"]
        ]
        self.console.note(f"prompts from {', '.join(sources)}")
        self.console.note(f"first prompt, as the model reads it: {prompts.rendered_example()!r}")
        counts = Counter(self.hosts)
        if len(counts) > 1:
            each = (f"{host} ({count})" for host, count in counts.items())
            self.console.note(f"ranks, from 0 on, are on {', '.join(each)}")
        for text in assemble.told(self.blueprint):
            self.console.note(text)

    def _open_log(self) -> RunLog | None:
        """Writes the settings and opens the log, on rank 0."""
        if not self.main:
            return None
        (self.folder / "outcome.json").unlink(missing_ok=True)
        self.console.keep(self.folder / "console.log")
        for later in checkpoint_store.retire(self.folder / "checkpoints", self.trainer.steps_done):
            self.console.note(f"set aside {later}: this run replaces it")
        (self.folder / "config.yaml").write_text(config_load.dump(self.resolved), encoding="utf-8")
        for role, settings in self.blueprint.deepspeed.items():
            (self.folder / f"ds_{role}.json").write_text(json.dumps(settings, indent=2) + "\n")
        found = environment() | {"hosts": self.hosts}
        (self.folder / "environment.json").write_text(json.dumps(found, indent=2) + "\n")
        return RunLog(self.config.run, asdict(self.config), resumed_step=self.trainer.steps_done)


def check_folder(config: Config, resumed: Path | None) -> list[str]:
    """Raises ValueError where another run has been; returns remarks.

    resumed: the checkpoint that is continued. A run that was killed before its first checkpoint
    begins again, by the same command as any other.
    """
    folder, remarks = Path(config.run.dir), []
    log, own = folder / "metrics.jsonl", (folder / "checkpoints").resolve()
    continued = resumed is not None and resumed.resolve().parent == own
    saved = bool(checkpoint_store.steps(own))
    if not continued and (saved or log.exists() and log.stat().st_size):
        again = config.run.resume == "auto" and not saved
        if not (again and resume.same_run(folder, asdict(config))):
            more = "; run.resume=auto continues it" if saved else ""
            fix = f"choose a new folder, or delete it{more}"
            raise ConfigError("run.dir", "holds another run", fix, repr(str(folder)))
        remarks.append(f"{folder}: has no checkpoint yet; the run begins again")
    return remarks


def environment() -> dict[str, Any]:
    """Versions, device and command line of this process."""
    import deepspeed
    import torch
    import transformers

    cuda = torch.cuda.is_available()
    return {
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "ranks": distributed.world_size(),
        "threads per rank": torch.get_num_threads(),
    }
