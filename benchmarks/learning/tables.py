"""The tables of docs/learning.md, rendered from the results; a table for each data set and machine."""

from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import NamedTuple

from .contenders import CONTENDERS, DISTILLED, PRECISIONS, PRIMARY, RATIONAL, TIMED, UPCYCLED, VARIANTS
from .statistics import LEVEL, Difference, Summary, by_seed, detectable, difference, holm, summary

NAMES = {"fashion": "Fashion-MNIST", "digits": "scikit-learn's digits"}
NOT_RUN = "Not run yet."
DESIGNED = 5, 10, 20  # seeds
MATTERS = 0.01  # of a function's spread: a distance that counts as one


class Question(NamedTuple):
    """A primary comparison: the first contender minus the second."""

    text: str
    first: str
    second: str
    part: str = "parameters"


QUESTIONS = (
    Question("FlashKAT as released against a GELU ViT", "flashkat", "gelu"),
    Question("FlashKAT as released against a SwiGLU ViT", "flashkat", "swiglu"),
    Question("tables that learn against the same tables frozen at their start", "flashkat", "fixed"),
    Question("a numerator for each group against one for all", "separate", "flashkat"),
    Question("a ViT made a FlashKAT against that ViT, both trained on", "converted", "gelu", "upcycled"),
)


class Place(NamedTuple):
    """The data set, epochs and machine that all results of one table share."""

    data: str
    pictures: int
    epochs: int
    machine: str

    def __str__(self) -> str:
        size = f"{self.pictures:,} training pictures, {self.epochs} epochs"
        return f"**{NAMES[self.data]}, {size}; {self.machine}**"


def places(results: Sequence[dict]) -> list[Place]:
    """Return the places of the results in the order of their weight: GPUs and large sets first."""
    found = {place_of(row) for row in results if counts(row)}
    return sorted(found, key=lambda place: (place.machine.startswith("CPU"), -place.pictures))


def place_of(row: dict) -> Place:
    return Place(*(row[name] for name in Place._fields))


def counts(row: dict) -> bool:
    return not row["toy"] and row["part"] != "pilot"


class Results:
    """The results of one place."""

    def __init__(self, results: Sequence[dict], place: Place):
        self.rows = [row for row in results if counts(row) and place_of(row) == place]

    def of(self, part: str, contender: str | None = None) -> list[dict]:
        return [
            row
            for row in self.rows
            if row["part"] == part and (contender is None or row["contender"] == contender)
        ]

    def accuracy(self, part: str, contender: str) -> dict[int, float]:
        return by_seed(self.of(part, contender))


def in_each_place(results: Sequence[dict], part: str, table: Callable[[Results], list[str]]) -> str:
    """Return a table under the name of each place that has results of a part, and how they were measured."""
    blocks = []
    for place in places(results):
        here = Results(results, place)
        if here.of(part):
            blocks.append("\n".join([f"{place}\n", *table(here), "", measured(here.of(part))]))
    return "\n\n".join(blocks) or NOT_RUN


def measured(rows: Sequence[dict]) -> str:
    versions = dict.fromkeys(
        f"torch {row['torch']}, timm {row['timm']}, commit {row['commit'][:7]}" for row in rows
    )
    seconds = [row["seconds"] for row in rows if "seconds" in row]
    each = f"; {mean(seconds):.3g} s a run" if seconds else ""
    return f"{'; '.join(versions)}{each}; `python -m benchmarks.learning`."


def header(*columns: str) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def percent(value: float | None, sign: bool = False) -> str:
    return "" if value is None else f"{100 * value:{'+' if sign else ''}.2f}"


def with_error(value: Summary) -> str:
    return f"{percent(value.mean)}%" + ("" if value.error is None else f" ± {percent(value.error)}")


def signed(value: Difference | None) -> str:
    return "" if value is None else f"{percent(value.mean, sign=True)} ± {percent(value.error)}"


def chance(p: float | None) -> str:
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.2g}"


def verdict(found: Difference, p: float, tests: int) -> str:
    if p < LEVEL:
        return "better" if found.mean > 0 else "worse"
    return f"no difference seen; {percent(found.detectable(tests))} would have been"


