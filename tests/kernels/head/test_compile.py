"""The log-prob kernels as ptxas compiles them: no spills, wide loads and stores, no float64."""

import pathlib
import runpy

import pytest

pytest.importorskip("triton", reason="triton is not installed")

_tool = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "compile_report.py"))
Case, compile_kernels = _tool["Case"], _tool["compile_kernels"]

F, I, P, L = "fp32", "i32", "*fp32", "*i64"  # noqa: E741
BLOCK, WARPS = 4096, 8  # launch_shape at any vocabulary above 2048


def score(logits: str, capped: bool):
    types = {
        "logits": logits,
        "token_ids": L,
        "row_stride": I,
        "vocab": I,
        "width": I,
        "gain": F,
        "bound": F,
    }
    types |= dict.fromkeys(("logprobs", "entropy", "peaks", "log_sums"), P)
    constants = {"column_stride": 1, "CAPPED": capped, "BLOCK": BLOCK}
    kernel = "gearshift.kernels.head.scores:_score_kernel"
    return Case(kernel, types, constants, WARPS, ("vocab",))


def anchored(out: str):
    types = dict.fromkeys(("logits", "target_logits", "anchors", "sums", "moments"), P)
    types |= {"out": out, "logits_stride": I, "out_stride": I, "vocab": I, "width": I}
    types |= {"slope": F, "splits": I}
    kernel = "gearshift.kernels.head.anchored:_anchored_kernel"
    return Case(kernel, types, {"BLOCK": BLOCK}, WARPS, ("vocab", "splits"))


def gradient(out: str, capped: bool, bonus: bool):
    types = dict.fromkeys(("logits", "peaks", "log_sums", "onehots", "bases", "bonuses"), P)
    types |= {"token_ids": L, "out": out, "logits_stride": I, "out_stride": I, "width": I}
    types |= {"gain": F, "bound": F}
    constants = {"CAPPED": capped, "BONUS": bonus, "BLOCK": BLOCK}
    kernel = "gearshift.kernels.head.epilogue:_gradient_kernel"
    return Case(kernel, types, constants, WARPS)


def finalize(out: str, loss: int = 0):
    names = ("weights", "olds", "advantages", "refs", "sequences", "sums", "moments")
    types = dict.fromkeys((*names, "logprobs", "entropies", "losses", "scales"), P)
    types |= {"out": out, "token_ids": L, "clips": "*i8", "out_stride": I, "count": I}
    types["splits"] = I
    floats = ("gain", "low", "high", "clip_low", "clip_high", "dual_clip", "kl_coef")
    floats += ("tau_pos", "tau_neg")
    types |= dict.fromkeys(floats, F)
    constants = {"LOSS": loss, "DUAL": loss < 2, "KL": 3, "BLOCK": 128}
    kernel = "gearshift.kernels.head.anchored:_finalize_kernel"
    return Case(kernel, types, constants, 4, ("count", "splits"))


# (case, 128-bit loads and stores per 16 elements of a thread, register ceiling, NaN-keeping min/max
# at least: those of the interpreter always keep NaN, a GPU only where told to)
CASES = {
    "score fp32": (score(P, False), 4, 0, 88, 16),
    "score bf16 capped": (score("*bf16", True), 2, 0, 88, 16),
    "anchored fp32 in place": (anchored(P), 4, 4, 80, 32),
    "anchored fp32 to bf16": (anchored("*bf16"), 4, 2, 80, 32),
    "gradient fp32 to bf16": (gradient("*bf16", False, False), 4, 2, 40, 16),
    "gradient with bonus and cap": (gradient("*bf16", True, True), 4, 2, 48, 16),
    "finalize": (finalize("*bf16"), 0, 0, 40, 5),
    "finalize gspo": (finalize("*bf16", 1), 0, 0, 40, 5),
    "finalize cispo": (finalize("*bf16", 2), 0, 0, 40, 4),
    "finalize sapo": (finalize("*bf16", 3), 0, 0, 40, 2),
    "finalize dis": (finalize("*bf16", 4), 0, 0, 40, 4),
}


# Hopper in `make test`, the others in `make test-all`, too.
CAPABILITIES = [
    pytest.param(80, marks=pytest.mark.slow),
    90,
    pytest.param(100, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_without_spills(capability):
    reports = compile_kernels([case for case, *_ in CASES.values()], capability)
    for (name, (_, loads, stores, ceiling, keep_nan)), report in zip(
        CASES.items(), reports, strict=True
    ):
        what = f"{name}, sm_{capability}: {report}"
        assert report.stack == 0, what
        assert report.registers <= ceiling, what
        assert report.count(r"FMNMX\.NAN.*") >= keep_nan, what
        assert report.count(r"LDG.*\.128.*") == loads, what
        assert report.count(r"STG.*\.128.*") == stores, what
        assert report.count(r"D(ADD|MUL|FMA|SETP|MNMX)\b.*|F2F\.F64.*|.*\.F64\b.*") == 0, what


def test_the_report_sees_what_it_is_asked_to_forbid():
    """A row stride that is not divisible by 16 must show up as lost wide loads."""
    case = anchored("*bf16")
    (report,) = compile_kernels(
        [_tool["dataclasses"].replace(case, unaligned=("logits_stride",))], 90
    )
    assert report.count(r"LDG.*\.128.*") == 0
    assert report.count(r"LDG.*") >= 16
