"""Which curves the report shows, and the cards they are shown on."""

from dataclasses import dataclass

from markupsafe import Markup

from gearshift.launch.report.data import Point, Run, condense, spans
from gearshift.launch.report.svg import Curve, line_chart, short

_MOST_POINTS = 160  # per curve; longer runs show the mean and range of consecutive steps


@dataclass(frozen=True)
class Chart:
    """One card. `band`: keys of a lower and an upper metric; `spread`: key of a deviation."""

    title: str
    about: str
    lines: dict[str, str]  # metric key -> label
    band: tuple[str, str] | None = None
    spread: str | None = None
    log: bool = False
    percent: bool = False


_CHARTS = {
    "Learning": (
        Chart(
            "Score", "mean of a step", {"objective/scores": "score"}, spread="objective/scores_std"
        ),
        Chart("KL to the reference", "nats, summed over a response", {"objective/kl": "KL"}),
        Chart(
            "Return of the objective",
            "score less the KL penalty",
            {"objective/rlhf_reward": "RLHF reward", "objective/non_score_reward": "KL penalty"},
        ),
        Chart(
            "Response length",
            "tokens; shaded: shortest to longest",
            {"response_length/mean": "mean"},
            band=("response_length/min", "response_length/max"),
        ),
        Chart(
            "Finished responses",
            "share that ended before the length limit",
            {"response/finished_fraction": "finished"},
            percent=True,
        ),
        Chart("Entropy", "nats per token", {"policy/entropy_avg": "entropy"}),
    ),
    "Optimisation": (
        Chart("Policy loss", "clipped surrogate", {"loss/policy_avg": "policy loss"}),
        Chart("Value loss", "half the squared error", {"loss/value_avg": "value loss"}),
        Chart(
            "Explained variance",
            "of the returns; a constant guess has 0",
            {"critic/vf_explained_var": "explained variance"},
        ),
        Chart(
            "Clip fraction",
            "share of tokens that the clip holds",
            {"policy/clipfrac_avg": "policy", "val/clipfrac_avg": "value"},
            percent=True,
        ),
        Chart(
            "KL of the update",
            "nats per token, to the policy that sampled",
            {"policy/approxkl_avg": "approximate KL"},
        ),
        Chart(
            "Gradient norm",
            "before clipping",
            {"actor/grad_norm": "actor", "critic/grad_norm": "critic"},
        ),
        Chart("Learning rate", "of the actor", {"lr": "learning rate"}),
        Chart(
            "KL coefficient", "weight of the KL penalty", {"objective/kl_coef": "KL coefficient"}
        ),
    ),
    "Health and speed": (
        Chart(
            "Log-prob error",
            "sampler against trainer, nats per token",
            {"rollout/logprob_error_mean": "mean", "rollout/logprob_error_max": "largest"},
            log=True,
        ),
        Chart(
            "Ratio before any update",
            "largest distance from 1: rounding only",
            {"rollout/ratio_first_max": "ratio"},
        ),
        Chart(
            "Throughput",
            "tokens per second",
            {
                "throughput/tokens_per_s": "whole step",
                "throughput/generated_tokens_per_s": "generation",
            },
        ),
        Chart(
            "Utilisation", "model FLOPs of the hardware's peak", {"perf/mfu": "MFU"}, percent=True
        ),
    ),
}


def step_names(run: Run, groups: list[range]) -> list[str]:
    """ "7", or "7–9" where a point stands for several steps."""
    steps = run.steps
    return [f"{steps[g[0]]}–{steps[g[-1]]}" if len(g) > 1 else f"{steps[g[0]]}" for g in groups]


@dataclass(frozen=True)
class Card:
    """What page.html shows of a chart. now: the latest value."""

    title: str
    now: str
    about: str
    drawing: Markup
    legend: list[tuple[str, str]]


def chart_cards(run: Run) -> dict[str, list[Card]]:
    """By heading, all charts that have at least one number."""
    groups = spans(len(run.metrics), _MOST_POINTS)
    charts = {
        "Evaluation": _evaluation_charts(run),
        **_CHARTS,
        "Learning": _CHARTS["Learning"] + _reward_charts(run),
    }
    cards = {
        heading: [card for chart in shown if (card := _card(run, chart, groups))]
        for heading, shown in charts.items()
    }
    return {heading: shown for heading, shown in cards.items() if shown}


def _reward_charts(run: Run) -> tuple[Chart, ...]:
    """The rewards one by one, where there are several."""
    lines = {key: key.split("/")[1] for key in run.keys("rewards/") if key.endswith("/mean")}
    if len(lines) < 2:
        return ()
    return (Chart("Rewards", "mean of each, before its weight", lines),)


def _evaluation_charts(run: Run) -> tuple[Chart, ...]:
    """Of every set of held-out prompts: its score beside that of training, then all the rest."""
    keys, charts = run.keys("eval/"), []
    for name in dict.fromkeys(key.split("/")[1] for key in keys):
        own = f"eval/{name}/"
        lines = {f"{own}scores": name, "objective/scores": "training, shaped"}
        charts.append(Chart(f"{name}: score", "mean over held-out prompts", lines))
        rewards = {key: key.removeprefix(f"{own}rewards/") for key in keys if "/rewards/" in key}
        rewards = {key: label for key, label in rewards.items() if key.startswith(own)}
        means = {key: label for key, label in rewards.items() if label.endswith("/mean")}
        if len(means) > 1:
            charts.append(Chart(f"{name}: rewards", "mean of each, before its weight", means))
        passed = {key: label for key, label in rewards.items() if "/pass_at_" in key}
        charts.append(Chart(f"{name}: pass@k", "one of k responses passes", passed, percent=True))
        length = {f"{own}response_length/mean": name, "response_length/mean": "training"}
        charts.append(Chart(f"{name}: response length", "tokens", length))
    return tuple(charts)


def _card(run: Run, chart: Chart, groups: list[range]) -> Card | None:
    curves = []
    for key, label in chart.lines.items():
        points = condense(run.series(key), groups)
        if any(points):
            sparse = key.startswith("eval/")
            curves.append(Curve(label, points, _band(run, chart, points, groups), sparse))
    if not curves:
        return None
    names = step_names(run, groups)
    spread = chart.spread is not None and any(run.series(chart.spread))
    return Card(
        title=chart.title,
        now=_latest(run, chart),
        about=chart.about + (" ± one deviation" if spread else ""),
        drawing=line_chart(chart.title, names, curves, log=chart.log, percent=chart.percent),
        legend=[(curve.label, "") for curve in curves],
    )


def _band(
    run: Run, chart: Chart, points: list[Point | None], groups: list[range]
) -> list[tuple[float, float] | None]:
    if chart.band:
        low, high = (condense(run.series(key), groups) for key in chart.band)
        return [(a.low, b.high) if a and b else None for a, b in zip(low, high, strict=True)]
    if chart.spread and any(run.series(chart.spread)):
        wide = condense(run.series(chart.spread), groups)
        return [
            (p.mean - s.mean, p.mean + s.mean) if p and s else None
            for p, s in zip(points, wide, strict=True)
        ]
    return [(p.low, p.high) if p and p.high > p.low else None for p in points]


def _latest(run: Run, chart: Chart) -> str:
    """The last value of the first line that has one."""
    values = [value for key in chart.lines for value in reversed(run.series(key))]
    value = next(value for value in values if value is not None)
    return f"{short(100 * value, 3)}%" if chart.percent else short(value, 3)