def questions(results: Sequence[dict]) -> str:
    """Return the primary comparisons: each difference, its error, and what it says."""

    def table(here: Results) -> list[str]:
        found = [
            (question, difference(*(here.accuracy(question.part, name) for name in question[1:3])))
            for question in QUESTIONS
        ]
        answered = [(question, each) for question, each in found if each is not None]
        unanswered = [1.0] * (len(found) - len(answered))  # they count, too
        corrected = holm([each.p for _, each in answered] + unanswered)[: len(answered)]
        rows = header("question", "seeds", "difference, points", "p, corrected", "answer")
        for (question, each), p in zip(answered, corrected, strict=True):
            cells = question.text, each.count, signed(each), chance(p), verdict(each, p, len(QUESTIONS))
            rows.append(f"| {' | '.join(map(str, cells))} |")
        return rows

    return in_each_place(results, "parameters", table)


def comparison(
    here: Results, part: str, names: Sequence[str], base: tuple[str, str], timed: bool
) -> list[str]:
    """Return a row for each contender beside a base, `(part, contender)`, with Holm's correction."""
    against = here.accuracy(*base)
    present = [name for name in names if here.of(part, name)]
    gaps = {name: difference(here.accuracy(part, name), against) for name in present}
    gaps = {name: gap for name, gap in gaps.items() if gap is not None and (part, name) != base}
    corrected = dict(zip(gaps, holm([gap.p for gap in gaps.values()]), strict=True))
    effort = ("ms an update", "updates") if timed else ("parameters",)
    title = CONTENDERS[base[1]].text
    rows = header(
        "contender", *effort, "seeds", "test accuracy", f"minus {title}", "p, corrected", "loss", "diverged"
    )
    for name in present:
        runs = here.of(part, name)
        cells = [CONTENDERS[name].text]
        if timed:
            steps = here.of("steps", name) or here.of("steps", base[1])
            cells += [f"{steps[-1]['ms']:.2f}" if steps else "", f"{runs[-1]['updates']:,}"]
        else:
            cells.append(f"{runs[-1]['parameters']:,}")
        losses = [run["train_loss"] for run in runs if run["train_loss"] is not None]
        values = summary(by_seed(runs))
        cells += [str(values.count), with_error(values), signed(gaps.get(name)), chance(corrected.get(name))]
        cells += [f"{mean(losses):.3f}" if losses else "", str(sum(run["diverged"] for run in runs))]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def equal_parameters(results: Sequence[dict]) -> str:
    """Return the contenders that were trained from scratch for equally many updates."""
    names = (*PRIMARY, *VARIANTS)
    return in_each_place(
        results,
        "parameters",
        lambda here: comparison(here, "parameters", names, ("parameters", "gelu"), timed=False),
    )


def equal_time(results: Sequence[dict]) -> str:
    """Return the contenders that were trained for equally long; GELU's runs are those of the other table."""

    def table(here: Results) -> list[str]:
        base = ("parameters", "gelu")
        rows = comparison(here, "time", TIMED, base, timed=True)
        gelu = comparison(here, "parameters", ("gelu",), base, timed=True)
        return rows[:2] + gelu[2:] + rows[2:]

    return in_each_place(results, "time", table)


def variants(results: Sequence[dict]) -> str:
    """Return the variants of FlashKAT beside it as released: whether one would be a better default."""
    names = ["separate", *(name for name in VARIANTS if CONTENDERS[name].family == RATIONAL)]

    def table(here: Results) -> list[str]:
        rows = header("variant", "seeds", "equal parameters", "p, corrected", "equal time", "p, corrected")
        cells = {name: [CONTENDERS[name].text] for name in names if here.of("parameters", name)}
        for part in ("parameters", "time"):
            against = here.accuracy(part, "flashkat")
            gaps = {name: difference(here.accuracy(part, name), against) for name in cells}
            seen = {name: gap for name, gap in gaps.items() if gap is not None}
            corrected = dict(zip(seen, holm([gap.p for gap in seen.values()]), strict=True))
            for name, gap in gaps.items():
                if part == "parameters":
                    cells[name].append(str(len(here.of(part, name))))
                cells[name] += [signed(gap), chance(corrected.get(name))]
        return [*rows, *(f"| {' | '.join(row)} |" for row in cells.values())]

    return in_each_place(results, "parameters", table)


