"""Faults planted in every Triton kernel: the checks that guard a run must see each of them.

A fault is a change of the kernel's source: a store left out, a mask or a bound that is one off, a
sign or a clip the wrong way round. The check is that of checks/self_check.py, in the interpreter.
"""

import dataclasses
import importlib.util
import inspect
import pathlib
import types

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from gearshift.kernels import adamw, kl_gae, sample, value_loss
from gearshift.kernels import paged_attention as attention
from gearshift.kernels.checks import case as check_case
from gearshift.kernels.checks import self_check
from gearshift.kernels.head import anchored, epilogue
from gearshift.kernels.head import policy as policy_terms
from gearshift.kernels.head import scores as logprob
from tests.kernels.test_self_check import TINY

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, inside the interpreter

# More than one block of the vocabulary, of the responses, of the cache.
WIDE = dataclasses.replace(TINY, rows=24, vocab=5003, response=1100, context=600, logits_bytes=None)
TALL = dataclasses.replace(WIDE, batch=8)
MANY = dataclasses.replace(TINY, batch=6)


@dataclasses.dataclass(frozen=True)
class Fault:
    """`old` becomes `new` in a module's source; `case` of the check at `size` must then fail."""

    module: types.ModuleType
    case: str
    old: str
    new: str
    size: check_case.Size = TINY
    programs: int = 1024  # of the anchored kernel: 1 makes each go through all of its row


def left_out(module, case, line, size=TINY) -> Fault:
    return Fault(module, case, line, "pass", size)


PPO, BONUS, KL = "linear_ppo_loss", "linear_ppo_loss.bonus", "linear_ppo_loss.kl"
GSPO, CISPO, SAPO, DIS = (f"{PPO}.{name}" for name in ("gspo", "cispo", "sapo", "dis"))
SCORE, CAPPED = "linear_logprob", "linear_logprob.capped"
SAMPLE, TOP_P, GREEDY = "sample_tokens", "sample_tokens.top_p", "sample_tokens.greedy"
ATTEND, WINDOW = "paged_attention", "paged_attention.window"
GAE, DECOUPLED = "kl_reward_gae", "kl_reward_gae.decoupled"
VALUE, ADAMW = "value_loss", "adamw_split_step.bf16"

