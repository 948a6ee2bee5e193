"""The three GEMMs of a language-model head, in row chunks of a fixed byte budget.

    y = hidden weight^T + bias                       logits: one fp32 buffer [C,V], used again
    dL/dy = diag(s) E                                what an epilogue makes of the chunk
    dhidden = diag(s) (E weight)    dweight += E^T (diag(s) hidden)    dbias += E^T s

Logits are fp32 whatever the weights are: rounding them to bf16 moved 58 % of the ratios of a small
model by more than 1 %. The row factor s stays outside the large matrix. Rows with s = 0 (clipped)
leave both gradient GEMMs exactly: rows from the end move into their places.

16-bit weights on a GPU go to the tensor cores as they are, with fp32 output. The CPU has no such
GEMM: weights are widened a slice at a time.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from gearshift.kernels import arguments, dispatch
from gearshift.kernels.head.scores import LogitMap, Scores, score_torch_, score_triton

ALIGNMENT = 128  # elements: the row stride of buffers, so that every row loads 128 bits at a time
CUDA_LOGITS_BYTES = 2 << 30  # 2353 rows at V = 152064 in bf16: dhidden alone fills the GPU
CPU_LOGITS_BYTES = 64 << 20  # 341 rows at V = 49152: as fast as 1365 (H = 64 and 576)
TILE_ROWS = 128  # of a GPU's GEMM: a chunk of 1667 rows costs as much as one of 1792
WIDENED_BYTES = 32 << 20  # the fp32 copy of a slice of 16-bit weights on a CPU
MOVED_BYTES = 64 << 20


class LogitGradient(NamedTuple):
    """dL/dy = diag(scale) matrix: [C,V] in the GEMMs' dtype, f32 [C]. Scale 0: no gradient.

    live: how many scales are not 0, where that has been read back already.
    """

    matrix: torch.Tensor
    scale: torch.Tensor
    live: int | None = None


@dataclasses.dataclass(frozen=True)
class Head:
    """A projection to the vocabulary, what is done to its logits, and how it is to be computed."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    logit_map: LogitMap
    backend: str
    max_logits_bytes: int

    @classmethod
    def build(
        cls,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        logit_map: LogitMap,
        max_logits_bytes: int | None,
        backend: str,
    ) -> "Head":
        """Checks the tensors against each other; None takes the device's default budget."""
        arguments.check_matrix("hidden", hidden, hidden.device)
        arguments.check_matrix("weight", weight, hidden.device)
        if 0 in weight.shape:
            raise ValueError(f"weight has shape {list(weight.shape)}: it holds no token")
        if hidden.shape[1] != weight.shape[1]:
            raise ValueError(
                f"weight has shape {list(weight.shape)}: must be [V, {hidden.shape[1]}], "
                f"as hidden is {list(hidden.shape)}"
            )
        if hidden.dtype != weight.dtype:
            raise ValueError(f"weight is {weight.dtype}, hidden is {hidden.dtype}: cast one")
        if bias is not None:
            arguments.check_tensor("bias", bias, weight.shape[:1], hidden.device)
        if max_logits_bytes is None:
            max_logits_bytes = CUDA_LOGITS_BYTES if hidden.is_cuda else CPU_LOGITS_BYTES
        arguments.check_positive("max_logits_bytes", max_logits_bytes)
        backend = dispatch.resolve(backend, hidden.device)
        head = cls(weight, bias, logit_map, backend, max_logits_bytes)
        if head.chunk_rows < 1:
            raise ValueError(
                f"max_logits_bytes={max_logits_bytes}: one row of logits takes {head.row_bytes}"
            )
        return head

    @property
    def chunk_rows(self) -> int:
        """Rows of logits that the budget allows."""
        return int(self.max_logits_bytes // self.row_bytes)

    @property
    def gemm_dtype(self) -> torch.dtype:
        """Of the operands of the gradient GEMMs."""
        return self.weight.dtype if self.weight.is_cuda else torch.float32

    @property
    def row_bytes(self) -> int:
        """Buffers for one row: fp32 logits, and E where it cannot take their place."""
        separate = 0 if self.gemm_dtype == torch.float32 else self.gemm_dtype.itemsize
        return self._row_stride * (4 + separate)

    @property
    def _row_stride(self) -> int:
        return math.ceil(len(self.weight) / ALIGNMENT) * ALIGNMENT

    def beside(self, rows: int) -> int:
        """Rows of logits of a chunk where E of all `rows` is kept for one product of each gradient;
        0 where that gains nothing, or does not fit into the budget and the fp32 sum of dweight that
        it spares."""
        size = self.gemm_dtype.itemsize
        if self.backend != "triton" or size == 4 or rows <= self.chunk_rows:
            return 0
        room = self.max_logits_bytes + 4 * self.weight.numel() - rows * size * self._row_stride
        # First logits are beside E, then, without them, dweight and forms of hidden of 10 bytes.
        fitting = int(room // (4 * self._row_stride))
        last = size * self.weight.numel() + 10 * rows * self.weight.shape[1]
        enough = 2 * fitting >= self.chunk_rows and room >= last
        return fitting if enough else 0

    def chunks(self, rows: int, most: int | None = None) -> list[slice]:
        """Chunks as few and as equal as the budget and the GEMMs' tiles allow. most: rows of one,
        where not the budget's."""
        if rows == 0:
            return []
        most = most or self.chunk_rows
        tile = TILE_ROWS if self.backend == "triton" and most >= TILE_ROWS else 1
        count = math.ceil(rows / (most // tile * tile))
        step = rows if count == 1 else math.ceil(rows / count / tile) * tile
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

    def buffer(self, rows: int, dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised [rows, V] with an aligned row stride."""
        whole = torch.empty(rows, self._row_stride, dtype=dtype, device=self.weight.device)
        return whole[:, : len(self.weight)]

    def operand(self, rows: torch.Tensor) -> torch.Tensor:
        """[C,H] as the GEMMs take it."""
        return rows.to(self.gemm_dtype)

    def logits_into(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """out [C,V] fp32 = x weight^T + bias, before scale, cap and temperature."""
        for columns, weight in self.weight_slices():
            _mm(x, weight.t(), out[:, columns])
        if self.bias is not None:
            out.add_(self.bias)

    def score_(self, logits: torch.Tensor, token_ids: torch.Tensor) -> Scores:
        """Scores of a chunk [C,V]; the torch backend turns it into exp(x - max x)."""
        score = score_triton if self.backend == "triton" else score_torch_
        return score(logits, token_ids, self.logit_map)

    def weight_slices(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """(rows of the weight, their values in the GEMMs' dtype): all at once if it has that."""
        step = len(self.weight)
        if self.gemm_dtype != self.weight.dtype:
            step = max(1, WIDENED_BYTES // (4 * self.weight.shape[1]))
        for start in range(0, len(self.weight), step):
            rows = slice(start, start + step)
            yield rows, self.weight[rows].to(self.gemm_dtype)


@torch.no_grad()
def fp32_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Logits [N, V] of hidden [N, H], all at once, by the product that chunks of a loss have."""
    head = Head.build(hidden, weight, bias, LogitMap.of(1.0, None, 1.0), None, "auto")
    out = torch.empty(len(hidden), len(weight), dtype=torch.float32, device=hidden.device)
    head.logits_into(head.operand(hidden), out)
    return out


class HeadGradients:
    """Gradients of hidden, weight and bias, formed chunk by chunk; None for those not wanted.

    The weight's is accumulated in fp32 and rounded once; where all is added `at_once` the GEMM
    writes it in the weight's own dtype, from its fp32 accumulator.
    """

    def __init__(
        self, head: Head, hidden: torch.Tensor, wanted: tuple[bool, ...], *, at_once: bool
    ):
        self.head = head
        self.hidden = torch.zeros_like(hidden) if wanted[0] else None
        self._dtype = head.gemm_dtype if at_once else torch.float32
        self._wants_weight, self.weight = wanted[1], None  # made by the first part
        self.bias = torch.zeros_like(head.bias, dtype=torch.float32) if wanted[2] else None
        self._started = False

    def add(self, index: torch.Tensor, x: torch.Tensor, gradient: LogitGradient) -> None:
        """Adds a chunk: rows `index` [C] of hidden, whose operand form is x [C,H]."""
        order = move_live_rows_up_(gradient)
        matrix = gradient.matrix[: len(order)]
        index, x, scale = index[order], x[order], gradient.scale[order]
        if len(order) == 0:
            return
        if self.hidden is not None:
            self.hidden[index] = self._hidden_rows(matrix, scale).to(self.hidden.dtype)
        if self._wants_weight:
            if self.weight is None:
                self.weight = torch.empty_like(self.head.weight, dtype=self._dtype)
            scaled = (x * scale[:, None]).to(x.dtype)
            _mm(matrix.t(), scaled, self.weight, accumulate=self._started)
        if self.bias is not None:
            column = scale[:, None].to(matrix.dtype)
            _mm(matrix.t(), column, self.bias[:, None], accumulate=True)
        self._started = True

    def _hidden_rows(self, matrix: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        out = torch.empty(
            len(matrix), self.head.weight.shape[1], dtype=torch.float32, device=matrix.device
        )
        for number, (columns, weight) in enumerate(self.head.weight_slices()):
            _mm(matrix[:, columns], weight, out, accumulate=number > 0)
        return out.mul_(scale[:, None])

    def finish(self) -> tuple[torch.Tensor | None, ...]:
        """The three gradients in their tensors' dtypes; zeros where no row had any."""
        weight, self.weight, bias = self.weight, None, self.head.bias
        if weight is None and self._wants_weight:
            weight = torch.zeros_like(self.head.weight)
        return (
            self.hidden,
            None if weight is None else weight.to(self.head.weight.dtype),
            None if self.bias is None or bias is None else self.bias.to(bias.dtype),
        )


def move_live_rows_up_(gradient: LogitGradient) -> torch.Tensor:
    """Fills the places of zero-scale rows with live rows from the end, in place.

    Returns [K] int64: the original number of each of the K leading rows, all of them live. Waits
    for the device unless gradient.live is known. A moved row's place is above K, so no place is
    both read and written.
    """
    matrix, scale, count = gradient
    live = scale != 0
    order = torch.arange(len(scale), device=scale.device)
    if count is None:
        count = int(live.sum())
    if count == len(scale):
        return order
    holes = order[:count][~live[:count]]
    movers = order[count:][live[count:]]
    step = max(1, MOVED_BYTES // (matrix.shape[1] * matrix.element_size()))
    for start in range(0, len(holes), step):
        piece = slice(start, start + step)
        matrix[holes[piece]] = matrix[movers[piece]]
    order[holes] = movers
    return order[:count]


def _mm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, accumulate: bool = False) -> None:
    """out = a b (+ out), summed in fp32; 16-bit operands may have an fp32 result (CUDA only).

    Only in-place and out= forms: torch.autocast leaves those alone.
    """
    if a.dtype == out.dtype:
        if accumulate:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif accumulate:
        torch.addmm(out, a, b, out.dtype, out=out)
    else:
        torch.mm(a, b, out.dtype, out=out)
