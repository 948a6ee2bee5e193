"""python -m pytest tests/kernels/test_compile.py

What ptxas makes of the per-token kernels: no GPU needed. The hot loops are the sampler's and the
attention's (whose 128-bit loads are asynchronous copies, LDGSTS); kl_gae is bound by its launch and
reads time backwards, so its loads stay 32-bit.
"""

import pathlib
import runpy

import pytest

from gearshift.kernels.paged_attention import STAGES

pytest.importorskip("triton", reason="cross-compiling needs the triton package")
COMPILER = runpy.run_path(str(pathlib.Path(__file__).with_name("compile_report.py")))
Case, compile_kernels = COMPILER["Case"], COMPILER["compile_kernels"]


def kl_gae(dtype, estimator, decoupled=False):
    grids = dict.fromkeys(("logprobs_ptr", "ref_ptr", "values_ptr"), dtype)
    names = ("scores_ptr", "bootstrap_ptr", "decays_ptr", "critic_decays_ptr")
    rows = dict.fromkeys(names, "*fp32")
    out = dict.fromkeys(("rewards_ptr", "advantages_ptr", "returns_ptr", "kl_ptr"), "*fp32")
    numbers = dict(R="i32", kl_coef="fp32", gamma="fp32")
    types = grids | rows | out | numbers | {"mask_ptr": "*i1"}
    constants = dict(ESTIMATOR=estimator, DECOUPLED=decoupled, LIMIT=20.0, BLOCK=1024)
    return Case("gearshift.kernels.kl_gae:_kl_gae_kernel", types, constants, unaligned=("R",))


def value_loss(dtype):
    names = ("old_ptr", "returns_ptr", "weights_ptr", "partial_ptr", "slope_ptr")
    types = dict.fromkeys(names, "*fp32")
    types |= dict(values_ptr=dtype, clipped_ptr="*i1", N="i32", clip="fp32")
    constants = dict(CLIP=True, BLOCK=1024)
    return Case("gearshift.kernels.value_loss:_value_loss_kernel", types, constants)


def sample(dtype, greedy=False, truncated=False):
    types = dict.fromkeys(("seeds_ptr", "positions_ptr", "tokens_ptr"), "*i64")
    types |= dict.fromkeys(("stride", "V", "top_k", "top_p31"), "i32")
    types |= dict(logits_ptr=dtype, logprobs_ptr="*fp32", scale="fp32")
    constants = dict(GREEDY=greedy, TOP_K=truncated, TOP_P=truncated, BITS=40, LN2=0.6931471805599)
    constants |= dict(DIGITS=8 if dtype == "*bf16" else 16, BLOCK=2048, TILES=128)
    kernel = "gearshift.kernels.sample:_sample_kernel"
    return Case(kernel, types, constants, num_warps=8, unaligned=("top_k", "top_p31"))


def attention(dtype, D, tile, softcap=False):
    types = dict.fromkeys(("query_ptr", "key_ptr", "value_ptr"), dtype)
    types |= dict.fromkeys(("tables_ptr", "lengths_ptr"), "*i32")
    types |= dict.fromkeys(("partial_ptr", "lse_ptr"), "*fp32")
    strides = (f"{x}_{y}" for x in ("key", "value") for y in ("block", "token", "head"))
    types |= dict.fromkeys(("table_width", *strides), "i32")
    types |= dict.fromkeys(("scale_log2", "softcap_log2"), "fp32")
    constants = dict(SOFTCAP=softcap, WINDOW=0, SIZE=16, GROUP=4, D=D, DV=D, D_PAD=D, DV_PAD=D)
    constants |= dict(ROWS=16, TILE=tile, CHUNK=256, UPCAST=False)
    kernel = "gearshift.kernels.paged_attention:_paged_attention_kernel"
    return Case(kernel, types, constants, num_stages=STAGES, unaligned=("table_width",))


def combine():
    pointers = ("partial_ptr", "lse_ptr", "sinks_ptr")
    types = dict.fromkeys(pointers, "*fp32") | dict(lengths_ptr="*i32", out_ptr="*bf16")
    constants = dict(SINKS=True, WINDOW=0, DV=128, DV_PAD=128, CHUNK=256)
    kernel = "gearshift.kernels.paged_attention:_combine_kernel"
    return Case(kernel, types | dict(chunks="i32"), constants, num_warps=1, unaligned=("chunks",))


KL_GAE_REGISTERS = 160  # two scans at once; a program is a row, so few of them wait for room

CASES = {  # -> (case, register ceiling, 128-bit loads at least)
    "kl_gae k1": (kl_gae("*fp32", "k1"), KL_GAE_REGISTERS, 0),
    "kl_gae k3 bf16": (kl_gae("*bf16", "k3"), KL_GAE_REGISTERS, 0),
    "kl_gae decoupled": (kl_gae("*fp32", "k1", decoupled=True), KL_GAE_REGISTERS, 0),
    "value_loss": (value_loss("*fp32"), 64, 4),
    "sample greedy": (sample("*fp32", greedy=True), 64, 2),
    "sample": (sample("*bf16"), 64, 2),
    "sample truncated": (sample("*bf16", truncated=True), 128, 4),
    "sample truncated fp32": (sample("*fp32", truncated=True), 128, 4),
    "attention 64": (attention("*bf16", 64, 64), 128, 17),
    "attention 128 softcap": (attention("*bf16", 128, 64, softcap=True), 168, 33),
    "attention 128 fp32": (attention("*fp32", 128, 16), 128, 17),
    "attention combine": (combine(), 64, 1),
}


# Hopper in `make test`, the others in `make test-all`, too.
CAPABILITIES = [
    pytest.param(80, marks=pytest.mark.slow),
    90,
    pytest.param(100, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_spill_no_double_wide_loads(capability):
    reports = compile_kernels([case for case, _, _ in CASES.values()], capability)
    for (name, (case, registers, loads)), report in zip(CASES.items(), reports, strict=True):
        assert report.stack == 0, f"{name} spills {report.stack} bytes"
        assert report.registers <= registers, f"{name}: {report.registers} registers"
        assert report.count(r"D(ADD|MUL|FMA|SETP|MNMX)\b.*|.*\bF64\b.*") == 0, name
        assert report.count(r"LDG(STS)?\..*128.*") >= loads, f"{name}: {report.opcodes}"
        if name.startswith("attention") and "bf16" in case.types.get("query_ptr", ""):
            assert report.count(r"HMMA\..*") > 0, f"{name} does not use the tensor cores"


@pytest.mark.parametrize("capability", [80, 90])
def test_attention_reads_ahead(capability):
    """Two tiles of keys and values at a time: one arrives while the other is multiplied."""
    (report,) = compile_kernels([attention("*bf16", 128, 64)], capability)
    assert report.shared >= 2 * 2 * 64 * 128 * 2