FAULTS = {
    "_score_kernel": [
        left_out(
            logprob, SCORE, "tl.store(logprobs + row, LN_2 * ((target - peak) * slope - log_sum))"
        ),
        Fault(logprob, SCORE, "tl.where(columns < vocab, x,", "tl.where(columns < width, x,"),
        Fault(logprob, SCORE, "total = shrink * total + e", "total = total + e", WIDE),
        Fault(logprob, SCORE, "(moment + step * total)", "(moment - step * total)", WIDE),
        Fault(
            logprob, CAPPED, "target = bound * tanh(target * gain)", "target = tanh(target * gain)"
        ),
    ],
    "_anchored_kernel": [
        left_out(
            anchored, PPO, "tl.store(out + columns, e.to(out.dtype.element_ty), columns < width)"
        ),
        Fault(anchored, PPO, "tl.where(columns < vocab, z,", "tl.where(columns < vocab - 1, z,"),
        Fault(anchored, PPO, "* slope + anchor", "* slope - anchor"),
        Fault(anchored, PPO, "moment += e * x", "moment = e * x", WIDE, programs=1),
    ],
    "_finalize_kernel": [
        left_out(anchored, PPO, "tl.store(losses + rows, loss, inside)"),
        Fault(
            anchored,
            PPO,
            "tl.load(sums + rows * splits + split,",
            "tl.load(sums + rows * splits,",
            WIDE,
        ),
        Fault(anchored, PPO, "corrected = tl.exp(old) - total", "corrected = tl.exp(old)"),
        Fault(
            anchored,
            PPO,
            "corrected.to(out.dtype.element_ty), inside)",
            "corrected.to(out.dtype.element_ty), inside & (token > 290))",
        ),
        Fault(
            anchored,
            GSPO,
            "tl.load(sequences + rows, inside, other=0.0)",
            "tl.load(olds + rows, inside, other=0.0)",
        ),
    ],
    "policy_terms": [
        Fault(
            policy_terms,
            PPO,
            "1.0 - clip_low, 1.0 + clip_high, NAN)",
            "1.0 - clip_high, 1.0 + clip_low, NAN)",
        ),
        Fault(
            policy_terms,
            PPO,
            "clipped | beyond\n            if DUAL",
            "beyond\n            if DUAL",
        ),
        Fault(
            policy_terms,
            KL,
            "tl.where(advantage < 0, dual_clip",
            "tl.where(advantage > 0, dual_clip",
        ),
        Fault(policy_terms, KL, "0.0, 1.0 - tl.exp(-near))", "0.0, tl.exp(-near) - 1.0)"),
        Fault(policy_terms, GSPO, "log_ratio = sequence", "log_ratio = logp - old"),
        Fault(policy_terms, CISPO, "dlogp = -inside * advantage", "dlogp = -plain"),
        Fault(policy_terms, CISPO, "inside * advantage * logp", "inside * advantage"),
        Fault(policy_terms, SAPO, "advantage > 0, tau_pos", "advantage > 0, tau_neg"),
        Fault(policy_terms, SAPO, "-4.0 * gate / (1.0 + tl.exp(x))", "-4.0 * gate"),
        Fault(policy_terms, DIS, "0.0, -surrogate)", "0.0, -plain)"),
    ],
    "_gradient_kernel": [
        left_out(epilogue, BONUS, "tl.store(out + columns, g.to(out.dtype.element_ty), inside)"),
        Fault(epilogue, BONUS, "columns == token, onehot", "columns == token + 1, onehot"),
        Fault(epilogue, BONUS, "slope += bonus * log_p", "slope -= bonus * log_p"),
        Fault(epilogue, "linear_ppo_loss.capped", "(1.0 - x * x)", "(1.0 + x * x)"),
        Fault(
            epilogue, "linear_cross_entropy", "inside = columns < width", "inside = columns < 128"
        ),
    ],
    "_kl_gae_kernel": [
        left_out(kl_gae, GAE, "tl.store(kl_ptr + row + t, tl.where(live, kl, 0.0), mask=t >= 0)"),
        Fault(kl_gae, GAE, "live, decay, 1.0)", "live, decay, decay)", WIDE),
        Fault(kl_gae, GAE, "live & (has_next == 0), score", "live & (t == R - 1), score"),
        Fault(kl_gae, GAE, "accumulated = b + a * advantage", "accumulated = b", WIDE),
        Fault(kl_gae, GAE, "has_next = has_next | live_after", "has_next = has_next", WIDE),
        Fault(kl_gae, DECOUPLED, "target = d + c * critic", "target = d", WIDE),
        Fault(kl_gae, DECOUPLED, "critic_decay, 1.0), delta)", "decay, 1.0), delta)"),
        Fault(kl_gae, DECOUPLED, "live, target + value", "live, accumulated + value"),
        Fault(
            kl_gae,
            DECOUPLED,
            "decay = tl.load(decays_ptr + tl.program_id(0))",
            "decay = tl.load(decays_ptr)",
            WIDE,
        ),
    ],
    "_value_loss_kernel": [
        left_out(value_loss, VALUE, "tl.store(clipped_ptr + i, clipped, mask=i < N)"),
        Fault(value_loss, VALUE, "live, 0.5 * weight * square", "i >= 0, 0.5 * weight * square"),
        Fault(value_loss, VALUE, "old - clip, old + clip, tl", "old + clip, old - clip, tl"),
        Fault(value_loss, VALUE, "tl.where(live & (clipped == 0), weight", "tl.where(live, weight"),
    ],
    "_sample_kernel": [
        left_out(sample, SAMPLE, "tl.store(tokens_ptr + row, token.to(tl.int64))"),
        Fault(sample, SAMPLE, "mask=j < V, other", "mask=j < V - 8, other"),
        Fault(sample, GREEDY, "tl.where(x > best, start", "tl.where(x < best, start", WIDE),
        Fault(sample, SAMPLE, "(base + tl.cumsum(kept, 0)", "(tl.cumsum(kept, 0)", TALL),
        Fault(sample, TOP_P, "tl.maximum(_fraction31(", "tl.maximum(2 * _fraction31(", MANY),
    ],
    "_search": [
        Fault(sample, TOP_P, "key >= found + step", "key >= found", MANY),
        Fault(sample, TOP_P, "above2, 0) >= need", "above2, 0) < need", MANY),
        Fault(sample, TOP_P, "found += digit * step", "found += step", MANY),
    ],
    "_paged_attention_kernel": [
        Fault(attention, ATTEND, "peak + tl.log2(total), mask=row < GROUP", "peak, mask=row < 0"),
        Fault(attention, ATTEND, "live = t < end", "live = t < end - 1"),
        Fault(attention, ATTEND, "acc = acc * shrink[:, None]", "acc = acc", WIDE),
        Fault(attention, WINDOW, 'score, float("-inf"))', "score, -1.0)"),
    ],
    "_combine_kernel": [
        left_out(attention, ATTEND, "tl.store(out_ptr + head * DV + dv, out, mask=dv < DV)"),
        Fault(attention, WINDOW, "peak = tl.load(sinks_ptr + h)", "peak = -tl.load(sinks_ptr + h)"),
        Fault(attention, WINDOW, "total = total * shrink + weight", "total = total + weight", WIDE),
    ],
    "_adamw_kernel": [
        left_out(adamw, ADAMW, "tl.store(low_ptr + i, low, mask=inside)"),
        Fault(adamw, ADAMW, "inside = i < N", "inside = i < N - 1"),
        Fault(adamw, ADAMW, "tl.div_rn(tl.sqrt_rn(exp_avg_sq), root)", "tl.sqrt_rn(exp_avg_sq)"),
        Fault(adamw, ADAMW, "master = master * keep", "master = master"),
    ],
}


