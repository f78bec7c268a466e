"""The lines of the results file, looked up by case, and their numbers as text."""

from speed_tables import distinct

KAT, FLASHKAT, OURS, RELAXED = "algorithm 1", "algorithm 2", "ours", "algorithm 1, relaxed atomics"
THROUGHPUTS = {"sm": "SM", "l1": "L1", "l2": "L2", "hbm": "HBM"}
NONE = "-"


class Results:
    """The lines of the results file; of several lines of one case the last counts."""

    def __init__(self, lines: list[dict]):
        self.lines = lines

    def all(self, what: str, **keys) -> list[dict]:
        return [
            each
            for each in self.lines
            if each["what"] == what and all(each[key] == value for key, value in keys.items())
        ]

    def last(self, what: str, **keys) -> dict:
        """Return the last line of a case, or an empty one."""
        return (self.all(what, **keys) or [{}])[-1]

    def kernel(
        self, contender: str, direction: str = "backward", dtype: str = "float32", repeats: int = 1
    ) -> dict:
        """Return time and counters of a pass of the rational, as far as they were measured."""
        case = {"contender": contender, "direction": direction, "dtype": dtype, "repeats": repeats}
        return {**self.last("counters", **case), **self.last("kernel", **case)}

    def training(self, provider: str, size: str, mode: str = "eager") -> dict:
        return self.last("training", provider=provider, size=size, mode=mode)

    def error(self, contender: str, gradient: str, dtype: str = "float32", images: int | None = None) -> dict:
        lines = self.all("error", contender=contender, gradient=gradient, dtype=dtype)
        images = images or max((each["shape"][0] for each in lines), default=0)
        return ([each for each in lines if each["shape"][0] == images] or [{}])[-1]


def ratio(upper: dict, lower: dict, key: str) -> float | None:
    return upper[key] / lower[key] if key in upper and key in lower else None


def show(value: float | None, form: str = ".3g", unit: str = "") -> str:
    """Return a number as text, or a dash in its place."""
    return NONE if value is None else f"{value:{form}}{unit}"


def with_interval(result: dict, key: str, spread: str, form: str) -> str:
    """Return a number and half of its 95% interval as text."""
    if key not in result:
        return NONE
    half = result[spread]
    return f"{result[key]:{form}} ± {half:{',.0f' if half >= 10 else '.2g'}}"


def count(value: float | None) -> str:
    """Return a large number as text, with a letter for its power of ten."""
    if value is None:
        return NONE
    for size, word in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {word}"
    return f"{value:.3g}"


def measured(lines: list[dict]) -> str:
    """Return machine, versions and commits of the results."""
    keys = ("machine", "torch", "triton", "timm", "commit")
    places = distinct(tuple(str(each.get(key)) for key in keys) for each in lines)
    return "; ".join(
        f"{machine}, torch {torch}, triton {triton}, timm {timm}, commit {commit[:7]}"
        for machine, torch, triton, timm, commit in places
    )


def plain(value: float, form: str = ".3g") -> str:
    """Return a number without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:{form}}"
