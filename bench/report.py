"""python -m bench.report: results to tables and pictures, and today's held against those before.

    python -m bench.report               bench/results/README.md, its pictures, and the table in README.md
    python -m bench.report --compare     exit code 1 where a figure is over 3% worse than the last of its GPU

Of each GPU the newest result of a benchmark counts. Under every table stands what was run, on what and when.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import timing
from bench.kernels import rate

Result = dict[str, Any]
ROOT = Path(__file__).parents[1]
TOLERANCE = 0.03
BLOCK = re.compile(r"(<!-- bench\.report -->\n).*?(<!-- /bench\.report -->)", re.DOTALL)
NONE_YET = (
    "No GPU figures exist yet: the kernels are tested against fp64 in Triton's interpreter and compiled for "
    "sm_80,\nsm_89, sm_90 and sm_100, and have not run on a GPU."
)


# ---- what a result holds


def about(result: Result) -> str:
    """What model or selection it measured: results of one benchmark that are about the same are compared."""
    if result["benchmark"] == "throughput":
        model = result["model"]
        shape = f"{model['n_layer']} layers, {model['n_embd']} wide, {model['block_size']} tokens"
        if result["sweep"]:
            shape += ", best micro-batch"
        return f"{shape}, {result['ranks']} GPU{'s' if result['ranks'] > 1 else ''}"
    if result["benchmark"] == "generate":
        return f"{result['size']}, prompt {result['prompt']}, {result['new']} new"
    return ""


def newest(results: list[Result]) -> dict[str, dict[tuple[str, str], Result]]:
    """{device: {(benchmark, about): result}}; `results` are in order of time."""
    found: dict[str, dict[tuple[str, str], Result]] = {}
    for result in results:
        of_device = found.setdefault(result["environment"]["device"], {})
        key = result["benchmark"], about(result)
        if result["benchmark"] == "kernels" and key in of_device:  # of some operations only: the rest stays
            cases = {_case(c): c for c in of_device[key]["cases"]} | {_case(c): c for c in result["cases"]}
            result = result | {"cases": list(cases.values())}
        of_device[key] = result
    return found


def figures(result: Result) -> Iterator[tuple[str, float, float]]:
    """(name, figure, its spread as a share of it) of what is ours in it; less is better.

    An operation counts by its time over that of a copy of the same bytes in the same run, so that another
    GPU of the kind, or a warmer one, is no loss.
    """
    where = about(result)
    if result["benchmark"] == "throughput":
        ours = result["variants"].get("tritongpt")
        if isinstance(ours, dict):
            spread = (ours["step_ms_high"] - ours["step_ms_low"]) / ours["step_ms"]
            yield f"step of {where}, ms for 1M tokens", 1e9 / ours["tokens_per_s"], spread
    elif result["benchmark"] == "kernels":
        for case in result["cases"]:
            ours = case["variants"].get("tritongpt")
            directions = ("forward", "backward") if isinstance(ours, dict) else ()
            for direction in (d for d in directions if d in ours):
                timed = ours[direction]
                spread = (timed["high"] - timed["low"]) / timed["median"]
                name = f"{case['operation']} {case['dtype']} {_shape(case['sample'])} {direction}, copies"
                yield name, timed["median"] / timed["same_copy_ms"], spread
    elif result["benchmark"] == "generate":
        for case in result["cases"]:
            name = f"generate {where}, {case['batch_size']} sequences, ms"
            yield name, case["models"]["tritongpt"]["generate_ms"], 0.0


@dataclass(frozen=True)
class Change:
    device: str
    name: str
    before: float
    after: float
    spread: float

    @property
    def is_loss(self) -> bool:
        """More than 3%, and more than the runs themselves were apart."""
        return self.after > (1 + max(TOLERANCE, self.spread / 2)) * self.before

    def __str__(self) -> str:
        by = self.after / self.before - 1
        return f"{self.device}: {self.name}: {self.before:.4g} -> {self.after:.4g} ({by:+.1%})"


def changes(results: list[Result]) -> list[Change]:
    """Each figure's last value against the one before it on the same device."""
    history: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for result in results:
        for name, value, spread in figures(result):
            history.setdefault((result["environment"]["device"], name), []).append((value, spread))
    pairs = {key: values[-2:] for key, values in history.items() if len(values) > 1}
    return [Change(*key, a[0], b[0], max(a[1], b[1])) for key, (a, b) in pairs.items()]


