"""python -m bench.report: results as tables and pictures, and the newest compared with those before.

    python -m bench.report               bench/results/README.md, its pictures, and the block in README.md
    python -m bench.report --compare     exit code 1 where a figure is over 3% worse than the last of its GPU

For each GPU the newest result of a benchmark counts. Under every table stands what ran, on what and when.
"""

import argparse
import ast
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import timing
from bench.kernels import rate
from bench.roofline import PARTS, device_of, kind_of, limits_of, step_of

Result = dict[str, Any]
ROOT = Path(__file__).parents[1]
TOLERANCE = 0.03
BLOCK = re.compile(r"(<!-- bench\.report -->\n).*?(<!-- /bench\.report -->)", re.DOTALL)
RESULTS = """# Results

Written by `python -m bench.report` from the JSON files in this folder. The training step stands in the
[README of the project](../../README.md#benchmarks).
"""
COLOURS = {"tritongpt": "tab:orange", "nanogpt": "tab:blue"}
WORDS = {
    "nanogpt": "nanoGPT, compiled",
    "torch compiled": "our model, PyTorch's operations, compiled",
    "torch eager": "our model, PyTorch's operations, not compiled",
    "tritongpt eager": "tritongpt, not compiled",
    "tritongpt tuned": "tritongpt, tiles of the sweep",
    "without activation": "tritongpt, PyTorch's GELU",
    "without attention": "tritongpt, PyTorch's attention",
    "without layer_norm": "tritongpt, PyTorch's LayerNorm",
    "without cross_entropy": "tritongpt, PyTorch's cross-entropy",
}


def in_words(variant: str) -> str:
    return WORDS.get(variant, variant)


def about(result: Result) -> str:
    """The model or selection that it measured: results of one benchmark about the same are compared."""
    if result["benchmark"] == "throughput":
        model = result["model"]
        shape = f"{model['n_layer']} layers, {model['n_embd']} wide, {model['block_size']} tokens"
        if result["sweep"]:
            shape += ", best micro-batch"
        return f"{shape}, {result['ranks']} GPU{'s' if result['ranks'] > 1 else ''}"
    if result["benchmark"] == "generate":
        return f"{result['size']}, prompt {result['prompt']}, {result['new']} new"
    return ""


# ---- the newest beside the one before


def figures(result: Result) -> Iterator[tuple[str, float, float]]:
    """(name, figure, its spread as a share of it) of everything that is ours in it; less is better.

    An operation's figure is its time over that of a copy of the same bytes in the same run, so a slower or
    warmer GPU of the same kind does not count as a loss.
    """
    if result["benchmark"] == "throughput" and isinstance(ours := result["variants"].get("tritongpt"), dict):
        spread = (ours["step_ms_high"] - ours["step_ms_low"]) / ours["step_ms"]
        yield f"step of {about(result)}, ms for 1M tokens", 1e9 / ours["tokens_per_s"], spread
    for case in result["cases"] if result["benchmark"] == "kernels" else ():
        ours = case["variants"].get("tritongpt")
        for direction in ("forward", "backward"):
            if isinstance(ours, dict) and direction in ours:
                timed = ours[direction]
                spread = (timed["high"] - timed["low"]) / timed["median"]
                name = f"{case['operation']} {case['dtype']} {in_short(case['sample'])} {direction}"
                yield f"{name}, times a copy", timed["median"] / timed["same_copy_ms"], spread
    for case in result["cases"] if result["benchmark"] == "generate" else ():
        name = f"generate {about(result)}, {case['batch_size']} sequences, ms"
        yield name, case["models"]["tritongpt"]["generate_ms"], 0.0


def changes(results: list[Result]) -> list[tuple[str, bool]]:
    """(what changed, whether it is a loss): each figure's last value and the one before on its device.

    A loss is more than 3%, and more than the runs themselves were apart.
    """
    history: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        for name, value, spread in figures(result):
            history.setdefault(f"{device_of(result)}: {name}", []).append((value, spread))
    compared = []
    for name, (*_, (before, spread), (after, later_spread)) in (h for h in history.items() if len(h[1]) > 1):
        is_loss = after > (1 + max(TOLERANCE, spread / 2, later_spread / 2)) * before
        compared.append((f"{name}: {before:.4g} -> {after:.4g} ({after / before - 1:+.1%})", is_loss))
    return compared


# ---- tables


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def in_short(sample: dict[str, Any]) -> str:
    if "shape" in sample:
        return " x ".join(map(str, sample["shape"]))
    return ", ".join(f"{k}={v}" for k, v in sample.items())


