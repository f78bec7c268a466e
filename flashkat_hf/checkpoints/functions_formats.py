"""The learned functions as text: a table, LaTeX, JSON, and sympy, NumPy and C source.

Every number of a formula is written so that reading it gives the same float64, but in the table, where
`digits` says how many; source code evaluates by Horner's rule, as the operator does.
"""

import re
from collections.abc import Sequence
from typing import Any

from ..files import to_json
from ..messages import needs
from .command_options import FORMATS
from .functions import LearnedFunction

NOTE = "no function has a pole: each denominator is 1 plus terms that are never negative"
C_HELPERS = {
    "relu": "static double relu(double u) { return u > 0.0 ? u : 0.0; }",
    "leaky_relu": "static double leaky_relu(double u, double slope) { return u < 0.0 ? slope * u : u; }",
    "gelu": "static double gelu(double u) { return 0.5 * u * (1.0 + erf(u * 0.70710678118654752440)); }",
    "silu": "static double silu(double u) { return u / (1.0 + exp(-u)); }",
    "sigmoid": "static double sigmoid(double u) { return 1.0 / (1.0 + exp(-u)); }",
}
NUMPY_HELPERS = {
    "relu": "def relu(u):\n    return np.maximum(u, 0.0)",
    "leaky_relu": "def leaky_relu(u, slope):\n    return np.where(u < 0.0, slope * u, u)",
    "gelu": "def gelu(u):\n    return 0.5 * u * (1.0 + np.vectorize(math.erf)(u * math.sqrt(0.5)))",
    "silu": "def silu(u):\n    return u / (1.0 + np.exp(-u))",
    "tanh": "def tanh(u):\n    return np.tanh(u)",
    "sigmoid": "def sigmoid(u):\n    return 1.0 / (1.0 + np.exp(-u))",
}
SOURCES = {
    "images": "that of the inputs on the images (0.1% to 99.9%)",
    "noise": "that of the inputs on noise with the spectrum of photographs (0.1% to 99.9%)",
    "assumed": "assumed, no input was measured",
}


