"""Proximal policy optimisation of a language model: one step, start to end.

Schulman et al. 2017; Ziegler et al. 2019; Ouyang et al. 2022. The formulas are in objective.py and
the kernels; docs/objective.md says where they differ from common write-ups. This file knows neither
DeepSpeed nor transformers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gearshift.engine import trace
from gearshift.engine.batch import Experience, PromptBatch, Rollout, minibatches
from gearshift.engine.cluster import distributed
from gearshift.engine.config.schema import Config
from gearshift.engine.contrast import Redraw, with_contrast
from gearshift.engine.guards import Guards, Piece
from gearshift.engine.metrics import (
    StepMetrics,
    add_throughput,
    report_batches,
    report_correction,
    report_deferred,
    report_experience,
    report_loss,
    report_policy,
    report_rollout,
    report_states,
    report_streams,
)
from gearshift.engine.microbatch import micro_batches
from gearshift.engine.objective import (
    Correction,
    KLController,
    correct_rollout,
    estimate_advantages,
    shape_scores,
    token_weights,
)
from gearshift.engine.phase import Phase, update_of
from gearshift.engine.rewards.total import Scores
from gearshift.engine.roles import Actor, Critic, Roles, Trained, train_budget
from gearshift.engine.rollout.stragglers import Backlog
from gearshift.engine.zero.residence import Residence

CHECKED_ROWS = 8  # of a rank's rollout, where the sampler's log-probs are trusted


class PPOTrainer:
    """Rollout, judgement, update; `step` is all there is."""

    def __init__(self, config: Config, roles: Roles):
        self.config, self.ppo, self.roles = config, config.ppo, roles
        self.actor, self.critic = roles.actor, roles.critic
        self.kl = KLController(config.ppo)
        self.guards = Guards(config, self.actor.tokenizer, self.actor.dtype)
        self.steps_done = 0
        self.redraw: Redraw | None = None  # where other prompts come from, for dynamic sampling
        self.backlog: Backlog | None = None
        if share := config.rollout.defer_stragglers:
            self.backlog = Backlog(self.ppo.rows_per_step // distributed.world_size(), share)
        trained = {"actor": self.actor} | ({"critic": self.critic} if self.critic else {})
        sleepers = {name: role.sleeper for name, role in trained.items()}
        self.residence = Residence(sleepers, joint=config.ppo.update == "joint")
        self.residence.enter(Phase.LOAD)

    def step(
        self, prompts: PromptBatch, progress: Any = None
    ) -> tuple[dict[str, float], Experience]:
        """One PPO step: returns its figures over all ranks, and this rank's rows."""
        metrics = StepMetrics(prompts.prompt_ids.device)
        metrics.add_value("step", self.steps_done + 1)
        metrics.add_value("episode", (self.steps_done + 1) * self.ppo.rows_per_step)
        metrics.add_value("objective/kl_coef", self.kl.coef)
        with metrics.time("step"):
            with self._phase(metrics, Phase.GENERATE):
                given = prompts, self.config.sampling, progress
                rollout = self.actor.generate(*given, self.backlog)
            shift = torch.tensor(self.actor.shift_seconds, device=metrics.device)
            metrics.add_max("timing_s/shift", shift)
            if self.backlog:
                deferred = self.backlog.begun, self.backlog.stale_tokens
                report_deferred(metrics, rollout, *deferred)
            judged = None
            if self.ppo.dynamic_sampling:
                rollout, judged = self._with_contrast(rollout, metrics)
            experience = self.make_experience(rollout, metrics, judged)
            report_streams(metrics, self.roles.moved())
            if self.guards.may_update:
                self.update(experience, metrics)
        figures = self.guards.watch(add_throughput(metrics.reduce()))
        self.kl.adapt(figures["objective/kl"], self.ppo.rows_per_step)
        self.steps_done += 1
        return figures, experience

    @torch.no_grad()
    def make_experience(
        self, rollout: Rollout, metrics: StepMetrics, judged: Scores | None = None
    ) -> Experience:
        """Judges the rollout, unless it is, and credits each token."""
        mask, ppo = rollout.response_mask, self.ppo
        judged = judged or self._judge(rollout, metrics)
        self.guards.check_rewards(judged.failed, judged.fault, judged.usable)
        with self._phase(metrics, Phase.LOGPROBS):
            logprobs = self._old_logprobs(rollout, metrics)
        with self._phase(metrics, Phase.REFERENCE):
            reference = self.roles.reference
            ref_logprobs = reference.logprobs(rollout) if reference else logprobs
        with self._phase(metrics, Phase.VALUES):
            values, after = torch.zeros_like(logprobs), torch.zeros_like(judged.total)
            if self.critic:
                values, after = self.critic.values(rollout)
            after = torch.where(rollout.finished, 0.0, after)
        report_rollout(metrics, rollout, judged.total, judged.by_name)
        scores = shape_scores(judged.total, rollout.finished, ppo)
        credit = estimate_advantages(
            logprobs,
            ref_logprobs,
            values,
            mask,
            scores,
            config=ppo,
            kl_coef=self.kl.coef,
            bootstrap_values=after if ppo.bootstrap_truncated else None,
            token_rewards=None if judged.by_token is None else judged.by_token / ppo.score_scale,
            group=distributed.world_group(),
        )
        teaches = judged.teaches[:, None]
        if ppo.overlong_filter:
            teaches = teaches & rollout.finished[:, None]
        experience = Experience(
            **rollout.tensors(),
            logprobs=logprobs,
            ref_logprobs=ref_logprobs,
            values=values,
            advantages=torch.where(teaches, credit.advantages, 0.0),
            returns=torch.where(teaches, credit.returns, values),
            scores=scores,
        )
        if self.ppo.corrections:
            report_correction(metrics, self._correction(experience), mask)
        self.guards.take(experience)
        has_critic = self.critic is not None
        report_experience(metrics, experience, credit.rewards, credit.kl, critic=has_critic)
        return experience

    def _judge(self, rollout: Rollout, metrics: StepMetrics) -> Scores:
        with self._phase(metrics, Phase.REWARDS):
            return self.roles.rewards.scores(rollout, self.actor.tokenizer)

    @torch.no_grad()
    def _with_contrast(self, rollout: Rollout, metrics: StepMetrics) -> tuple[Rollout, Scores]:
        """Dynamic sampling: prompts whose samples all score alike are replaced, and scored."""
        assert self.redraw, "ppo.dynamic_sampling without a stream of prompts"

        def sample(prompts: PromptBatch) -> tuple[Rollout, Scores]:
            with self._phase(metrics, Phase.GENERATE):
                fresh = self.actor.generate(prompts.to(metrics.device), self.config.sampling)
            return fresh, self._judge(fresh, metrics)

        judged = self._judge(rollout, metrics)
        return with_contrast(
            rollout, judged, metrics, config=self.ppo, redraw=self.redraw, sample=sample
        )

    def update(self, experience: Experience, metrics: StepMetrics) -> None:
        """The epochs of clipped updates: one role then the other, or both on every minibatch."""
        self.actor.sampler.free_workspaces()
        alone = self.config.run.task == "critic" or self.steps_done < self.ppo.critic_warmup_steps
        actor = None if alone else self.actor
        if self.ppo.update == "joint":
            with self._phase(metrics, Phase.UPDATE_ACTOR):
                self._epochs(experience, actor, self.critic, metrics)
            return
        for name in self.residence.order(self.steps_done):
            acting, valuing = (actor, None) if name == "actor" else (None, self.critic)
            if acting or valuing:
                with self._phase(metrics, update_of(name)):
                    self._epochs(experience, acting, valuing, metrics)

    @contextmanager
    def _phase(self, metrics: StepMetrics, phase: Phase) -> Iterator[None]:
        """A phase, timed, once the states of actor and critic are where it wants them."""
        with metrics.time("swap"):
            self.residence.enter(phase)
        with metrics.phase(phase):
            yield
        report_states(metrics, phase, self.residence.device_bytes())

    def _epochs(
        self,
        experience: Experience,
        actor: Actor | None,
        critic: Critic | None,
        metrics: StepMetrics,
    ) -> None:
        epochs, size = self.ppo.passes("actor" if actor else "critic")
        ranks = distributed.world_size()
        updates = 0  # of the actor
        for epoch in range(epochs):
            seed = (self.config.run.seed * 1_000_003 + self.steps_done) * 1_000 + epoch
            for minibatch in minibatches(experience, size, ranks, seed):
                drift = self._optimize(minibatch, actor, critic, metrics, first=not updates)
                if actor:
                    updates += 1
                    metrics.add_value("policy/optimizer_steps", updates)
                    actor = None if self._drifted_too_far(drift) else actor
                if not (actor or critic):
                    return

    def _optimize(
        self,
        minibatch: Experience,
        actor: Actor | None,
        critic: Critic | None,
        metrics: StepMetrics,
        *,
        first: bool,
    ) -> Tensor:
        """One optimizer step of `actor`, `critic` or both; returns report_policy's sums."""
        ppo = self.ppo
        tokens = distributed.global_sum(minibatch.response_mask.sum())
        rows = len(minibatch) * distributed.world_size()
        trained = [role for role in (actor, critic) if role]
        budget = train_budget(ppo, trained)
        pieces = micro_batches(minibatch, budget)
        report_batches(metrics, pieces, budget)
        drift = torch.zeros(2, dtype=torch.float64, device=minibatch.prompt_ids.device)
        seen: dict[str, list[Piece]] = {"actor": [], "critic": []}
        for i, micro in enumerate(trace.each("micro-batch", pieces)):
            last = i == len(pieces) - 1
            weights = token_weights(micro.response_mask, ppo.loss_aggregation, rows, tokens)
            if actor:
                policy_weights = self._policy_weights(micro, weights, rows)
                loss, stats = actor.loss(micro, policy_weights)
                actor.backward(loss, last=last and not ppo.ptx_coef)
                seen["actor"].append(Piece(micro, loss.detach(), stats["logprobs"]))
                drift += report_policy(metrics, micro, stats, policy_weights, first=first)
                report_loss(metrics, "loss/policy_avg", loss, len(pieces))
            if critic:
                loss, stats = critic.loss(micro, weights)
                seen["critic"].append(Piece(micro, loss.detach(), stats["values"]))
                joint = ppo.update == "joint"  # also while the actor is out
                critic.backward(loss * ppo.vf_coef if joint else loss, last=last)
                report_loss(metrics, "loss/value_avg", loss, len(pieces))
                metrics.add_mean("val/clipfrac_avg", stats["clipped"])
        if actor:
            self._pretrain(metrics)
            metrics.add_value("lr", actor.learning_rate)
            self._step("actor", actor, seen["actor"], metrics)
        if critic:
            metrics.add_value("critic/lr", critic.learning_rate)
            self._step("critic", critic, seen["critic"], metrics)
        return drift

    def _step(self, name: str, role: Trained, pieces: list[Piece], metrics: StepMetrics) -> None:
        """Applies the gradients of `pieces`, or drops them where they are not finite."""
        self.guards.check_reached(name, role.unreached())
        norm = role.step()
        metrics.add_value(f"{name}/grad_norm", norm)
        self.guards.check_norm(name, norm, pieces)

    def _pretrain(self, metrics: StepMetrics) -> None:
        """PPO-ptx: pretraining gradients into the same optimizer step."""
        if not self.ppo.ptx_coef:
            return
        assert self.roles.pretrain, "ptx_coef without a stream of text"
        tokens = self.roles.pretrain.next_batch().to(metrics.device)
        in_step = tokens[:, 1:].numel() * distributed.world_size()
        rows, budget = self.ppo.micro_batch_size or len(tokens), self.ppo.micro_tokens
        if budget is not None:
            rows = min(rows, max(1, budget // tokens.shape[1]))
        pieces = tokens.split(rows)
        for i, piece in enumerate(pieces):
            loss = self.actor.pretrain_loss(piece, in_step)
            self.actor.backward(loss, last=i == len(pieces) - 1)
            report_loss(metrics, "loss/ptx_avg", loss, len(pieces))

    def _old_logprobs(self, rollout: Rollout, metrics: StepMetrics) -> Tensor:
        """log pi_old from the training path, or the sampler's where the run trusts it.

        Trusted log-probs are checked on the first rows of every step.
        """
        trust = self.ppo.old_logprobs == "rollout"
        checked = next(rollout.split(CHECKED_ROWS)) if trust else rollout
        logprobs = self.actor.logprobs(checked)
        error = (logprobs - checked.rollout_logprobs).abs()
        metrics.add_mean("rollout/logprob_error_mean", error, checked.response_mask)
        metrics.add_max("rollout/logprob_error_max", error, checked.response_mask)
        if not trust:
            return logprobs
        live = checked.response_mask.sum()
        sums = distributed.global_sum(torch.stack([error.sum(), live.float()]))
        mean = float(sums[0] / sums[1])
        if mean > self.ppo.max_logprob_error:
            raise ValueError(
                f"ppo.old_logprobs=rollout: the sampler's log-probs are off by {mean:.3g} nats on "
                f"average, above ppo.max_logprob_error={self.ppo.max_logprob_error}; use train"
            )
        return rollout.rollout_logprobs

    def _policy_weights(self, micro: Experience, weights: Tensor, rows: int) -> Tensor:
        """Token weights of the policy's loss; `weights` are the critic's."""
        if self.ppo.policy_loss == "dr_grpo":
            weights = micro.response_mask / (rows * self.config.sampling.max_new_tokens)
        if not self.ppo.corrections:
            return weights
        return weights * self._correction(micro).factors

    def _correction(self, of: Experience) -> Correction:
        return correct_rollout(of.logprobs, of.rollout_logprobs, of.response_mask, self.ppo)

    def _drifted_too_far(self, drift: Tensor) -> bool:
        if self.ppo.target_kl is None:
            return False
        kl, tokens = distributed.global_sum(drift).tolist()
        return tokens > 0 and kl / tokens > self.ppo.target_kl