def throughput_table(result: Result) -> str:
    variants = {n: v for n, v in result["variants"].items() if isinstance(v, dict)}
    base = variants.get("nanogpt", {}).get("tokens_per_s")
    rows = []
    for name, v in sorted(variants.items(), key=lambda item: -item[1]["tokens_per_s"]):
        ratio = "" if base is None else f"{v['tokens_per_s'] / base:.2f}x"
        mfu = "" if v["mfu"] is None else f"{v['mfu']:.1%}"
        memory = "" if v["peak_bytes"] is None else f"{v['peak_bytes'] / 1e9:.1f}"
        spread = f"{v['step_ms']:.1f} ({v['step_ms_low']:.1f} to {v['step_ms_high']:.1f})"
        rows.append([in_words(name), f"{v['tokens_per_s']:,.0f}", ratio, spread, mfu, memory])
    header = ["variant", "tokens/s", "against nanoGPT", "ms a step", "MFU", "peak GB"]
    missing = [f"{in_words(n)}: {v}." for n, v in result["variants"].items() if isinstance(v, str)]
    sizes = {n: b for n, b in result["batch_size"].items() if n in variants}
    batch = ", ".join(f"{in_words(n)} {b}" for n, b in sizes.items())
    if len(set(sizes.values())) == 1:
        batch = f"{next(iter(sizes.values()))} sequences for all"
    return "\n\n".join([table(header, rows), f"Micro-batch: {batch}. {' '.join(missing)}".strip()])


def parts_table(result: Result, results: list[Result]) -> str:
    """Milliseconds of a step by part, beside the least that the GPU's limits allow."""
    columns = {in_words(n): result["parts"][n] for n in ("tritongpt", "nanogpt") if n in result["parts"]}
    if kind_of(device_of(result)) and any(r["benchmark"] == "kernels" for r in results):
        limits = limits_of(device_of(result), results)
        least = {part.name: 1e3 * part.least(limits) for part in step_of(result).parts()}
        columns["least, by bench.roofline"] = least
    rows = [[part, *(f"{ms.get(part, 0):.0f}" for ms in columns.values())] for part in PARTS]
    rows.append(["all", *(f"{sum(ms.values()):.0f}" for ms in columns.values())])
    return table(["ms of a step", *columns], rows)


def kernels_table(result: Result) -> str:
    header = ["operation", "shape", "forward ms", "backward ms", "of the limit"]
    header += ["best other, ms", "faster by", "MB beyond inputs"]
    rows: list[list[str]] = []
    missing: dict[tuple[str, str], str] = {}
    for case in result["cases"]:
        shape = in_short(case["sample"])
        timed = {n: v for n, v in case["variants"].items() if isinstance(v, dict) and "forward" in v}
        # forward and backward together, forward for an operation without backward
        whole: dict[str, Any] = {n: v.get("both", v["forward"]) for n, v in timed.items()}
        for name, why in case["variants"].items():
            if isinstance(why, str):
                missing.setdefault((name, why), f"{case['operation']} {shape}")
        row = dict.fromkeys(header, "") | {
            "operation": f"{case['operation']} {case['dtype']}",
            "shape": shape,
        }
        our_whole = whole.pop("tritongpt", None)
        if our_whole is not None:
            ours = timed["tritongpt"]
            row |= {f"{d} ms": f"{ours[d]['median']:.3f}" for d in ("forward", "backward") if d in ours}
            row["of the limit"] = f"{our_whole['limit']:.0%}, {rate(our_whole, result['limits'])}"
            row["MB beyond inputs"] = "" if ours["bytes"] is None else f"{ours['bytes'] / 1e6:,.0f}"
        if whole:
            best = min(whole, key=lambda name: whole[name]["median"])
            row["best other, ms"] = f"{best}, {whole[best]['median']:.3f}"
            if our_whole is not None:
                row["faster by"] = f"{whole[best]['median'] / our_whole['median']:.2f}x"
        rows.append(list(row.values()))
    said = "\n".join(f"- {name}, from {where} on: {why}" for (name, why), where in missing.items())
    return f"{table(header, rows)}\n\n{said}".strip()


def sweep_table(result: Result) -> str:
    rows = []
    for slot in result["sweeps"]:
        ms, now = slot["ms"], slot["now"]
        best = min(ms, key=lambda tile: ms[tile])
        before = f"{now} {ms[now]:.3f}" if now in ms else now
        shape = in_short(ast.literal_eval(slot["sample"]))
        rows.append([slot["operation"], shape, slot["slot"], before, f"{best} {ms[best]:.3f}"])
    return table(["operation", "shape", "slot", "before, ms", "best, ms"], rows)


def generate_table(result: Result) -> str:
    rows = []
    for case in result["cases"]:
        for name, v in case["models"].items():
            decoded = f"{v['ms']:.3f} (at least {case['floor_ms']:.3f})"
            rows.append(
                [str(case["batch_size"]), name, f"{v['prefill']:,.0f}", f"{v['decode']:,.0f}", decoded]
            )
    return table(["sequences", "model", "prefill tokens/s", "decode tokens/s", "ms a decoded token"], rows)


def nanogpt_table(result: Result) -> str:
    rows = []
    for name, s in result["seconds"].items():
        rows.append([name, f"{statistics.median(s):.1f}", f"{min(s):.1f} to {max(s):.1f}", str(len(s))])
    return table([f"{result['iters']} steps of the quickstart", "s, median", "range", "runs"], rows)


# A new benchmark with a table is a line here.
TABLES = {
    "throughput": ("Training step", throughput_table),
    "kernels": ("Operations", kernels_table),
    "sweep": ("Tiles", sweep_table),
    "generate": ("Sampling", generate_table),
    "nanogpt": ("Whole runs on a CPU, start-up included", nanogpt_table),
}