def kernels_of(module: types.ModuleType) -> dict:
    """The @triton.jit functions of a module, helpers included."""
    return {name: x for name, x in vars(module).items() if hasattr(x, "fn") and hasattr(x, "run")}


def plant(fault: Fault, folder: pathlib.Path, monkeypatch) -> None:
    """Puts the faulty kernels in the places of the right ones, wherever those are imported."""
    source = inspect.getsource(fault.module)
    assert source.count(fault.old) == 1, f"{fault.old!r} is there {source.count(fault.old)} times"
    file = folder / f"planted_{fault.module.__name__.rpartition('.')[2]}.py"
    file.write_text(source.replace(fault.old, fault.new))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    planted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(planted)
    for name, right in kernels_of(fault.module).items():
        for module in (anchored, epilogue, fault.module):
            if vars(module).get(name) is right:
                monkeypatch.setattr(module, name, getattr(planted, name))
    monkeypatch.setattr(anchored, "PROGRAMS", fault.programs)


def problem_of(name: str, size: check_case.Size) -> str | None:
    (case,) = (case for case in self_check.CASES if case.name == name)
    generator = torch.Generator().manual_seed(3)
    return check_case.verify(case, size, torch.float32, generator, "triton")[1]


ALL = [pytest.param(f, id=f"{kernel}: {f.new}") for kernel in FAULTS for f in FAULTS[kernel]]
CHECKS = {(f.case, f.size) for found in FAULTS.values() for f in found if f.size != TINY}


@pytest.mark.parametrize("fault", ALL)
def test_a_planted_fault_is_seen(fault, tmp_path, monkeypatch):
    plant(fault, tmp_path, monkeypatch)
    assert problem_of(fault.case, fault.size)


@pytest.mark.parametrize("case, size", sorted(CHECKS, key=str))
def test_nothing_is_seen_where_nothing_is_wrong(case, size):
    """At the sizes that test_self_check.py does not use."""
    assert problem_of(case, size) is None


def test_every_kernel_has_three_faults():
    modules = {fault.module for faults in FAULTS.values() for fault in faults}
    kernels = {k for module in modules for k in kernels_of(module) if k.endswith("_kernel")}
    assert kernels <= FAULTS.keys()
    assert all(len(faults) >= 3 for faults in FAULTS.values())
