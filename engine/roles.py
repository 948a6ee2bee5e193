"""The roles: Actor and Critic, which are trained; Reference and RewardModel, which only score.

A role hides DeepSpeed, the model's head and the memory it uses; its methods take and return the
records of batch.py, [B, R] float32 tensors with exact zeros where masked. A frozen model whose
DeepSpeed JSON offloads parameters is streamed (streaming/engine.py); else it is an ordinary ZeRO
engine without an optimizer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from gearshift.engine.attention import packed
from gearshift.engine.batch import Experience, PromptBatch, Rollout
from gearshift.engine.cluster import distributed
from gearshift.engine.cluster.progress import beat
from gearshift.engine.config.deepspeed import offloaded
from gearshift.engine.config.errors import refuse_if
from gearshift.engine.config.schema import Config, PPOConfig, SamplingConfig, TrainedConfig
from gearshift.engine.data.streams import TextStream
from gearshift.engine.gearbox.adapters import playing
from gearshift.engine.gearbox.gearbox import Gearbox
from gearshift.engine.microbatch import Budget, pieces, share
from gearshift.engine.models.heads import (
    Policy,
    ScoreModel,
    ValueModel,
    verify_head,
    verify_packing,
)
from gearshift.engine.models.reading import lay_out, lay_out_rollout
from gearshift.engine.models.scoring import forwards, policy_logprobs, put
from gearshift.engine.rewards.total import RewardSum
from gearshift.engine.rollout.padded import PaddedEngine
from gearshift.engine.rollout.responses import (
    choose_engine,
    end_token_ids,
    generate_responses,
)
from gearshift.engine.rollout.stragglers import Backlog
from gearshift.engine.streaming.engine import StreamedEngine, Traffic
from gearshift.engine.zero.layers import fetch_by_layer, place_buffers
from gearshift.engine.zero.layout import hold_gradients
from gearshift.engine.zero.optim import build_optimizer, build_schedule
from gearshift.engine.zero.sleep import Sleeper
from gearshift.engine.zero.split_adamw import share_weights
from gearshift.engine.zero.unreached import GradientWatch
from gearshift.kernels import ops


class Trained:
    """An engine with its optimizer: what Actor and Critic share."""

    def __init__(self, module: nn.Module, config: TrainedConfig, ds_config: dict, steps: int):
        """steps: optimizer steps of the whole run, for the schedule."""
        optimizer = build_optimizer(module, config.optimizer, ds_config)
        fetch_by_layer(module, ds_config, module.model, packed.trunk(module.model))
        self.engine, self.optimizer, _, self.schedule = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            lr_scheduler=build_schedule(optimizer, config.optimizer, steps),
            config=ds_config,
        )
        place_buffers(self.engine)
        hold_gradients(self.optimizer)
        if config.optimizer.name == "split_adamw":
            share_weights(self.optimizer)
        on_host = offloaded(ds_config, "optimizer") is not None
        self.sleeper = Sleeper(self.engine, config.sleep, offloaded=on_host)
        self._watch = GradientWatch(self.engine.module)
        self._finite = torch.tensor(True, device=self.engine.device)

    @property
    def learning_rate(self) -> float:
        return self.engine.get_lr()[0]

    @property
    def packs(self) -> bool:
        """Whether its rows are read end to end, without padding."""
        return self.engine.module.packs

    def prepare_to_train(self) -> None:
        """Training mode for what computes its layers again, and for dropout, which only adapters
        have (load.prepare); some routers would draw noise in it."""
        for part in self.engine.module.modules():
            part.training = isinstance(part, (GradientCheckpointingLayer, nn.Dropout))

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.engine.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that forward and backward use."""
        return next(self.engine.module.parameters()).dtype

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulates gradients of this rank's part of the loss; `last` ends the optimizer step.

        DeepSpeed averages gradients over ranks, but our losses are parts of one global sum.
        """
        assert self.sleeper.awake, "asleep; the phase before should have brought it back"
        self.engine.set_gradient_accumulation_boundary(last)
        self._finite &= torch.isfinite(loss.detach())
        if last:
            # The norm of the gradients is what all ranks share: a loss that is not finite is told
            # by it, even where its own gradient happens to be finite.
            loss = loss * torch.where(self._finite, 1.0, torch.nan)
        self.engine.backward(loss * distributed.world_size())
        beat()

    def unreached(self) -> list[str]:
        """Trainable parameters without a gradient, before the first optimizer step; then none."""
        return self._watch.unreached(self.engine.device)

    def step(self) -> float:
        """One optimizer step; returns the global gradient norm before clipping.

        A norm that is not finite says, on every rank, that the gradients were dropped: weights,
        optimizer and schedule are as they were.
        """
        self._finite.fill_(True)
        if self.engine.zero_optimization_stage():
            self.engine.step()  # ZeRO drops such gradients itself
            return float(self.engine.get_global_grad_norm())
        grads = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads))
        if math.isfinite(norm):
            self.engine.step()
            return norm
        self.engine.zero_grad()
        self.engine.skipped_steps += 1
        self.engine.global_steps += 1  # as under ZeRO
        return norm


class Actor(Trained):
    """The policy that is trained, and that generates."""

    def __init__(self, lm: nn.Module, tokenizer: Any, config: Config, ds_config: dict, steps: int):
        super().__init__(Policy(lm), config.actor, ds_config, steps)
        verify_head(self.engine)
        self.lm, self.tokenizer, self.ppo, self.config = lm, tokenizer, config.ppo, config
        self.temperature = config.sampling.temperature
        self.ends = end_token_ids(tokenizer, lm)
        kind = choose_engine(lm, config.rollout.engine, self.engine.device)
        share, problem = config.rollout.defer_stragglers, "this actor generates padded batches"
        wrong = share and kind is PaddedEngine
        refuse_if(wrong, "rollout.defer_stragglers", problem, "use 0", share)
        merged = config.actor.lora.generate != "unmerged"
        place = {"device": self.engine.device, "merged": merged}
        self.gearbox = Gearbox(self.engine, lm, config.rollout, **place)
        self.sampler = kind(
            self.gearbox.module,
            config.rollout,
            eos_token_ids=self.ends,
            pad_token_id=self.ends[0],
            tokenizer=tokenizer,
            group=self.gearbox.tp_group,
            device=self.gearbox.device,
        )

    def generate(
        self,
        prompts: PromptBatch,
        sampling: SamplingConfig,
        progress: Any = None,
        backlog: Backlog | None = None,
    ) -> Rollout:
        """One response per row; a row's tokens depend on its row_id, not on its batch or rank.

        With a backlog as many responses, of which some were begun in earlier steps.
        If it fails, training state and memory are as before, and the call can be repeated.
        """
        place = self.config.run.seed, self.gearbox.tp_group
        with self.gearbox.generation():
            try:
                rollout = generate_responses(
                    self.sampler, prompts, sampling, *place, progress, backlog
                )
            finally:
                self.sampler.rest()
        self.gearbox.wait_for_groups()
        return rollout

    @property
    def shift_seconds(self) -> float:
        """What the last change to the generation gear took."""
        return self.gearbox.stats.seconds

    def logprobs(self, rollout: Rollout) -> Tensor:
        """[B, R] log-probs of the responses under the current weights and the run's temperature."""
        budget = score_budget(self.ppo, self.engine)
        return policy_logprobs(self.engine, rollout, budget, self.temperature)

    def loss(self, micro: Experience, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's part of the policy loss, with gradient, and [N] token statistics."""
        ppo, live = self.ppo, micro.response_mask
        # Each waits for the device: here, before the trunk has given it work.
        taken = [x[live] for x in (micro.response_ids, micro.logprobs, micro.advantages, weights)]
        reference = micro.ref_logprobs[live] if ppo.kl_in == "loss" else None

        def head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple:
            return tuple(
                ops.linear_ppo_loss(
                    hidden,
                    weight,
                    *taken,
                    clip_low=ppo.clip_low,
                    clip_high=ppo.clip_high,
                    dual_clip=ppo.dual_clip,
                    temperature=self.temperature,
                    entropy_coef=ppo.entropy_coef,
                    ref_logprobs=reference,
                    kl_loss_coef=ppo.kl_coef if ppo.kl_in == "loss" else 0.0,
                    kl_estimator=ppo.kl_estimator,
                    policy_loss="ppo" if ppo.policy_loss == "dr_grpo" else ppo.policy_loss,
                    sequence_lengths=micro.lengths if ppo.policy_loss == "gspo" else None,
                    sapo_tau=(ppo.sapo_tau_pos, ppo.sapo_tau_neg),
                    bias=bias,
                    **vars(self.engine.module.options),
                )
            )

        self.prepare_to_train()
        reading, before, _ = lay_out_rollout(micro, packs=self.packs)
        loss, logprobs, entropy, clipped = self.engine(reading, before, head)
        return loss, {"logprobs": logprobs, "entropy": entropy, "clipped": clipped}

    def pretrain_loss(self, tokens: Tensor, tokens_in_step: int) -> Tensor:
        """PPO-ptx: ptx_coef times this rank's part of the mean negative log-prob of [B, T] text."""
        mask = torch.ones_like(tokens, dtype=torch.bool)
        reading, places = lay_out(tokens, mask, packs=self.packs)
        targets = tokens[:, 1:].flatten()
        weights = torch.full(
            targets.shape, self.ppo.ptx_coef / tokens_in_step, device=tokens.device
        )

        def head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            options = vars(self.engine.module.options)
            return ops.linear_cross_entropy(hidden, weight, targets, weights, bias=bias, **options)

        self.prepare_to_train()
        return self.engine(reading, places[:, :-1].flatten(), head)


class Critic(Trained):
    """The value model."""

    def __init__(self, model: nn.Module, config: Config, ds_config: dict, steps: int):
        super().__init__(ValueModel(model), config.critic, ds_config, steps)
        verify_packing(self.engine)
        self.model, self.ppo = model, config.ppo

    @torch.no_grad()
    def values(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """[B, R] values before each response token, and [B] after the last one."""
        self.engine.eval()
        parts = pieces(rollout, score_budget(self.ppo, self.engine))

        def inputs(micro: Rollout) -> tuple:
            reading, before, last = lay_out_rollout(micro, packs=self.packs)
            return reading, torch.cat([before, last])

        values = torch.zeros_like(rollout.rollout_logprobs)
        after = values.new_zeros(len(values))
        found = forwards(self.engine, (inputs(micro) for _, micro in parts))
        for (rows, micro), read in zip(parts, found, strict=True):
            put(values, rows, micro.response_mask, read[: -len(micro)])
            after[rows] = read[-len(micro) :]
        return values, after

    def loss(self, micro: Experience, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's part of the value loss, with gradient, and [N] token statistics."""
        live = micro.response_mask
        taken = [x[live] for x in (micro.values, micro.returns, weights)]  # as in Actor.loss
        self.prepare_to_train()
        reading, before, _ = lay_out_rollout(micro, packs=self.packs)
        values = self.engine(reading, before)
        loss, clipped = ops.value_loss(values, *taken, clip=self.ppo.value_clip)
        return loss, {"values": values.detach(), "clipped": clipped}


class Frozen:
    """An engine without an optimizer: what Reference and RewardModel share."""

    def __init__(self, module: nn.Module, ppo: PPOConfig, settings: dict):
        """settings: the role's DeepSpeed JSON."""
        self.engine, self.ppo = frozen_engine(module, settings), ppo
        verify = verify_head if isinstance(module, Policy) else verify_packing
        verify(self.engine)
        self._seen = Traffic()
        self.moved()  # what verifying took does not count

    def moved(self) -> dict[str, float]:
        """What streaming its weights took since the last call: `ratio`, bytes moved over the least;
        `gb`, moved by one rank. Empty where no weights moved."""
        now = replace(getattr(self.engine, "traffic", self._seen))
        new, self._seen = now - self._seen, now
        return {"ratio": new.ratio, "gb": new.bytes_moved / 1e9} if new.passes else {}


class Reference(Frozen):
    """The frozen policy that the KL is measured against."""

    def __init__(self, lm: nn.Module, ppo: PPOConfig, temperature: float, settings: dict):
        super().__init__(Policy(lm), ppo, settings)
        self.temperature = temperature

    def logprobs(self, rollout: Rollout) -> Tensor:
        """[B, R] log-probs of the responses."""
        budget = score_budget(self.ppo, self.engine)
        return policy_logprobs(self.engine, rollout, budget, self.temperature)


class ActorsStart:
    """The reference of an actor with adapters: itself, with those that it started from."""

    def __init__(self, actor: Actor, adapter: str | None):
        """adapter: the frozen copy of those it started from; None: it started without any."""
        self._actor, self._adapter = actor, adapter

    def moved(self) -> dict[str, float]:
        """Nothing: its weights are where they are."""
        return {}

    def logprobs(self, rollout: Rollout) -> Tensor:
        """[B, R] log-probs of the responses."""
        with playing(self._actor.lm, self._adapter):
            return self._actor.logprobs(rollout)


class RewardModel(Frozen):
    """A frozen sequence classifier with one label."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        ppo: PPOConfig,
        batch_size: int | None,
        settings: dict,
    ):
        """batch_size: the most rows of a forward, None: as many as ppo.score_batch_tokens holds."""
        super().__init__(ScoreModel(model), ppo, settings)
        self.tokenizer, self.batch_size = tokenizer, batch_size

    @torch.no_grad()
    def score_ids(self, sequences: list[list[int]]) -> Tensor:
        """[B] float32 scores of token sequences; every rank must pass equally many."""
        device, packs = self.engine.device, self.engine.module.packs
        budget = score_budget(self.ppo, self.engine, rows=self.batch_size)
        groups = share([len(s) for s in sequences], budget, device)

        def inputs(group: list[int]) -> tuple:
            rows = [torch.tensor(sequences[row]) for row in group]
            ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
            lengths = torch.tensor([len(row) for row in rows], device=device)[:, None]
            mask = torch.arange(ids.shape[1], device=device) < lengths
            reading, places = lay_out(ids, mask, packs=packs)
            return reading, places.gather(1, lengths - 1)[:, 0]

        scores = torch.zeros(len(sequences), device=device)
        for group, read in zip(groups, forwards(self.engine, map(inputs, groups)), strict=True):
            scores[group] = read
        return scores


def score_budget(ppo: PPOConfig, engine: Any, rows: int | None = None) -> Budget:
    """Of a forward without gradients. rows: the most, None: as ppo.score_batch_size says."""
    return _budget(ppo.score_tokens, rows or ppo.score_batch_size, engine)


def train_budget(ppo: PPOConfig, roles: Sequence[Trained]) -> Budget:
    """Of a micro-batch that `roles` train on together."""
    first, *others = (_budget(ppo.micro_tokens, ppo.micro_batch_size, r.engine) for r in roles)
    return replace(first, packed=first.packed and all(other.packed for other in others))


def _budget(tokens: int | None, rows: int | None, engine: Any) -> Budget:
    head = engine.module
    hidden = head.model.config.get_text_config().hidden_size
    return Budget(tokens=tokens, rows=rows, packed=head.packs, hidden=hidden)


def frozen_engine(module: nn.Module, settings: dict) -> deepspeed.DeepSpeedEngine | StreamedEngine:
    """An engine without an optimizer. settings: the role's DeepSpeed JSON."""
    module.requires_grad_(False)
    if offloaded(settings, "param"):
        return StreamedEngine(module, distributed.device())
    fetch_by_layer(module, settings)
    engine, *_ = deepspeed.initialize(model=module, config=settings)
    place_buffers(engine)
    engine.eval()
    return engine


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Who takes part. No critic without GAE, no reference when the KL has no weight."""

    actor: Actor
    critic: Critic | None
    reference: Reference | ActorsStart | None
    rewards: RewardSum
    pretrain: TextStream | None = None  # an endless stream of text for PPO-ptx

    def moved(self) -> dict[str, dict[str, float]]:
        """By role that only scores: figures of the weights that came to the device to do it."""
        found = self.rewards.moved()
        return found | ({"reference": self.reference.moved()} if self.reference else {})
