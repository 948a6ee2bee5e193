"""One run: its folder, its models and the loop over PPO steps."""

import json
import platform
import sys
from pathlib import Path
from typing import Any

from gearshift.engine import assemble, checkpoint, config_load, distributed
from gearshift.engine.batch import Experience
from gearshift.engine.config_load import Resolved
from gearshift.engine.data import PromptStream, TextStream
from gearshift.engine.export import export
from gearshift.engine.ppo import PPOTrainer
from gearshift.engine.run_log import RunLog
from gearshift.engine.trackers import check_trackers
from gearshift.launch.console import Console


class Session:
    """Everything is checked, in order of cost, before the run folder or a model is touched."""

    def __init__(self, resolved: Resolved, warnings: list[str]):
        self.resolved, self.config = resolved, resolved.config
        config = self.config
        self.folder = Path(config.run.dir)
        check_trackers(config.run.trackers)
        self.device = distributed.start(config.run.threads)
        distributed.seed_everything(config.run.seed)
        self.main = distributed.is_main()
        self.console = Console(config.run.steps, quiet=not self.main)
        blueprint = assemble.draw_up(config)
        self.streams = self._open_streams(blueprint)
        blueprint.rewards.check(self.streams["prompts"].columns)
        self.resumed = checkpoint.find(config.run.resume, self.folder / "checkpoints")
        self._claim_folder()
        for text in warnings:
            self.console.warn(text)
        self._describe_data()
        steps = config.run.steps * config.ppo.optimizer_steps_per_step
        roles = assemble.build(blueprint, steps, self.streams.get("pretrain"))
        self.trainer = PPOTrainer(config, roles)
        self.blueprint = blueprint
        if self.resumed:
            checkpoint.load(self.resumed, self.trainer, self.streams)
            self.console.note(f"resumed from {self.resumed}")
        self._write_settings()

    def train(self) -> None:
        """Steps until `run.steps`, then saves, exports and reports."""
        run = self.config.run
        log = (
            RunLog(run, _plain(self.config), resumed_step=self.trainer.steps_done)
            if self.main
            else None
        )
        while self.trainer.steps_done < run.steps:
            prompts = self.streams["prompts"].next_batch().to(self.device)
            with self.console.progress("generate") as progress:
                figures, experience = self.trainer.step(prompts, progress)
            step = self.trainer.steps_done
            self._show(step, figures, experience, log)
            if run.save_every and step % run.save_every == 0 and step < run.steps:
                self._save()
        self._save()
        if log:
            log.close()
        self._finish()

    def _show(self, step: int, figures: dict, experience: Experience, log: RunLog | None) -> None:
        self.console.step(step, figures)
        run = self.config.run
        if log is None:
            return
        log.step(step, figures)
        due = run.sample_every and step % run.sample_every == 0
        if due or step in (1, run.steps):
            rows = sample_rows(experience, self.blueprint.tokenizer, run.samples)
            log.samples(step, rows)
            if due:
                self.console.samples(step, rows)

    def _save(self) -> None:
        run = self.config.run
        folder = self.folder / "checkpoints"
        checkpoint.save(folder, self.trainer, self.streams, run.keep_checkpoints)

    def _finish(self) -> None:
        trainer, tokenizer = self.trainer, self.blueprint.tokenizer
        if self.config.run.export:
            export(trainer.actor.lm, tokenizer, self.folder / "export" / "actor")
            if trainer.critic:
                export(trainer.critic.model, tokenizer, self.folder / "export" / "critic")
            self.console.note(f"exported {self.folder / 'export'}")
        if self.main:
            from gearshift.launch.report import write_report

            self.console.note(f"report {write_report(self.folder)}")

    def _open_streams(self, blueprint: assemble.Blueprint) -> dict[str, Any]:
        config, place = self.config, (distributed.rank(), distributed.world_size())
        prompts = PromptStream(
            config.data,
            blueprint.tokenizer,
            prompts_per_step=config.ppo.prompts_per_step,
            samples_per_prompt=config.ppo.samples_per_prompt,
            seed=config.run.seed,
            rank=place[0],
            world_size=place[1],
            max_context=blueprint.max_context,
            max_new_tokens=config.sampling.max_new_tokens,
        )
        streams: dict[str, Any] = {"prompts": prompts}
        if config.ppo.ptx_coef:
            streams["pretrain"] = TextStream(
                config.pretrain, blueprint.tokenizer, config.run.seed, *place
            )
        return streams

    def _describe_data(self) -> None:
        prompts = self.streams["prompts"]
        self.console.note(prompts.report())
        self.console.note(f"first prompt, as the model reads it: {prompts.rendered_example()!r}")

    def _claim_folder(self) -> None:
        """Refuses a folder that holds another run, unless that run is taken up again."""
        if self.main:
            log = self.folder / "metrics.jsonl"
            if self.resumed is None and log.exists() and log.stat().st_size:
                raise ValueError(
                    f"run.dir={str(self.folder)!r}: holds another run; choose a new folder, or "
                    "delete it"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
        distributed.barrier()

    def _write_settings(self) -> None:
        if not self.main:
            return
        (self.folder / "config.yaml").write_text(config_load.dump(self.resolved))
        for role, settings in self.blueprint.deepspeed.items():
            (self.folder / f"ds_{role}.json").write_text(json.dumps(settings, indent=2) + "\n")
        (self.folder / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")


def sample_rows(experience: Experience, tokenizer: Any, count: int) -> list[dict[str, Any]]:
    """The first `count` rows as text: {"prompt", "response", "score"}."""
    rows = []
    for i in range(min(count, len(experience))):
        live = experience.response_ids[i][experience.response_mask[i]]
        rows.append(
            {
                "prompt": experience.columns["prompt"][i],
                "response": tokenizer.decode(live),
                "score": float(experience.scores[i]),
            }
        )
    return rows


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


def _plain(config: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(config)
