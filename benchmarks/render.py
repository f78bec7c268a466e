"""Write the README's tables from the results files; with --check, fail when the README says something else.

python benchmarks/render.py [--check]
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def rational_table(results: list[dict]) -> str:
    """Part of the copy bandwidth that each provider reaches, a row for each provider, and what was measured where."""
    results = [result for result in results if result["dtype"] == "bfloat16"]
    columns = list(dict.fromkeys((result["direction"], result["shape"][-1]) for result in results))
    rows = [
        "| bfloat16, part of the copy bandwidth | "
        + " | ".join(f"{direction}, {channels} channels" for direction, channels in columns)
        + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for provider in dict.fromkeys(result["provider"] for result in results):
        cells = [
            f"{result['of_copy']:.0%}"
            for column in columns
            for result in results
            if (result["provider"], result["direction"], result["shape"][-1]) == (provider, *column)
        ]
        rows.append(f"| {provider} | " + " | ".join(cells) + " |")
    about = results[0]
    batch, tokens, _ = about["shape"]
    rows += [
        "",
        f"{about['gpu']}, copy {about['copy_gb_per_s'] / 1000:.2f} TB/s, torch {about['torch']}, triton "
        f"{about['triton']}, {batch} x {tokens} tokens, commit {about['commit'][:7]}; "
        "`benchmarks/bench_rational.py`, float32 beside it in `benchmarks/results/rational.jsonl`.",
    ]
    return "\n".join(rows)


def render(readme: str) -> str:
    lines = (ROOT / "benchmarks/results/rational.jsonl").read_text().splitlines()
    table = rational_table([json.loads(line) for line in lines])
    markers = r"(<!-- benchmark:rational -->\n).*?(<!-- /benchmark:rational -->)"
    return re.sub(markers, lambda match: f"{match[1]}{table}\n{match[2]}", readme, flags=re.DOTALL)


def main() -> None:
    path = ROOT / "README.md"
    rendered = render(path.read_text())
    if "--check" not in sys.argv:
        path.write_text(rendered)
    elif rendered != path.read_text():
        raise SystemExit("README.md differs from the results files: run python benchmarks/render.py")


if __name__ == "__main__":
    main()
