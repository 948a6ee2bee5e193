"""linear_ppo_loss against float64 autograd through plain PyTorch, on both backends."""

import dataclasses

import pytest
import torch

from gearshift.kernels import dispatch, ops
from gearshift.kernels.head import projection
from gearshift.kernels.head.policy import Objective, PolicyRows
from gearshift.kernels.head.ppo import linear_ppo_reference
from gearshift.kernels.head.projection import Head, move_live_rows_up_
from gearshift.kernels.head.scores import LogitMap, logprob_entropy_reference
from tests.tiny.poison import poison_allocations

needs_triton = pytest.mark.skipif(not dispatch.HAS_TRITON, reason="no triton")
BACKENDS = ["torch", pytest.param("triton", marks=needs_triton)]
CLIP = {"clip_low": 0.2, "clip_high": 0.28}
ROW = 4 * 128  # bytes of a row of logits per 128 entries of the vocabulary


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch):
    poison_allocations(monkeypatch)


@dataclasses.dataclass
class Problem:
    """A head and the rows of a minibatch; `offset` moves the old log-probs away, in nats."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    token_ids: torch.Tensor
    columns: dict[str, torch.Tensor]
    head_options: dict

    @classmethod
    def random(
        cls, rows=33, vocab=1000, dtype=torch.float32, *, live=0.7, offset=0.0, head=None, ids=None
    ):
        draw = torch.Generator().manual_seed(rows + vocab)
        hidden = torch.randn(rows, 24, generator=draw).to(dtype)
        weight = (torch.randn(vocab, 24, generator=draw) * 0.5).to(dtype)
        token_ids = torch.randint(vocab, (rows,), generator=draw)
        if ids is not None:
            token_ids = torch.tensor(ids).repeat(rows)[:rows]
        head = dict(head or {})
        bias = torch.randn(vocab, generator=draw).to(dtype) if head.pop("bias", False) else None
        problem = cls(hidden, weight, bias, token_ids, {}, head)
        exact = problem.reference_head()
        logits = hidden.double() @ exact.weight.t()
        logprobs, _ = logprob_entropy_reference(logits, token_ids, exact.logit_map)
        keep = torch.rand(rows, generator=draw) < live
        noise = torch.randn(2, rows, generator=draw)
        problem.columns = {
            "weights": torch.rand(rows, generator=draw).add(0.1) * keep,
            "old_logprobs": (logprobs + 0.3 * noise[0] + offset).float(),
            "advantages": torch.randn(rows, generator=draw),
            "ref_logprobs": (logprobs + noise[1]).float(),
        }
        return problem

    def poisoned(self) -> "Problem":
        """The same, but nothing in rows of weight 0 can be read without harm."""
        dead = self.columns["weights"] == 0
        columns = {n: torch.where(dead, torch.nan, c) for n, c in self.columns.items()}
        columns["weights"] = self.columns["weights"]
        return dataclasses.replace(
            self,
            hidden=torch.where(dead[:, None], torch.nan, self.hidden),
            token_ids=torch.where(dead, -100, self.token_ids),
            columns=columns,
        )

    def reference_head(self, dtype=torch.float64) -> Head:
        plain = {"temperature": 1.0, "logit_softcap": None, "logit_scale": 1.0}
        logit_map = LogitMap.of(*(plain | self.head_options).values())
        bias = None if self.bias is None else self.bias.to(dtype).requires_grad_()
        return Head(self.weight.to(dtype).requires_grad_(), bias, logit_map, "torch", 1)

    def reference(self, dtype=torch.float64, **objective):
        """loss and the gradients of hidden, weight and (if any) bias, by autograd."""
        hidden, head = self.hidden.to(dtype).requires_grad_(), self.reference_head(dtype)
        rows = PolicyRows(
            Objective(**CLIP, **objective), *(c.to(dtype) for c in self.columns.values())
        )
        loss = linear_ppo_reference(hidden, head, self.token_ids, rows)
        leaves = [t for t in (hidden, head.weight, head.bias) if t is not None]
        return loss.detach(), torch.autograd.grad(loss, leaves)

    def tensors(self):
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    def leaves(self):
        return [t.clone().requires_grad_() for t in self.tensors()]

    def run(self, leaves=None, *, scale=1.0, **options):
        """PolicyLoss and the gradients, through the public op."""
        leaves = leaves or self.leaves()
        result = self.loss(leaves, **options)
        return result, torch.autograd.grad(result.loss * scale, leaves)

    def loss(self, leaves, **options):
        hidden, weight, *bias = leaves
        options = {**CLIP, **self.head_options, **self.columns, **options}
        return ops.linear_ppo_loss(
            hidden, weight, self.token_ids, bias=bias[0] if bias else None, **options
        )


def relative(found, exact):
    exact = exact.double()
    return ((found.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def assert_close_to_float64(problem, options, objective, dtype, limit):
    exact_loss, exact = problem.reference(**objective)
    _, plain = problem.reference(dtype, **objective)
    result, found = problem.run(**options, **objective)
    assert result.loss.item() == pytest.approx(exact_loss.item(), rel=2e-5, abs=1e-6)
    for gradient, right, same_dtype in zip(found, exact, plain, strict=True):
        assert gradient.dtype == dtype
        error = relative(gradient, right)
        assert error <= limit
        assert error <= 3 * relative(same_dtype, right) + 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 3e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("vocab", [129, 1000, 1024, 5003])
@pytest.mark.parametrize("rows, live, chunk", [(1, 1.0, 1), (31, 0.5, 9), (33, 1.0, 40)])
def test_gradients_match_float64(backend, dtype, limit, vocab, rows, live, chunk):
    problem = Problem.random(rows, vocab, dtype, live=live)
    options = {"backend": backend, "max_logits_bytes": chunk * -(-vocab // 128) * ROW}
    assert_close_to_float64(problem, options, {}, dtype, limit)


OBJECTIVES = {
    "dual clip": {"dual_clip": 1.5},
    "k1": {"kl_loss_coef": 0.3, "kl_estimator": "k1"},
    "k2 dual": {"kl_loss_coef": 0.3, "kl_estimator": "k2", "dual_clip": 3.0},
    "k3": {"kl_loss_coef": 0.3},
    "entropy bonus": {"entropy_coef": 0.2},
    "all": {"kl_loss_coef": 0.1, "dual_clip": 2.0, "entropy_coef": -0.05},
    "cispo": {"policy_loss": "cispo"},
    "sapo": {"policy_loss": "sapo", "kl_loss_coef": 0.1, "sapo_tau": (2.0, 3.0)},
    "dis": {"policy_loss": "dis", "entropy_coef": 0.1},
}
HEADS = {
    "plain": {},
    "cool, scaled": {"temperature": 0.7, "logit_scale": 0.5},
    "hot, capped": {"temperature": 1.3, "logit_softcap": 3.0},
    "biased, capped, scaled": {"bias": True, "logit_softcap": 4.0, "logit_scale": 2.0},
    "biased": {"bias": True},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_every_objective_on_every_head(backend, objective, head):
    problem = Problem.random(33, 1003, head=head)
    options = {"backend": backend, "max_logits_bytes": 12 * 8 * ROW}
    assert_close_to_float64(problem, options, objective, torch.float32, 4e-6)


LENGTHS = [1, 7, 3, 12, 2, 8]


def gspo_problem() -> tuple[Problem, torch.Tensor]:
    """33 rows in six sequences, each with one advantage and weights that sum to 1 / 6, and the
    sequence of each row. Mean log-ratios lie on both sides of the clip."""
    problem = Problem.random(33, 1003, live=1.0)
    of = torch.arange(6).repeat_interleave(torch.tensor(LENGTHS))
    distance = torch.tensor([0.5, -0.5, 0.02, -0.02, 0.6, -0.6])
    logprobs = problem.loss(problem.leaves()).logprobs
    noise = torch.randn(33, generator=torch.Generator().manual_seed(1))
    problem.columns |= {
        "old_logprobs": logprobs - distance[of] + 0.05 * noise,
        "advantages": torch.tensor([1.0, -2.0, 0.5, -1.0, -0.7, 1.5])[of],
        "weights": (1 / 6 / torch.tensor(LENGTHS))[of],
    }
    return problem, of


@pytest.mark.parametrize("backend", BACKENDS)
def test_gspo_is_the_loss_of_the_sequences_ratio(backend):
    """GSPO as it is defined, mean over sequences of -min(s A, clip(s) A) with s the geometric mean
    of the token ratios, by float64 autograd through s."""
    problem, of = gspo_problem()
    hidden, head = problem.hidden.double().requires_grad_(), problem.reference_head()
    logits = hidden @ head.weight.t()
    logprobs, _ = logprob_entropy_reference(logits, problem.token_ids, head.logit_map)
    log_ratio = logprobs - problem.columns["old_logprobs"].double()
    sums = torch.zeros(6, dtype=torch.float64).index_add(0, of, log_ratio)
    ratio = (sums / torch.tensor(LENGTHS)).exp()
    starts = torch.tensor(LENGTHS).cumsum(0) - 1
    advantages = problem.columns["advantages"].double()[starts]
    loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages).mean()
    exact = torch.autograd.grad(loss, [hidden, head.weight])
    options = {"policy_loss": "gspo", "sequence_lengths": LENGTHS, "backend": backend}
    result, found = problem.run(**options, max_logits_bytes=12 * 8 * ROW)
    assert result.loss.item() == pytest.approx(loss.item(), rel=2e-5)
    assert 0 < result.clipped.sum() < 33
    for gradient, right in zip(found, exact, strict=True):
        assert relative(gradient, right) < 1e-5
    _, of_tokens = problem.run(backend=backend)
    assert relative(of_tokens[0], exact[0]) > 0.01  # which PPO's is not


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_is_judged_by_its_live_rows_alone(backend):
    problem, of = gspo_problem()
    options = {"policy_loss": "gspo", "backend": backend}
    problem.columns["weights"][[2, 9, 20]] = 0
    left = problem.columns["weights"] != 0
    whole, gradients = problem.poisoned().run(sequence_lengths=LENGTHS, **options)
    lengths = [int(left[of == i].sum()) for i in range(6)]
    fewer = dataclasses.replace(
        problem,
        hidden=problem.hidden[left],
        token_ids=problem.token_ids[left],
        columns={name: column[left] for name, column in problem.columns.items()},
    )
    part, others = fewer.run(sequence_lengths=lengths, **options)
    torch.testing.assert_close(whole.loss, part.loss)
    torch.testing.assert_close(gradients[0][left], others[0])
    assert not gradients[0][~left].any()


@pytest.mark.parametrize("lengths, told", [(None, "pass the rows of each"), ([30, 4], "33 in all")])
def test_sequences_that_do_not_fit(lengths, told):
    problem, _ = gspo_problem()
    with pytest.raises(ValueError, match=f"sequence_lengths.*{told}"):
        problem.run(policy_loss="gspo", sequence_lengths=lengths, backend="torch")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, inside the interpreter
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [-15.0, 15.0, -60.0, 60.0, 300.0])
@pytest.mark.parametrize("objective", [{}, {"kl_loss_coef": 0.2, "kl_estimator": "k2"}])
def test_old_logprobs_far_off(backend, offset, objective):
    """+-15 nats stay on the anchored pass; beyond about 40 the chunk is done again in two."""
    problem = Problem.random(31, 1003, offset=offset)
    # The sign of A for which the min takes the unclipped branch: the gradient is not zero.
    problem.columns["advantages"] = problem.columns["advantages"].abs() * (1 if offset > 0 else -1)
    options = {"backend": backend, "max_logits_bytes": 12 * 8 * ROW}
    exact_loss, exact = problem.reference(**objective)
    result, found = problem.run(**options, **objective)
    assert result.loss.item() == pytest.approx(exact_loss.item(), rel=2e-5, abs=1e-9)
    for gradient, right in zip(found, exact, strict=True):
        torch.testing.assert_close(
            gradient.double(), right, rtol=1e-4, atol=1e-5 * right.abs().max().item()
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("objective", [{}, {"entropy_coef": 0.1, "kl_loss_coef": 0.1}])
def test_rows_of_weight_zero_are_never_read(backend, objective):
    problem = Problem.random(33, 1003, live=0.6)
    dead = problem.columns["weights"] == 0
    expected, gradients = problem.run(backend=backend, **objective)
    problem.token_ids[dead] = -100
    problem.hidden[dead] = torch.nan
    for name in ("old_logprobs", "advantages", "ref_logprobs"):
        problem.columns[name][dead] = torch.nan
    found, same = problem.run(backend=backend, **objective)
    assert torch.equal(found.loss, expected.loss)
    assert all(torch.equal(a, b) for a, b in zip(same, gradients, strict=True))
    assert 5 < dead.sum() < 28
    assert (same[0][dead] == 0).all() and (same[0][~dead] != 0).any(dim=1).any()
    for column in (found.logprobs, found.entropy, found.clipped):
        assert (column[dead] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("objective", [{}, {"entropy_coef": 0.1}])
def test_nan_in_one_weight_row_comes_through(backend, objective):
    """A maximum that drops NaN would turn a broken model into a plausible loss."""
    problem = Problem.random(7, 1003, live=1.0)
    problem.token_ids[:] = 5
    problem.weight[900] = torch.nan
    result, (dhidden, _) = problem.run(backend=backend, **objective)
    assert result.logprobs.isnan().all() and result.loss.isnan() and dhidden.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 7])
def test_nothing_live_keeps_the_graph(backend, rows):
    problem = Problem.random(rows, 1003, live=0.0)
    result, gradients = problem.run(backend=backend)
    assert result.loss == 0 and result.loss.requires_grad
    for gradient, tensor in zip(gradients, problem.tensors(), strict=True):
        assert gradient.shape == tensor.shape and (gradient == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs(backend):
    problem = Problem.random(33, 1003, live=1.0)
    hidden, weight = leaves = problem.leaves()
    result = problem.loss(leaves, backend=backend, max_logits_bytes=10 * 8 * ROW)
    logprobs, entropy = ops.linear_logprob(hidden, weight, problem.token_ids, backend="torch")
    torch.testing.assert_close(result.logprobs, logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(result.entropy, entropy, rtol=0, atol=1e-5)
    ratio = (logprobs - problem.columns["old_logprobs"]).exp()
    up = problem.columns["advantages"] > 0
    clipped = torch.where(up, ratio > 1 + CLIP["clip_high"], ratio < 1 - CLIP["clip_low"])
    assert torch.equal(result.clipped, clipped) and 3 < clipped.sum() < 30
    assert result.loss.requires_grad
    assert not any(t.requires_grad for t in result[1:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("objective", [{}, {"entropy_coef": 0.1}])
def test_chunks_and_compaction_change_only_rounding(backend, objective, monkeypatch):
    problem = Problem.random(33, 1003)
    whole, gradients = problem.run(backend=backend, **objective)
    for rows in (2, 16):
        result, same = problem.run(backend=backend, max_logits_bytes=rows * 8 * ROW, **objective)
        torch.testing.assert_close(result.loss, whole.loss, rtol=1e-5, atol=1e-6)
        for a, b in zip(same, gradients, strict=True):
            assert relative(a, b) < 1e-6
    monkeypatch.setattr(
        "gearshift.kernels.head.projection.move_live_rows_up_", lambda g: torch.arange(len(g.scale))
    )
    _, uncompacted = problem.run(backend=backend, **objective)
    for a, b in zip(uncompacted, gradients, strict=True):
        assert relative(a, b) < 1e-6


@pytest.mark.parametrize("objective", [{}, {"entropy_coef": 0.1}, {"policy_loss": "gspo"}])
def test_one_product_of_all_chunks_changes_only_rounding(objective, monkeypatch):
    """As where 16-bit gradients of all logits fit: here in float32, in which the interpreter is
    exact."""
    problem = Problem.random(33, 1003)
    if "policy_loss" in objective:
        objective |= {"sequence_lengths": [20, 13]}
    expected, gradients = problem.run(backend="torch", **objective)
    added, add = [], projection.HeadGradients.add
    monkeypatch.setattr(projection.Head, "beside", lambda head, rows: 9)
    monkeypatch.setattr(
        projection.HeadGradients, "add", lambda *given: added.append(len(given[1])) or add(*given)
    )
    result, same = problem.run(backend="triton", **objective)
    assert len(added) == 1 and added[0] > 9, "once, though no chunk has more than nine rows"
    torch.testing.assert_close(result.loss, expected.loss, rtol=1e-5, atol=1e-6)
    assert torch.equal(result.clipped, expected.clipped)
    for a, b in zip(same, gradients, strict=True):
        assert relative(a, b) < 1e-5


@pytest.mark.parametrize("head", [{}, {"logit_softcap": 3.0, "temperature": 0.8}])
@pytest.mark.parametrize("objective", [{}, {"entropy_coef": 0.1}])
def test_blocks_of_elementwise_passes_change_nothing(head, objective, monkeypatch):
    problem = Problem.random(33, 1003, head=head)
    expected, gradients = problem.run(backend="torch", **objective)
    logits, ids = problem.hidden @ problem.weight.t(), problem.token_ids
    scores = ops.logprob_entropy(logits, ids, backend="torch")
    monkeypatch.setattr("gearshift.kernels.head.scores.CPU_BLOCK", 4 * 1003 + 5)
    found, same = problem.run(backend="torch", **objective)
    pairs = zip((*found, *same), (*expected, *gradients), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    blocked = ops.logprob_entropy(logits, ids, backend="torch")
    assert all(torch.equal(a, b) for a, b in zip(blocked, scores, strict=True))


def test_clipped_rows_leave_the_gradient_gemms(monkeypatch):
    problem = Problem.random(33, 1003, live=1.0)
    seen = []

    def spy(gradient):
        order = move_live_rows_up_(gradient)
        seen.append((len(order), len(gradient.scale)))
        return order

    monkeypatch.setattr("gearshift.kernels.head.projection.move_live_rows_up_", spy)
    result, (dhidden, _) = problem.run(backend="torch")
    assert seen == [(int((~result.clipped).sum()), 33)]
    assert (dhidden[result.clipped] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_factor_and_accumulation(backend):
    problem = Problem.random(33, 1003)
    _, once = problem.run(backend=backend)
    _, scaled = problem.run(backend=backend, scale=-2.0)
    assert all(torch.equal(s, -2 * o) for s, o in zip(scaled, once, strict=True))
    leaves = problem.leaves()
    for factor in (0.25, 0.5):
        (problem.loss(leaves, backend=backend).loss * factor).backward()
    for leaf, o in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 0.75 * o, rtol=1e-6, atol=0)


def test_tied_weight_and_upstream_graph():
    """The weight is also the embedding, and hidden is computed from it."""
    problem = Problem.random(33, 1003)
    embedding = problem.weight.clone().requires_grad_()
    exact = problem.weight.double().requires_grad_()
    inputs = torch.arange(33) * 7
    problem.loss([torch.tanh(embedding[inputs]), embedding], backend="torch").loss.backward()
    rows = PolicyRows(Objective(**CLIP), *(c.double() for c in problem.columns.values()))
    head = Head(exact, None, LogitMap(1.0), "torch", 1)
    linear_ppo_reference(torch.tanh(exact[inputs]), head, problem.token_ids, rows).backward()
    assert relative(embedding.grad, exact.grad) < 3e-6


def test_only_what_is_asked_for_is_formed(monkeypatch):
    problem = Problem.random(33, 1003)
    hidden, weight = problem.leaves()
    _, (full_hidden, full_weight) = problem.run([hidden, weight], backend="torch")
    frozen = problem.loss([hidden, problem.weight], backend="torch").loss
    assert torch.equal(torch.autograd.grad(frozen, hidden)[0], full_hidden)
    only_head = problem.loss([problem.hidden, weight], backend="torch").loss
    assert torch.equal(torch.autograd.grad(only_head, weight)[0], full_weight)

    monkeypatch.setattr("gearshift.kernels.head.loss.HeadGradients", None)  # would raise if made
    with torch.no_grad():
        quiet = problem.loss([hidden, weight], backend="torch")
    constant = problem.loss([problem.hidden, problem.weight], backend="torch")
    assert not quiet.loss.requires_grad and not constant.loss.requires_grad
    assert torch.equal(quiet.loss, frozen.detach())


@needs_triton
def test_no_grad_agrees_across_backends():
    problem = Problem.random(33, 1003)
    with torch.no_grad():
        results = [problem.loss(problem.tensors(), backend=b) for b in ("torch", "triton")]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results, strict=True))


def test_backward_twice_is_refused():
    problem = Problem.random(7, 129, live=1.0)
    loss = problem.loss(problem.leaves(), backend="torch").loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call the loss again"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    problem = Problem.random(33, 1003, head={"bias": True})
    expected, gradients = problem.run(backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, same = problem.run(backend=backend)
    assert torch.equal(found.loss, expected.loss)
    assert all(torch.equal(a, b) for a, b in zip(same, gradients, strict=True))


def test_on_policy_ratio_is_one():
    """Old log-probs from the scoring op on the same rows: no row is clipped, loss is -sum w A."""
    problem = Problem.random(33, 1003, live=1.0)
    old, _ = ops.linear_logprob(*problem.tensors(), problem.token_ids, backend="torch")
    problem.columns["old_logprobs"] = old
    result = problem.loss(problem.tensors(), backend="torch")
    assert torch.equal(result.logprobs, old)
    expected = -(problem.columns["weights"] * problem.columns["advantages"]).sum()
    torch.testing.assert_close(result.loss, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"clip_low": -0.1}, "clip_low=-0.1"),
        ({"clip_high": float("inf")}, "clip_high=inf"),
        ({"dual_clip": 1.0}, "dual_clip=1.0"),
        ({"entropy_coef": float("nan")}, "entropy_coef=nan"),
        ({"kl_loss_coef": -1.0}, "kl_loss_coef=-1.0"),
        ({"kl_estimator": "k4"}, "kl_estimator='k4'"),
        ({"kl_loss_coef": 0.1, "ref_logprobs": None}, "ref_logprobs=None"),
        ({"max_logits_bytes": 511}, "max_logits_bytes=511: one row of logits takes 1024"),
        ({"max_logits_bytes": float("inf")}, "max_logits_bytes=inf: must be a finite"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"logit_softcap": -30.0}, "logit_softcap=-30.0"),
        ({"logit_scale": float("nan")}, "logit_scale=nan"),
        ({"backend": "cuda"}, "backend='cuda': choose one of auto"),
        ({"weights": torch.ones(6)}, r"weights has shape \[6\]: must be \[7\]"),
        ({"advantages": torch.ones(7, 1)}, r"advantages has shape \[7, 1\]"),
        ({"old_logprobs": torch.ones(7, dtype=torch.long)}, "old_logprobs is torch.int64"),
        ({"ref_logprobs": torch.ones(7, device="meta")}, "ref_logprobs is on meta"),
    ],
)
def test_bad_options_are_named(change, message):
    problem = Problem.random(7, 129)
    with pytest.raises(ValueError, match=message):
        problem.loss(problem.leaves(), **change)


def test_bad_tensors_are_named():
    problem = Problem.random(7, 129, live=1.0)
    hidden, weight = problem.leaves()
    with pytest.raises(ValueError, match=r"hidden has shape \[1, 7, 24\]"):
        problem.loss([hidden[None], weight])
    with pytest.raises(ValueError, match=r"weight has shape \[24, 129\]"):
        problem.loss([hidden, weight.t()])
    with pytest.raises(ValueError, match=r"weight has shape \[0, 24\]: it holds no token"):
        problem.loss([hidden, weight[:0]])
    with pytest.raises(ValueError, match="float16.* bfloat16 or float32"):
        problem.loss([hidden.half(), weight.half()])
    problem.token_ids[3] = 129
    with pytest.raises(ValueError, match="token_ids holds 129, outside the vocabulary 0..128"):
        problem.loss([hidden, weight])


def test_views_and_other_float_dtypes():
    problem = Problem.random(33, 1003)
    expected, gradients = problem.run(backend="torch")
    wide = torch.zeros(33, 48)
    wide[:, ::2] = problem.hidden
    problem.hidden = wide[:, ::2]
    problem.weight = problem.weight.t().contiguous().t()
    problem.columns = {n: c.double().repeat_interleave(2)[::2] for n, c in problem.columns.items()}
    problem.token_ids = problem.token_ids.int()
    found, same = problem.run(backend="torch")
    torch.testing.assert_close(found.loss, expected.loss)
    for a, b in zip(same, gradients, strict=True):
        assert relative(a, b) < 1e-6
