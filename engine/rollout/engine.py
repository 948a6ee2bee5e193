"""Generation for PPO: continuous batching over a paged cache, on any Hugging Face decoder.

Takes an ordinary causal-LM module, whole or a tensor-parallel shard that all-reduces inside its
forward; knows no DeepSpeed. A response depends on its prompt, its seed and the sampling settings,
not on the batch it shares, the block size, preemption or the number of ranks (up to rounding).
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gearshift.engine.attention import paged
from gearshift.engine.attention.cache import (
    CPU_CACHE_GB,
    GPU_CACHE_SHARE,
    BlockPool,
    KVCache,
    LayerShape,
)
from gearshift.engine.cluster.progress import beat
from gearshift.engine.config.schema import RolloutConfig, SamplingConfig
from gearshift.engine.rollout.burst import Burst, Ended
from gearshift.engine.rollout.graphs import DecodeGraphs, addresses, cannot_capture
from gearshift.engine.rollout.linear import Products, generation_linear
from gearshift.engine.rollout.packing import Inputs, pack, send, to_step
from gearshift.engine.rollout.sampling import Completion, Ending, Request, Sampler, draw
from gearshift.engine.rollout.scheduler import Prefix, Scheduler, Sequence

GB = 1e9
# Longer chunks of prompts leave the CPU's caches, and decoding rows wait for them: 2 % slower.
CPU_BATCH_TOKENS = 512


class RolloutEngine(Sampler):
    """Generates responses with one module, call after call.

    module: causal LM on `device`; put back exactly as found after every call. Its weights may
    change between calls, in place or to other addresses (CUDA graphs are then captured again).
    group: the tensor-parallel group. Its ranks must make the same calls with the same arguments.
    Raises ValueError if the module cannot run paged attention (see `paged.supports`).
    """

    def __init__(
        self,
        module: nn.Module,
        config: RolloutConfig,
        **setup: Any,
    ):
        """setup: as of Sampler."""
        reason = paged.supports(module)
        if reason:
            raise ValueError(f"rollout.engine=paged: {reason}; use rollout.engine: hf")
        super().__init__(module, config, **setup)
        most = config.max_batch_tokens
        self._batch_tokens = min(most, CPU_BATCH_TOKENS) if self.device.type == "cpu" else most
        self._shapes: dict[nn.Module, LayerShape] = {}
        self._cache: Any = None  # a KVCache while there is one
        self._budget = 0  # blocks, when the cache was made
        self._graphs: DecodeGraphs | None = None
        # On a CPU a product of several layers costs as much as each of them.
        self._products = Products(module, grouped=self.device.type == "cuda")
        # A cache of a size the user chose can stay; one that takes what is free must make room.
        self._keeps = config.weights == "resident" and config.kv_cache_gb > 0
        self._use_graphs = (
            config.cuda_graphs
            and self.device.type == "cuda"
            and paged.uses_kernel(self.device)  # PyTorch's forms of our kernels read on the host
            and not cannot_capture(module)
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
        begun: list[Completion | None] | None = None,
        enough: Callable[[int], bool] | None = None,
    ) -> list[Completion]:
        """One response per prompt, in the prompts' order.

        prompts: token ids, without padding. seeds: one per prompt, of its whole response.
        limits: longest response of each prompt; None: sampling.max_new_tokens.
        progress: called with (finished, all) whenever a response ends.
        begun: what each prompt has of its response from an earlier call, to go on with.
        enough: called with the place of each response that ends; True stops generation soon, and
        what has not ended by then is returned as it is.
        Raises ValueError for a request that the model's positions or the cache cannot hold.
        """
        if not prompts:
            return []
        request = Request(prompts=prompts, sampling=sampling, seeds=seeds, limits=limits or [])
        request.check_context(self.module)
        ending = Ending(sampling, self.eos_token_ids, self.tokenizer)
        completions: dict[int, Completion] = {}
        with paged.attending(self.module), generation_linear(self.module, self._products):
            # Graphs hold the addresses of the weights that were there when they were captured.
            if self._graphs is not None and self._graphs.weights != addresses(self.module):
                self._graphs = None
            scheduler = self._schedule(request, begun or [None] * len(prompts))
            while not scheduler.done:
                for sequence, over in self._round(scheduler, sampling, ending):
                    completions[sequence.index] = Completion(
                        token_ids=sequence.response, logprobs=sequence.logprobs, finished=over
                    )
                    if progress:
                        progress(len(completions), len(prompts))
                    scheduler.stopped |= bool(enough and enough(sequence.index))
                beat()
        for sequence in (*scheduler.running, *scheduler.waiting):
            completions[sequence.index] = Completion(
                token_ids=sequence.response,
                logprobs=sequence.logprobs,
                finished=False,
                ended=False,
            )
        self.preemptions = scheduler.preemptions
        return [completions[index] for index in range(len(prompts))]

    def rest(self) -> None:
        """Gives the memory of the cache and the graphs back, unless the configuration keeps it.

        rollout.weights=resident with a rollout.kv_cache_gb keeps both at their addresses.
        """
        if not self._keeps:
            self.release()

    def release(self) -> None:
        """Gives the memory of the cache, the graphs and the grouped weights back; the next call
        makes them again."""
        self._products.release()
        self._cache = self._graphs = None
        super().free_workspaces()  # captured graphs, which use them, are gone

    def free_workspaces(self) -> None:
        """As Sampler's, but where graphs stay that use them."""
        if self._graphs is None:
            super().free_workspaces()

    @property
    def capture_seconds(self) -> float:
        """What capturing the CUDA graphs held now took; 0 without any."""
        return self._graphs.capture_seconds if self._graphs else 0.0

    @property
    def kv_bytes(self) -> int:
        """Memory of the cache held now."""
        return self._cache.bytes if self._cache else 0

    def _schedule(self, request: Request, begun: list[Completion | None]) -> Scheduler:
        prefixes: dict[tuple[int, ...], Prefix] = {}
        sequences = [
            Sequence(
                index=index,
                prefix=prefixes.setdefault(tuple(prompt), Prefix(tokens=prompt)),
                seed=seed,
                # One begun under a higher limit ends with its next token.
                limit=max(limit, len(drawn.token_ids) + 1) if drawn else limit,
                tokens=[*prompt, *(drawn.token_ids if drawn else ())],
                logprobs=[*drawn.logprobs] if drawn else [],
            )
            for index, (prompt, seed, limit, drawn) in enumerate(
                zip(request.prompts, request.seeds, request.limits, begun, strict=True)
            )
        ]
        self._open_cache(sequences)
        return Scheduler(
            sequences,
            BlockPool(self._cache.blocks),
            block_size=self.config.block_size,
            max_sequences=self.config.max_sequences,
            max_batch_tokens=self._batch_tokens,
            patient=self._use_graphs,
        )

    def _open_cache(self, sequences: list[Sequence]) -> None:
        """Has a cache of as many blocks as these sequences can use and the budget allows."""
        size = self.config.block_size
        # The last token's key is never needed; one more block for the copy of a shared one.
        needs = [-(-(len(s.prefix.tokens) + s.limit - 1) // size) for s in sequences]
        useful = sum(sorted(needs)[-self.config.max_sequences :]) + len(sequences)
        if self._cache is None or self._cache.blocks < min(useful, self._budget):
            self.release()
            self._set_budget()
        else:
            self._products.refresh()
        if self._budget < max(needs):
            least = (max(needs) + 1) * self._block_bytes / GB
            raise ValueError(
                f"rollout.kv_cache_gb={self._cache_bytes() / GB:.3g}: one sequence of "
                f"{max(needs) * size} tokens needs {least:.3g}; raise it, or lower "
                "sampling.max_new_tokens or data.max_prompt_tokens"
            )
        if self._cache is None:
            # One that will be kept takes the whole budget at once: it then never has to move.
            blocks = self._budget if self._keeps else min(useful, self._budget)
            self._cache = KVCache(self._shapes, blocks, size, self.device)

    def _set_budget(self) -> None:
        """Blocks that fit into the cache's memory now, beside its dummy block."""
        if not self._shapes:
            self._shapes = self._probe()
        self._products.refresh()
        self._budget = self._agree(int(self._cache_bytes() // self._block_bytes) - 1)

    @property
    def _block_bytes(self) -> int:
        return self.config.block_size * sum(s.bytes_per_token for s in self._shapes.values())

    def _cache_bytes(self) -> float:
        if self.config.kv_cache_gb:
            return self.config.kv_cache_gb * GB
        if self.device.type != "cuda":
            return CPU_CACHE_GB * GB
        torch.cuda.empty_cache()  # else what is left of partly used segments would count as free
        free, _ = torch.cuda.mem_get_info(self.device)
        return GPU_CACHE_SHARE * free

    def _agree(self, blocks: int) -> int:
        """The group's smallest number: free memory and heads per rank differ, schedules may not."""
        if self.group is None or dist.get_world_size(self.group) == 1:
            return blocks
        smallest = torch.tensor([blocks], device=self.device)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=self.group)
        return int(smallest)

    def _probe(self) -> dict[nn.Module, LayerShape]:
        """What each attention layer keeps per token, from a forward of one token."""
        with self._products.watching():
            found = paged.probe(self.module, self.device)
        if found.faults:
            raise ValueError(f"rollout.engine=paged: {found.faults[0]}; use rollout.engine: hf")
        return found.shapes

    def _round(
        self, scheduler: Scheduler, sampling: SamplingConfig, ending: Ending
    ) -> Iterator[Ended]:
        """One forward over what the scheduler plans, or decode steps for as long as they need no
        other plan; a token each for the sequences that are up to date. Gives those that ended."""
        batch = scheduler.next()
        batch.decode.sort(key=lambda s: s.cached)  # rows of like length attend together
        self._cache.copy(batch.copies)
        inputs, drawing = pack(batch, scheduler.table, self.config.block_size), batch.drawing
        seeds, positions = [s.seed for s in drawing], [len(s.logprobs) for s in drawing]
        if self._use_graphs and not batch.prefill:
            graphs = self._graphs_for(sampling, ending, scheduler.table)
            graphs.load(inputs, seeds, positions)
            yield from Burst(drawing, scheduler, graphs, ending).run()
            return
        logits = self._forward(inputs)
        drawn = (
            draw(logits, sampling, seeds, positions, self.group, ending.bans) if seeds else ([], [])
        )
        for sequence in batch.decode:
            scheduler.computed(sequence, 1)
        for sequence, count in batch.prefill:
            scheduler.computed(sequence, count)
        yield from self._append(zip(drawing, *drawn, strict=True), scheduler, ending)

    def _append(
        self, drawn: Iterable[tuple[Sequence, int, float]], scheduler: Scheduler, ending: Ending
    ) -> Iterator[Ended]:
        """Takes drawn tokens and their log-probs; gives the sequences that ended."""
        for sequence, token, logprob in drawn:
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
            over = ending.reached(sequence.tokens, len(sequence.logprobs))
            if over or len(sequence.logprobs) == sequence.limit:
                scheduler.finish(sequence)
                yield sequence, over

    def _graphs_for(
        self, sampling: SamplingConfig, ending: Ending, table: np.ndarray
    ) -> DecodeGraphs:
        rows, width = table.shape
        if self._graphs is None or not self._graphs.fits(sampling, rows, width):
            shape = dict(rows=rows, width=width, coarse=not self._keeps, bans=ending.bans)
            self._graphs = DecodeGraphs(self.module, self._cache, sampling, self.group, **shape)
        return self._graphs

    def _forward(self, inputs: Inputs) -> Tensor:
        """Logits [S, V] of the rows inputs.last."""
        with paged.running(to_step(inputs, self._cache)):
            output = self.module(
                input_ids=send(inputs.token_ids, self.device)[None],
                position_ids=send(inputs.positions, self.device)[None],
                use_cache=False,
                logits_to_keep=send(inputs.last, self.device),
            )
        return output.logits[0]