def write_functions(functions: Sequence[LearnedFunction], format: str, digits: int = 4) -> str:
    """Return the functions as text in one of `FORMATS`.

    Args:
        functions: of `model_functions`.
        format: "table", "latex", "json", "sympy", "numpy" or "c".
        digits: of the numbers in the table, 1 to 17; 17 give each float64 back.

    Raises:
        ValueError: another format or number of digits, or sympy is needed and not installed.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; known are {', '.join(FORMATS)}")
    if not 1 <= digits <= 17:
        raise ValueError(f"digits must be 1 to 17, not {digits}")
    if format == "table":
        return table(functions, digits)
    if format == "json":
        return to_json({"note": NOTE, "functions": [properties(function) for function in functions]})
    lines = {"latex": _latex, "sympy": _sympy, "numpy": _numpy, "c": _c}[format](functions)
    return "\n".join(lines) + "\n"


def properties(function: LearnedFunction) -> dict[str, Any]:
    """Return all that is known of a function, as JSON has it."""
    nearest, distance = function.nearest
    low, high = function.range
    return {
        "label": function.label,
        "module": function.module,
        "layer": function.layer,
        "act": function.act,
        "group": function.group,
        "function": function.name,
        "coefficients": list(function.coefficients),
        "numerator": list(function.rows[0]) if function.rows else None,
        "denominator": list(function.rows[1]) if function.rows else None,
        "start": function.init,
        "inputs": {"from": function.inputs.source, "range": [low, high]},
        "poles": list(function.poles),
        "asymptotes": [line._asdict() if line else None for line in function.asymptotes],
        "zeros": list(function.zeros),
        "extrema": [place._asdict() for place in function.extrema],
        "lipschitz": function.lipschitz,
        "spread": function.spread,
        "distance_to_start": function.distance_to_start,
        "nearest": {"function": nearest, "distance": distance},
        "coefficients_that_matter": function.num_mattering,
    }


def table(functions: Sequence[LearnedFunction], digits: int = 4) -> str:
    """Return a line for each function: its properties, and its formula at the end.

    Zeros and extrema outside the range are left out; an asymptote is written as the line itself.
    """
    number = lambda value: f"{value:.{min(digits, 4)}g}"  # noqa: E731
    header = ("layer", "act", "group", "range", "zeros", "extrema", "Lipschitz", "asymptotes", "from start")
    rows: list[tuple[str, ...]] = [(*header, "nearest", "matter", "y =")]
    for function in functions:
        low, high = function.range
        places = [place for place in function.extrema if low <= place.x <= high]
        nearest, distance = function.nearest
        rows.append(
            (
                "-" if function.layer is None else str(function.layer),
                function.act,
                str(function.group),
                f"{number(low)}..{number(high)}",
                " ".join(number(x) for x in function.zeros if low <= x <= high) or "-",
                " ".join(f"{place.kind[:3]} {number(place.y)} at {number(place.x)}" for place in places)
                or "-",
                number(function.lipschitz),
                " | ".join(_straight(line, number) for line in function.asymptotes),
                number(function.distance_to_start),
                f"{nearest} {number(distance)}",
                f"{function.num_mattering} of {sum(value != 0 for value in function.coefficients)}",
                formula(function, digits),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    ]
    sources = {function.inputs.source: SOURCES[function.inputs.source] for function in functions}
    return "\n".join([*lines, f"{NOTE}; the range is {' or '.join(sources.values())}"])


def formula(function: LearnedFunction, digits: int = 17) -> str:
    """Return a formula for people and Python, such as "(0.5 x + 0.25 x^2) / (1 + 0.1 |x|)"."""
    number = lambda value: f"{value:.{digits}g}"  # noqa: E731
    if function.rows is None:
        p, q, r, s, *leak = (number(value) for value in function.coefficients)
        leaking = f", slope {leak[0]}" if leak else ""
        return f"{r} {function.name}({p} x + {q}{leaking}) + {s}".replace("+ -", "- ")
    numerator, denominator = function.rows
    above = _polynomial(numerator, 0, number, ("", " x", " x^{}")) or "0"
    below = _polynomial(denominator, 1, number, ("", " |x|", " |x|^{}"))
    return f"({above}) / (1 + {below})" if below else above


def _latex(functions: Sequence[LearnedFunction]) -> list[str]:
    names = (function.label.replace("_", r"\_") for function in functions)
    lines = zip(names, map(latex, functions), strict=True)
    body = [rf"f_{{\mathrm{{{name}}}}}(x) &= {text} \\" for name, text in lines]
    return [r"\begin{align*}", *body, r"\end{align*}"]


def latex(function: LearnedFunction) -> str:
    """Return a formula in LaTeX, with every digit that a float64 needs."""
    if function.rows is not None:
        numerator, denominator = function.rows
        above = _polynomial(numerator, 0, _latex_number, ("", r"\, x", r"\, x^{{{}}}")) or "0"
        below = _polynomial(
            denominator, 1, _latex_number, ("", r"\, \left|x\right|", r"\, \left|x\right|^{{{}}}")
        )
        return rf"\frac{{{above}}}{{1 + {below}}}" if below else above
    p, q, r, s, *leak = (_latex_number(value) for value in function.coefficients)
    inner = rf"{p}\, x + {q}".replace("+ -", "- ")
    name = function.name.replace("_", r"\_")
    name = rf"\operatorname{{{name}}}" + (f"_{{{leak[0]}}}" if leak else "")
    return rf"{r}\, {name}\left({inner}\right) + {s}".replace("+ -", "- ")


def _latex_number(value: float) -> str:
    mantissa, _, exponent = repr(value).partition("e")
    return rf"{mantissa} \cdot 10^{{{int(exponent)}}}" if exponent else mantissa


def _polynomial(coefficients: Sequence[float], lowest: int, number, powers: tuple[str, str, str]) -> str:
    """Return the terms that are not 0, lowest power first; `powers` has the texts of x^0, x^1 and x^k."""
    terms = [
        number(value) + powers[min(power, 2)].format(power)
        for power, value in enumerate(coefficients, lowest)
        if value
    ]
    return " + ".join(terms).replace("+ -", "- ")


def _sympy(functions: Sequence[LearnedFunction]) -> list[str]:
    text = needs("sympy", "functions").sstr
    return [
        "from sympy import *",
        "",
        'x = Symbol("x", real=True)',
        "functions = {",
        *(
            f'    "{function.label}": {_floats(text(function.sympy(), full_prec=True))},'
            for function in functions
        ),
        "}",
    ]


def _floats(expression: str) -> str:
    """Return an expression whose decimal numbers are sympy's, which keep 17 digits, in place of Python's."""
    return re.sub(r"(?<![\w.])\d+\.\d*(?:e[+-]?\d+)?", lambda number: f"Float('{number[0]}', 17)", expression)


def _numpy(functions: Sequence[LearnedFunction]) -> list[str]:
    lines = ["import math", "", "import numpy as np", ""]
    for name in sorted({function.name for function in functions} & NUMPY_HELPERS.keys()):
        lines += ["", *NUMPY_HELPERS[name].split("\n"), ""]
    for function in functions:
        absolute = ["    u = np.abs(x)"] if function.rows and any(function.rows[1]) else []
        start = "0.0 * x + " if function.rows and not any(function.rows[0][1:]) else ""
        code = _code(function, start)
        lines += ["", f"def {function.label}(x):", *absolute, f"    return {code}", ""]
    return lines[:-1]


def _c(functions: Sequence[LearnedFunction]) -> list[str]:
    helpers = sorted({function.name for function in functions} & C_HELPERS.keys())
    lines = ["#include <math.h>", "", *(C_HELPERS[name] for name in helpers)]
    for function in functions:
        absolute = ["    double u = fabs(x);"] if function.rows and any(function.rows[1]) else []
        unused = [] if absolute or function.rows is None or any(function.rows[0][1:]) else ["    (void)x;"]
        code = _code(function)
        lines += ["", f"double {function.label}(double x) {{", *absolute, *unused, f"    return {code};", "}"]
    return lines


def _code(function: LearnedFunction, start: str = "") -> str:
    """Return an expression in x, and u = |x|, that is one in Python and in C."""
    if function.rows is not None:
        numerator, denominator = function.rows
        above = start + _horner(numerator, "x")
        return f"({above}) / {_horner((1.0, *denominator), 'u')}" if any(denominator) else above
    p, q, r, s, *leak = (_literal(value) for value in function.coefficients)
    return f"{r} * {function.name}({', '.join([f'{p} * x + {q}', *leak])}) + {s}"


def _horner(coefficients: Sequence[float], variable: str) -> str:
    """Return nested products such as "(1.0 + u * (0.5 + u * 0.25))"."""
    last = max((index for index, value in enumerate(coefficients) if value), default=0)
    text = _literal(coefficients[last])
    for value in reversed(coefficients[:last]):
        text = f"({_literal(value)} + {variable} * {text})"
    return text


def _literal(value: float) -> str:
    return f"({value!r})" if value < 0 else repr(value)


def _straight(line, number) -> str:
    """Return a line such as "0.5 x - 1", or why there is none."""
    if line is None:
        return "faster than x"
    slope = f"{number(line.slope)} x" if line.slope else ""
    if slope and not line.intercept:
        return slope
    return f"{slope} + {number(line.intercept)}".replace("+ -", "- ") if slope else number(line.intercept)