# ---- tables


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def provenance(result: Result) -> str:
    e = result["environment"]
    versions = ", ".join(f"{name} {e[name]}" for name in ("torch", "triton") if e[name])
    return f"{e['device']}, {versions}, commit {e['commit']}, {e['date']} UTC: `{e['command']}`"


def throughput_table(result: Result) -> str:
    variants = {n: v for n, v in result["variants"].items() if isinstance(v, dict)}
    base = variants.get("nanogpt", {}).get("tokens_per_s")
    rows = []
    for name, v in sorted(variants.items(), key=lambda item: -item[1]["tokens_per_s"]):
        ratio = "" if base is None else f"{v['tokens_per_s'] / base:.2f}x"
        mfu = "" if v["mfu"] is None else f"{v['mfu']:.1%}"
        memory = "" if v["peak_bytes"] is None else f"{v['peak_bytes'] / 1e9:.1f}"
        spread = f"{v['step_ms']:.1f} ({v['step_ms_low']:.1f} to {v['step_ms_high']:.1f})"
        rows.append([name, f"{v['tokens_per_s']:,.0f}", ratio, spread, mfu, memory])
    header = ["variant", "tokens/s", "against nanoGPT", "ms a step", "MFU", "peak GB"]
    missing = [f"{n}: {v}." for n, v in result["variants"].items() if isinstance(v, str)]
    batch = ", ".join(f"{n} {b}" for n, b in result["batch_size"].items() if n in variants)
    return "\n\n".join([table(header, rows), f"Micro-batch: {batch}. {' '.join(missing)}".strip()])


def kernels_table(result: Result) -> str:
    rows: list[list[str]] = []
    notes: dict[tuple[str, str], str] = {}
    for case in result["cases"]:
        timed = {n: v for n, v in case["variants"].items() if isinstance(v, dict) and "forward" in v}
        where = f"{case['operation']} {_shape(case['sample'])}"
        for name, why in case["variants"].items():
            if isinstance(why, str):
                notes.setdefault((name, why), where)
        ours = timed.pop("tritongpt", None)
        best = min(timed, key=lambda n: timed[n][_whole(timed[n])]["median"], default=None)
        row = [f"{case['operation']} {case['dtype']}", _shape(case["sample"])]
        if ours is None:
            row += ["", "", ""]
        else:
            row += [_ms(ours, "forward"), _ms(ours, "backward")]
            whole = ours[_whole(ours)]
            row.append(f"{whole['limit']:.0%}, {rate(whole, result['limits'])}")
        if best is None:
            row += ["", ""]
        else:
            peer = timed[best][_whole(timed[best])]["median"]
            row += [f"{best}, {peer:.3f}", f"{peer / ours[_whole(ours)]['median']:.2f}x" if ours else ""]
        row.append("" if ours is None or ours["bytes"] is None else f"{ours['bytes'] / 1e6:,.0f}")
        rows.append(row)
    header = ["operation", "shape", "forward ms", "backward ms", "of the limit"]
    header += ["best other, ms", "faster by", "MB beyond inputs"]
    said = "\n".join(f"- {name}, from {where} on: {why}" for (name, why), where in notes.items())
    return f"{table(header, rows)}\n\n{said}".strip()


def generate_table(result: Result) -> str:
    rows = []
    for case in result["cases"]:
        for name, v in case["models"].items():
            rate = f"{v['ms']:.3f} (at least {case['floor_ms']:.3f})"
            rows.append([str(case["batch_size"]), name, f"{v['prefill']:,.0f}", f"{v['decode']:,.0f}", rate])
    return table(["sequences", "model", "prefill tokens/s", "decode tokens/s", "ms a decoded token"], rows)


