"""The table of a comparison."""

from rich.table import Table

from sglang_nsa_fused.bench.compare import BETTER_LARGER, GAIN, LEAST_ROUNDS, LEVEL, LOSS, METRICS
from sglang_nsa_fused.bench.record import SIDES

STYLES = {GAIN: "green", LOSS: "red"}


def table(cases: list[dict]) -> Table:
    found = Table("case", "", "off", "p10-p90", "on", "p10-p90", "off/on", "p10-p90", "rounds", "p", "")
    before = None
    for one in cases:
        if before not in (None, one["name"].split("-len")[0]):
            found.add_section()
        before = one["name"].split("-len")[0]
        what = METRICS[one["metric"]] + (", larger is better" if one["metric"] in BETTER_LARGER else "")
        medians = [(number(one[side]), extent(one["spread"][side])) for side in SIDES]
        ratio = "" if one["ratio"] is None else f"{one['ratio']:.2f}", extent(one["ratio_spread"])
        p = f"{one['p']:.3f}" if one["p"] >= 0.001 else "<0.001"
        said = one["verdict"]
        found.add_row(one["name"], what, *medians[0], *medians[1], *ratio, str(one["samples"]), p, said, style=STYLES.get(said, ""))
    return found


def number(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def extent(values: list[float] | None) -> str:
    return "" if values is None else "-".join(map(number, values))


def notes(cases: list[dict], same_tokens: dict[str, dict]) -> list[str]:
    """What one must know to read the table."""
    found = [
        f"A gain or a loss is a difference with p below {LEVEL}, by Wilcoxon's signed-rank test over the rounds; of {round(1 / LEVEL)} "
        "rows without any difference one shows such a p by chance."
    ]
    if few := sum(one["samples"] < LEAST_ROUNDS for one in cases):
        found.append(f"In {few} rows there are fewer than {LEAST_ROUNDS} rounds, which cannot show a difference.")
    same = [name for name, one in same_tokens.items() if one["same"]]
    if same:
        found.append(f"The same tokens on both sides: {', '.join(same)}.")
    found += [f"Tokens not compared in {name}: {one['why']}." for name, one in same_tokens.items() if one["same"] is None]
    return found


def differences(same_tokens: dict[str, dict]) -> list[str]:
    return [
        f"{name}: the tokens of off and on differ: {one['why']}"
        for name, one in same_tokens.items()
        if one["same"] is False
    ]  # fmt: skip
