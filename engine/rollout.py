"""Generation for PPO: continuous batching over a paged cache, on any Hugging Face decoder.

Takes an ordinary causal-LM module, whole or a tensor-parallel shard that all-reduces inside its
forward; knows no DeepSpeed. A response depends on its prompt, its seed and the sampling settings,
not on the batch it shares, the block size, preemption or the number of ranks (up to rounding).
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gearshift.engine import paged
from gearshift.engine.config import RolloutConfig, SamplingConfig
from gearshift.engine.decode_graph import DecodeGraphs, cannot_capture
from gearshift.engine.kv_cache import BlockPool, KVCache, LayerShape
from gearshift.engine.packing import Inputs, pack, send, to_step
from gearshift.engine.progress import beat
from gearshift.engine.sampling import Completion, Ending, Request, draw
from gearshift.engine.scheduler import Batch, Prefix, Scheduler, Sequence

GB = 1e9
CPU_CACHE_GB = 1.0
# Of the free GPU memory; the rest is for the activations of a prefill and for the logits.
GPU_CACHE_SHARE = 0.9
# MKL's fp32 product with a large weight takes longer for 7 to 15 rows than for 16 (measured on a
# 49152 x 576 head: 33, 56 and 26 ms for 8, 15 and 16 rows).
SLOW_ROWS = range(7, 16)


class RolloutEngine:
    """Generates responses with one module.

    module: causal LM on `device`; put back exactly as found after every call.
    group: the tensor-parallel group. Its ranks must make the same calls with the same arguments.
    Raises ValueError if the module cannot run paged attention (see `paged.supports`).
    """

    def __init__(
        self,
        module: nn.Module,
        config: RolloutConfig,
        *,
        eos_token_ids: list[int],
        pad_token_id: int,
        tokenizer=None,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
    ):
        reason = paged.supports(module)
        if reason:
            raise ValueError(f"rollout.engine=paged: {reason}; use rollout.engine: hf")
        self.module, self.config, self.device = module, config, torch.device(device)
        self.eos_token_ids, self.pad_token_id = eos_token_ids, pad_token_id
        self.tokenizer, self.group = tokenizer, group
        self._shapes: dict[nn.Module, LayerShape] = {}
        self._cache: KVCache | None = None
        self._graphs: DecodeGraphs | None = None
        self._use_graphs = (
            config.cuda_graphs and self.device.type == "cuda" and not cannot_capture(module)
        )
        self.preemptions = 0  # of the last call

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingConfig,
        seeds: list[int],
        *,
        limits: list[int] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """One response per prompt, in the prompts' order.

        prompts: token ids, without padding. seeds: one per prompt, of its whole response.
        limits: longest response of each prompt; None: sampling.max_new_tokens.
        progress: called with (finished, all) whenever a response ends.
        Raises ValueError for a request that the model's positions or the cache cannot hold.
        """
        if not prompts:
            return []
        request = Request(prompts=prompts, sampling=sampling, seeds=seeds, limits=limits or [])
        request.check_context(self.module)
        ending = Ending(sampling, self.eos_token_ids, self.tokenizer)
        completions: list[Completion | None] = [None] * len(prompts)
        finished = 0
        with paged.attending(self.module):
            scheduler = self._schedule(request)
            while not scheduler.done:
                for sequence, over in self._step(scheduler, sampling, ending):
                    completions[sequence.index] = Completion(
                        token_ids=sequence.response, logprobs=sequence.logprobs, finished=over
                    )
                    finished += 1
                    if progress:
                        progress(finished, len(prompts))
                beat()
        self.preemptions = scheduler.preemptions
        return completions

    def release(self) -> None:
        """Gives the memory of the cache and the graphs back; the next call makes both again.

        To be called before the weights move to other addresses, where CUDA graphs are in use.
        """
        self._cache = self._graphs = None

    @property
    def kv_bytes(self) -> int:
        """Memory of the cache held now."""
        return self._cache.bytes if self._cache else 0

    def _schedule(self, request: Request) -> Scheduler:
        prefixes: dict[tuple[int, ...], Prefix] = {}
        sequences = [
            Sequence(
                index=index,
                prefix=prefixes.setdefault(tuple(prompt), Prefix(tokens=prompt)),
                seed=seed,
                limit=limit,
                tokens=list(prompt),
            )
            for index, (prompt, seed, limit) in enumerate(
                zip(request.prompts, request.seeds, request.limits, strict=True)
            )
        ]
        self._open_cache(sequences)
        return Scheduler(
            sequences,
            BlockPool(self._cache.blocks),
            block_size=self.config.block_size,
            max_sequences=self.config.max_sequences,
            max_batch_tokens=self.config.max_batch_tokens,
        )

    def _open_cache(self, sequences: list[Sequence]) -> None:
        """Allocates as many blocks as these sequences can use and the budget allows."""
        size = self.config.block_size
        # The last token's key is never needed; one more block for the copy of a shared one.
        needs = [-(-(len(s.tokens) + s.limit - 1) // size) for s in sequences]
        useful = sum(sorted(needs)[-self.config.max_sequences :]) + len(sequences)
        if self._cache is not None and self._cache.blocks >= useful:
            return
        self.release()
        if not self._shapes:
            self._shapes = self._probe()
        per_block = size * sum(shape.bytes_per_token for shape in self._shapes.values())
        budget = self._agree(int(self._cache_bytes() // per_block) - 1)
        if budget < max(needs):
            least = (max(needs) + 1) * per_block / GB
            raise ValueError(
                f"rollout.kv_cache_gb={self._cache_bytes() / GB:.3g}: one sequence of "
                f"{max(needs) * size} tokens needs {least:.3g}; raise it, or lower "
                "sampling.max_new_tokens or data.max_prompt_tokens"
            )
        self._cache = KVCache(self._shapes, min(useful, budget), size, self.device)

    def _cache_bytes(self) -> float:
        if self.config.kv_cache_gb:
            return self.config.kv_cache_gb * GB
        if self.device.type != "cuda":
            return CPU_CACHE_GB * GB
        free, _ = torch.cuda.mem_get_info(self.device)
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return GPU_CACHE_SHARE * (free + cached)

    def _agree(self, blocks: int) -> int:
        """The group's smallest number: free memory and heads per rank differ, schedules may not."""
        if self.group is None or dist.get_world_size(self.group) == 1:
            return blocks
        smallest = torch.tensor([blocks], device=self.device)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=self.group)
        return int(smallest)

    def _probe(self) -> dict[nn.Module, LayerShape]:
        """What each attention layer keeps per token, from a forward of one token."""
        probe = paged.Probe()
        token = torch.full((1, 1), self.pad_token_id, device=self.device)
        with paged.running(probe):
            self.module(input_ids=token, position_ids=torch.zeros_like(token), use_cache=False)
        return probe.shapes

    def _step(
        self, scheduler: Scheduler, sampling: SamplingConfig, ending: Ending
    ) -> list[tuple[Sequence, bool]]:
        """One forward and one token for each sequence that is up to date; returns the ended."""
        batch = scheduler.next()
        batch.decode.sort(key=lambda s: s.cached)  # rows of like length attend together
        self._cache.copy(batch.copies)
        drawing = batch.drawing
        token_ids, logprobs = self._draw(batch, drawing, scheduler.table, sampling)
        for sequence in batch.decode:
            scheduler.computed(sequence, 1)
        for sequence, count in batch.prefill:
            scheduler.computed(sequence, count)
        ended = []
        for sequence, token, logprob in zip(drawing, token_ids, logprobs, strict=True):
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
            over = ending.reached(sequence.tokens, len(sequence.logprobs))
            if over or len(sequence.logprobs) == sequence.limit:
                scheduler.finish(sequence)
                ended.append((sequence, over))
        return ended

    def _draw(
        self,
        batch: Batch,
        drawing: list[Sequence],
        table: np.ndarray,
        sampling: SamplingConfig,
    ) -> tuple[list[int], list[float]]:
        """Computes the batch; returns a token and its log-prob for each sequence of `drawing`."""
        inputs = pack(batch, table, self.config.block_size)
        seeds = [s.seed for s in drawing]
        positions = [len(s.logprobs) for s in drawing]
        if self._use_graphs and not batch.prefill:
            return self._graphs_for(sampling, table).draw(inputs, seeds, positions)
        logits = self._forward(inputs)
        return draw(logits, sampling, seeds, positions, self.group) if seeds else ([], [])

    def _graphs_for(self, sampling: SamplingConfig, table: np.ndarray) -> DecodeGraphs:
        rows, width = table.shape
        if self._graphs is None or not self._graphs.fits(sampling, rows, width):
            self._graphs = DecodeGraphs(
                self.module, self._cache, sampling, self.group, rows=rows, width=width
            )
        return self._graphs

    def _forward(self, inputs: Inputs) -> Tensor:
        """Logits [S, V] of the rows inputs.last."""
        last = inputs.last
        if self.device.type == "cpu" and len(last) in SLOW_ROWS:
            last = np.resize(last, SLOW_ROWS.stop)
        with paged.running(to_step(inputs, self._cache)):
            output = self.module(
                input_ids=send(inputs.token_ids, self.device)[None],
                position_ids=send(inputs.positions, self.device)[None],
                use_cache=False,
                logits_to_keep=send(last, self.device),
            )
        return output.logits[0, : len(inputs.last)]