def roofline_table(result: Result) -> str:
    limits = result["limits"]
    rows = [["copy", f"{limits['copy_bytes_per_s'] / 1e9:,.0f} GB/s"]]
    rows.append(["product 8192^3", f"{limits['product_flops_per_s'] / 1e12:,.0f} TFLOP/s"])
    rows += [[n, f"{p['flops_per_s'] / 1e12:,.0f} TFLOP/s"] for n, p in result["products"].items()]
    for name, ms in result["attention"].items():
        rows.append([f"attention, {name}", ms if isinstance(ms, str) else f"{ms:.3f} ms"])
    return table(["what", "measured"], rows)


def nanogpt_table(result: Result) -> str:
    rows = []
    for name, seconds in result["seconds"].items():
        rows.append(
            [
                name,
                f"{statistics.median(seconds):.1f}",
                f"{min(seconds):.1f} to {max(seconds):.1f}",
                str(len(seconds)),
            ]
        )
    return table([f"{result['iters']} steps of the quickstart", "s, median", "range", "runs"], rows)


TABLES = {
    "throughput": ("Training step", throughput_table),
    "kernels": ("Operations", kernels_table),
    "generate": ("Sampling", generate_table),
    "roofline": ("Limits of the machine, the step's products", roofline_table),
    "nanogpt": ("Whole runs on a CPU, start-up included", nanogpt_table),
}


def section(result: Result) -> str:
    title, make = TABLES[result["benchmark"]]
    where = about(result)
    return f"### {title}{f': {where}' if where else ''}\n\n{make(result)}\n\n{provenance(result)}\n"


def full(results: list[Result], pictures: dict[str, list[str]]) -> str:
    """The text of results/README.md."""
    text = ["# Results", "", "Written by `python -m bench.report` from the JSON files in this folder.", ""]
    for device, found in newest(results).items():
        text += [f"## {device}", ""]
        text += [f"![{name}]({name})\n" for name in pictures.get(device, ())]
        text += [section(found[key]) for key in sorted(found, key=_order) if key[0] in TABLES]
    return "\n".join(text).rstrip() + "\n"


def headline(results: list[Result], pictures: dict[str, list[str]]) -> str:
    """The block of the project's README: each GPU's training step, and whole runs on a CPU."""
    gpus = {device: found for device, found in newest(results).items() if "CPU" not in device}
    text = [] if any(key[0] == "throughput" for found in gpus.values() for key in found) else [NONE_YET, ""]
    for device, found in gpus.items():
        text += [section(found[key]) for key in sorted(found) if key[0] == "throughput"]
        text += [f"![{device}](bench/results/{name})\n" for name in pictures.get(device, ())]
    for found in newest(results).values():
        text += [section(result) for key, result in found.items() if key[0] == "nanogpt"]
    return "\n".join(text).rstrip() + "\n"


def _case(case: dict[str, Any]) -> tuple[str, str, str]:
    return case["operation"], case["dtype"], _shape(case["sample"])


def _order(key: tuple[str, str]) -> tuple[int, str]:
    return list(TABLES).index(key[0]) if key[0] in TABLES else len(TABLES), key[1]


def _shape(sample: dict[str, Any]) -> str:
    if "shape" in sample:
        return " x ".join(map(str, sample["shape"]))
    return ", ".join(f"{k}={v}" for k, v in sample.items())


def _ms(variant: dict[str, Any], direction: str) -> str:
    return f"{variant[direction]['median']:.3f}" if direction in variant else ""


def _whole(variant: dict[str, Any]) -> str:
    """What is compared: forward and backward together, forward for what has no backward."""
    return "both" if "both" in variant else "forward"


# ---- pictures