def newest(results: list[Result]) -> dict[str, list[Result]]:
    """{device: its newest result of each benchmark and model}, in the order of TABLES."""
    devices: dict[str, dict[tuple[int, str], Result]] = {}
    for result in (r for r in results if r["benchmark"] in TABLES):  # in order of time
        key = list(TABLES).index(result["benchmark"]), about(result)
        devices.setdefault(device_of(result), {})[key] = result
    return {device: [by_key[key] for key in sorted(by_key)] for device, by_key in devices.items()}


def section(result: Result, results: list[Result]) -> str:
    """A table with what it was measured on; of a training step with its pictures, and the step by part."""
    title, make = TABLES[result["benchmark"]]
    blocks = [f"### {title}{': ' * bool(about(result))}{about(result)}", make(result)]
    if result["benchmark"] == "throughput":
        blocks += [f"![{what}](bench/results/{name})" for what, name in pictures(result).items()]
        blocks += [parts_table(result, results)] if result.get("parts") else []
    return "\n\n".join([*blocks, provenance(result)]) + "\n"


def provenance(result: Result) -> str:
    e = result["environment"]
    versions = ", ".join(f"{name} {e[name]}" for name in ("torch", "triton", "cudnn") if e.get(name))
    commit = re.sub(r"^([0-9a-f]{12})[0-9a-f]+", r"\1", str(e["commit"]))
    return f"{e['device']}, {versions}, commit {commit}, {e['date']} UTC: `{e['command']}`"


# ---- pictures


def pictures(result: Result) -> dict[str, str]:
    """{what it shows: file name} of a throughput result."""
    words = f"{device_of(result)} {about(result)}".lower()
    stem = re.sub(r"[^a-z0-9]+", "-", words).strip("-")
    names = {"tokens/s": f"{stem}-throughput.svg"}
    if all(v["peak_bytes"] for v in result["variants"].values() if isinstance(v, dict)):
        names["peak memory, GB"] = f"{stem}-memory.svg"
    return names


def draw(result: Result, folder: Path) -> None:
    """A horizontal bar for each variant, the largest on top, with its value and its ratio to nanoGPT's."""
    import matplotlib
    from matplotlib.figure import Figure

    variants = {n: v for n, v in result["variants"].items() if isinstance(v, dict)}
    for what, name in pictures(result).items():
        key, scale = ("peak_bytes", 1e9) if "memory" in what else ("tokens_per_s", 1.0)
        values = {n: v[key] / scale for n, v in sorted(variants.items(), key=lambda item: item[1][key])}
        figure = Figure(figsize=(8, 0.35 * len(values) + 1.2), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        colours = [COLOURS.get(n, "lightgray") for n in values]
        drawn = axes.barh([in_words(n) for n in values], list(values.values()), color=colours)
        labels = []
        for value in values.values():
            ratio = f"  ({value / values['nanogpt']:.2f}x)" if "nanogpt" in values else ""
            labels.append(f"{value:,.0f}{ratio}" if value >= 1000 else f"{value:.1f}{ratio}")
        axes.bar_label(drawn, labels=labels, padding=3, fontsize=8)
        axes.margins(x=0.25)
        axes.set_title(f"{what}\n{about(result)}", loc="left", fontsize=10)
        figure.supxlabel(provenance(result), fontsize=6, color="gray", wrap=True)
        # The same results give the same file.
        with matplotlib.rc_context({"svg.hashsalt": "tritongpt", "svg.fonttype": "none"}):
            figure.savefig(folder / name, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results", help="folder of JSON files")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="the file with the block")
    parser.add_argument("--compare", action="store_true", help="write nothing; fail on a loss of over 3%%")
    options = parser.parse_args()
    results = timing.read(options.results)
    if options.compare:
        compared = changes(results)
        worse = [change for change, is_loss in compared if is_loss]
        print(*worse, sep="\n", end="\n" if worse else "")
        print(f"{len(compared)} figures compared, {len(worse)} of them more than {TOLERANCE:.0%} worse")
        sys.exit(1 if worse else 0)
    text = options.readme.read_text()
    if not BLOCK.search(text):
        sys.exit(f"error: {options.readme} has no lines <!-- bench.report --> and <!-- /bench.report -->")
    options.results.mkdir(parents=True, exist_ok=True)
    steps, tables = [], [RESULTS]
    for device, of_device in newest(results).items():
        others = [result for result in of_device if result["benchmark"] != "throughput"]
        for result in (result for result in of_device if result["benchmark"] == "throughput"):
            draw(result, options.results)
            steps.append(section(result, results))
        notes = [f"- {result['file']}: {result['note']}\n" for result in of_device if "note" in result]
        texts = [section(result, results) for result in others]
        texts += ["### Notes\n\n" + "".join(notes)] if notes else []
        tables += [f"## {device}\n\n" + "\n".join(texts)] if texts else []
    (options.results / "README.md").write_text("\n".join(tables))
    options.readme.write_text(BLOCK.sub(lambda m: m[1] + "\n".join(steps) + m[2], text))


if __name__ == "__main__":
    main()