def upcycled(results: Sequence[dict]) -> str:
    """Return what became of trained ViTs, as they were and made FlashKATs."""

    def table(here: Results) -> list[str]:
        rows = comparison(here, "upcycled", UPCYCLED, ("upcycled", "gelu"), timed=False)
        before = with_error(summary(here.accuracy("source", "gelu")))
        return [*rows, "", f"The ViTs before they were trained on: {before}."]

    return in_each_place(results, "upcycled", table)


def distilled(results: Sequence[dict]) -> str:
    """Return fixed functions that were fitted to the learned ones, beside those that learn."""

    def table(here: Results) -> list[str]:
        base = ("parameters", "flashkat")
        rows = comparison(here, "distilled", DISTILLED, base, timed=False)
        others = comparison(here, "parameters", ("flashkat", "fixed"), base, timed=False)
        return rows[:2] + others[2:] + rows[2:]

    return in_each_place(results, "distilled", table)


def precision(results: Sequence[dict]) -> str:
    """Return the runs in low precision."""
    return in_each_place(
        results,
        "precision",
        lambda here: comparison(here, "precision", PRECISIONS, ("precision", "bfloat16"), timed=False),
    )


def rates(results: Sequence[dict]) -> str:
    """Return the accuracy on held-out training pictures by which the learning rates were chosen."""

    def table(here: Results) -> list[str]:
        runs = here.of("rates")
        columns = sorted({run["rate"] for run in runs})
        rows = header("held-out accuracy", *(f"{rate:g}" for rate in columns))
        for name in dict.fromkeys(run["contender"] for run in runs):
            mine = here.of("rates", name)
            means = {
                rate: mean([run["accuracy"] for run in mine if run["rate"] == rate])
                for rate in columns
                if any(run["rate"] == rate for run in mine)
            }
            best = max(means, key=lambda rate: means[rate])
            cells = [
                f"**{percent(means[rate])}%**" if rate == best else f"{percent(means.get(rate))}%"
                for rate in columns
            ]
            rows.append(f"| {CONTENDERS[name].text} | {' | '.join(cells)} |")
        return rows

    return in_each_place(results, "rates", table)


def pilot(results: Sequence[dict]) -> str:
    """Return the spread of a contender over a few seeds, and the difference that so many seeds can see."""
    rows = header("pilot", "seeds", "test accuracy", "spread", *(f"{count} seeds see" for count in DESIGNED))
    for place, name in dict.fromkeys((place_of(row), row["contender"]) for row in results):
        values = by_seed([row for row in results if (place_of(row), row["contender"]) == (place, name)])
        if len(values) < 2:
            continue
        spread = stdev(values.values())
        size = f"{NAMES[place.data]}, {place.pictures:,} pictures, {place.epochs} epochs"
        cells = [f"{CONTENDERS[name].text}; {size}", str(len(values)), with_error(summary(values))]
        cells.append(percent(spread))
        cells += [percent(detectable(count, 2**0.5 * spread, len(QUESTIONS))) for count in DESIGNED]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([*rows, "", measured(results)])


def became(results: Sequence[dict]) -> str:
    """Return how far the functions went from their start, and how many groups differ."""

    def table(here: Results) -> list[str]:
        rows = header(
            "model, activation", "from its start, by layer", "groups apart, by layer", "groups that differ"
        )
        found = here.of("functions")
        for of, name in dict.fromkeys((row["of"], row["contender"]) for row in found):
            mine = [row for row in found if (row["of"], row["contender"]) == (of, name)]
            for act in ("act1", "act2"):
                layers = [layer for layer in mine[0]["layers"] if layer.endswith(act)]
                cells = [
                    ", ".join(
                        f"{mean(mean(row['layers'][layer][what]) for row in mine):.1%}" for layer in layers
                    )
                    for what in ("distance", "apart")
                ]
                values = [
                    value for row in mine for layer in layers for value in row["layers"][layer]["apart"]
                ]
                share = mean(value > MATTERS for value in values)
                rows.append(f"| {CONTENDERS[name].text}, {act} | {' | '.join(cells)} | {share:.0%} |")
        return rows

    return in_each_place(results, "functions", table)