def draw(results: list[Result], folder: Path) -> dict[str, list[str]]:
    """Writes SVG files into `folder`; their names by device."""
    drawn: dict[str, list[str]] = {}
    for device, found in newest(results).items():
        slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        for (benchmark, where), result in found.items():
            if benchmark == "throughput":
                stem = f"{slug}-{result['model']['n_layer']}-layers-{result['ranks']}"
                variants = {n: v for n, v in result["variants"].items() if isinstance(v, dict)}
                rates = {n: v["tokens_per_s"] / 1e3 for n, v in variants.items()}
                bars(
                    rates,
                    f"thousand tokens/s\n{where}",
                    folder / f"{stem}-throughput.svg",
                    provenance(result),
                )
                drawn.setdefault(device, []).append(f"{stem}-throughput.svg")
                if all(v["peak_bytes"] for v in variants.values()):
                    memory = {n: v["peak_bytes"] / 1e9 for n, v in variants.items()}
                    bars(
                        memory, f"peak memory, GB\n{where}", folder / f"{stem}-memory.svg", provenance(result)
                    )
                    drawn[device].append(f"{stem}-memory.svg")
            elif benchmark == "kernels":
                for operation in dict.fromkeys(case["operation"] for case in result["cases"]):
                    cases = [c for c in result["cases"] if c["operation"] == operation]
                    name = f"{slug}-{operation}.svg"
                    shares(cases, operation, folder / name, provenance(result))
                    drawn.setdefault(device, []).append(name)
    return drawn


def bars(values: dict[str, float], title: str, path: Path, below: str) -> None:
    """One horizontal bar each, the largest on top, ours in colour, the value at its end."""
    ordered = sorted(values.items(), key=lambda item: item[1])
    figure, axes = _figure(0.35 * len(ordered) + 1.2)
    colours = ["tab:orange" if name == "tritongpt" else "tab:gray" for name, _ in ordered]
    drawn = axes.barh([name for name, _ in ordered], [value for _, value in ordered], color=colours)
    axes.bar_label(drawn, fmt="%.4g", padding=3)
    axes.set_title(title, loc="left", fontsize=10)
    _save(figure, path, below)


def shares(cases: list[dict[str, Any]], operation: str, path: Path, below: str) -> None:
    """For each shape the share of the limit, forward and backward together, that every variant reaches."""
    figure, axes = _figure(3.6)
    shapes = [_shape(case["sample"]) for case in cases]
    names = dict.fromkeys(name for case in cases for name in case["variants"])
    for name in names:
        variants = [case["variants"].get(name) for case in cases]
        reached = [
            100 * v[_whole(v)]["limit"] if isinstance(v, dict) and "forward" in v else None for v in variants
        ]
        if any(value is not None for value in reached):
            width = 3 if name == "tritongpt" else 1.2
            colour = "tab:orange" if name == "tritongpt" else None
            values = [float("nan") if v is None else v for v in reached]
            axes.plot(shapes, values, marker="o", lw=width, label=name, color=colour)
    axes.set_ylim(bottom=0)
    axes.set_title(f"{operation}: % of the machine's limit, forward and backward", loc="left", fontsize=10)
    axes.tick_params(axis="x", rotation=30, labelsize=7)
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, path, below)


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path, below: str) -> None:
    import matplotlib

    figure.supxlabel(below, fontsize=6, color="gray", wrap=True)
    # The same results give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "tritongpt"}):
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results", help="folder of JSON files")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="the file with the headline")
    parser.add_argument("--compare", action="store_true", help="write nothing; fail on a loss of over 3%%")
    options = parser.parse_args()
    results = timing.read(options.results)
    if options.compare:
        found = changes(results)
        worse = [change for change in found if change.is_loss]
        print(*worse, sep="\n", end="\n" if worse else "")
        print(f"{len(found)} figures compared, {len(worse)} of them more than {TOLERANCE:.0%} worse")
        sys.exit(1 if worse else 0)
    text = options.readme.read_text()
    if not BLOCK.search(text):
        sys.exit(f"error: {options.readme} has no lines <!-- bench.report --> and <!-- /bench.report -->")
    options.results.mkdir(parents=True, exist_ok=True)
    pictures = draw(results, options.results)
    (options.results / "README.md").write_text(full(results, pictures))
    options.readme.write_text(BLOCK.sub(lambda m: m[1] + headline(results, pictures) + m[2], text))


if __name__ == "__main__":
    main()
