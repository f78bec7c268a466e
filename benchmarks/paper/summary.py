"""A short table of what a run measured, for the end of its output."""


def summary(results: list[dict]) -> str:
    lines = []
    for result in results:
        what = result["what"]
        if what in ("kernel", "counters"):
            case = f"{result['contender']}, {result['direction']}, {result['dtype']}, x{result['repeats']}"
        if what == "kernel":
            lines.append(
                f"{case}: {result['ms']:.4g} ms ± {result['ms_interval']:.2g} ({result['runs']} runs)"
            )
        elif what == "counters":
            parts = [
                f"{result[key]:.3g} {key}"
                for key in ("cycles", "counter_ms", "sm", "l1", "l2", "hbm")
                if key in result
            ]
            lines.append(f"{case}: {', '.join(parts)}; stalled: {stalls(result)}")
        elif what == "error":
            lines.append(
                f"{result['contender']}, {result['dtype']}, {result['gradient']}, "
                f"{result['shape'][0]} images: error {result['error']:.3g} ± {result['error_interval']:.2g}, "
                f"variance {result['variance']:.3g}, equal {result['agree']} of {result['compared']}"
            )
        elif what == "training":
            lines.append(
                f"{result['provider']}, {result['size']}, {result['mode']}, batch {result['batch_size']}: "
                f"{result['images_per_s']:,.1f} ± {result['images_interval']:.2g} images/s, forward "
                f"{result['forward_ms']:.1f} ms, backward {result['backward_ms']:.1f} ms"
            )
        elif what == "copy":
            lines.append(f"copy: {result['gb_per_s']:,.0f} GB/s")
    return "\n".join(lines)


def stalls(result: dict) -> str:
    """Return the three states that take a warp the longest."""
    states = {
        name.removeprefix("warps_"): value for name, value in result.items() if name.startswith("warps_")
    }
    longest = sorted(states, key=states.__getitem__, reverse=True)[:3]
    return ", ".join(f"{name} {states[name]:.3g}" for name in longest) or "not counted"
