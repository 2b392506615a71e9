"""python -m bench.report: write the tables and pictures of bench/results, and compare with earlier results.

    python -m bench.report               bench/results/README.md, its pictures, and the block in README.md
    python -m bench.report --compare     exit with 1 where a figure is over 3% worse than the previous one

Of each GPU the newest result of a benchmark counts. Every table names the GPU, versions, commit and command.
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import timing
from bench.kernels import rate
from bench.roofline import PARTS, device_of, kind_of, limits_of, step_of
from gpt import cli
from gpt.cli import UserPath

Result = dict[str, Any]
TOLERANCE = 0.03
BLOCK = re.compile(r"(<!-- bench\.report -->\n).*?(<!-- /bench\.report -->)", re.DOTALL)
HEAD = "# Results\n\n`python -m bench.report` writes this page from the JSON files in this folder.\n"
NAMES = {
    "nanogpt": "nanoGPT, compiled",
    "torch compiled": "our model, PyTorch's operations",
    "torch eager": "our model, PyTorch's operations, not compiled",
    "tritongpt eager": "tritongpt, not compiled",
    "tritongpt tuned": "tritongpt, tiles of the sweep",
    "without activation": "tritongpt, PyTorch's GELU",
    "without attention": "tritongpt, PyTorch's attention",
    "without layer_norm": "tritongpt, PyTorch's LayerNorm",
    "without cross_entropy": "tritongpt, PyTorch's cross-entropy",
}
# One colour for ours everywhere, and one for each competitor.
COLOURS = {
    "tritongpt": "tab:orange", "nanogpt": "tab:blue", "torch compiled": "silver",
    "eager": "tab:olive", "compile": "dimgray", "liger": "tab:purple", "sdpa cudnn": "tab:green",
    "sdpa flash": "tab:pink", "flex": "tab:brown", "flash-attn": "tab:red", "torch fused": "tab:cyan",
}  # fmt: skip


def about(result: Result) -> str:
    """The model that a result is about. Results of one benchmark about the same model are compared."""
    if result["benchmark"] == "throughput":
        model = result["model"]
        shape = f"{model['n_layer']} layers, {model['n_embd']} wide, {model['block_size']} tokens"
        if result["sweep"]:
            shape += ", best micro-batch"
        return f"{shape}, {result['ranks']} GPU{'s' if result['ranks'] > 1 else ''}"
    if result["benchmark"] == "generate":
        return f"{result['size']}, prompt {result['prompt']}, {result['new']} new"
    return ""


def timed_variants(variants: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The variants that have figures. The others have a reason instead."""
    return {name: figures for name, figures in variants.items() if isinstance(figures, dict)}


def whole(variant: dict[str, Any]) -> dict[str, Any]:
    """The figures of forward and backward together, or of forward where there is no backward."""
    return variant["both"] if "both" in variant else variant["forward"]


# ---- comparison with earlier results


def figures(result: Result) -> Iterator[tuple[str, float, float]]:
    """(name, figure, its spread as a share of it) of each of our figures; less is better.

    An operation's figure is its time over the time of a copy of the same bytes in the same run. So a slower
    or warmer GPU of the same kind does not count as a loss.
    """
    if result["benchmark"] == "throughput" and (ours := timed_variants(result["variants"]).get("tritongpt")):
        spread = (ours["step_ms_high"] - ours["step_ms_low"]) / ours["step_ms"]
        yield f"step of {about(result)}, ms for 1M tokens", 1e9 / ours["tokens_per_s"], spread
    for case in result["cases"] if result["benchmark"] == "kernels" else ():
        ours = timed_variants(case["variants"]).get("tritongpt", {})
        for direction in ours.keys() & {"forward", "backward"}:
            timed = ours[direction]
            spread = (timed["high"] - timed["low"]) / timed["median"]
            name = f"{case['operation']} {case['dtype']} {shape_of(case['sample'])} {direction}"
            yield f"{name}, times a copy", timed["median"] / timed["same_copy_ms"], spread


def changes(results: list[Result]) -> list[tuple[str, bool]]:
    """(description, whether it is a loss) of each figure's last value and its previous value on that GPU.

    A loss is more than 3% worse, and worse by more than the spread of the runs.
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


def shape_of(sample: dict[str, Any]) -> str:
    if "shape" in sample:
        return " x ".join(map(str, sample["shape"]))
    return ", ".join(f"{k}={v}" for k, v in sample.items())


def throughput_table(result: Result) -> str:
    variants = timed_variants(result["variants"])
    base = variants.get("nanogpt", {}).get("tokens_per_s")
    rows = []
    for name, v in sorted(variants.items(), key=lambda item: -item[1]["tokens_per_s"]):
        ratio = "" if base is None else f"{v['tokens_per_s'] / base:.2f}x"
        mfu = "" if v["mfu"] is None else f"{v['mfu']:.1%}"
        memory = "" if v["peak_bytes"] is None else f"{v['peak_bytes'] / 1e9:.1f}"
        spread = f"{v['step_ms']:.1f} ({v['step_ms_low']:.1f} to {v['step_ms_high']:.1f})"
        batch_size = str(result["batch_size"].get(name, ""))
        rows.append(
            [NAMES.get(name, name), f"{v['tokens_per_s']:,.0f}", ratio, spread, mfu, memory, batch_size]
        )
    header = ["variant", "tokens/s", "against nanoGPT", "ms a step", "MFU", "peak GB", "micro-batch"]
    missing = [f"- {NAMES.get(n, n)}: {v}" for n, v in result["variants"].items() if isinstance(v, str)]
    return "\n".join([table(header, rows), *([""] if missing else []), *missing])


def parts_table(result: Result, results: list[Result]) -> str:
    """Milliseconds of a step by part, beside the least that the GPU's limits allow."""
    columns = {NAMES.get(n, n): result["parts"][n] for n in ("tritongpt", "nanogpt") if n in result["parts"]}
    if kind_of(device_of(result)) and any(r["benchmark"] == "kernels" for r in results):
        limits = limits_of(device_of(result), results)
        least = {part.name: 1e3 * part.least(limits) for part in step_of(result).parts()}
        columns["least, by bench.roofline"] = least
    rows = [[part, *(f"{ms.get(part, 0):.0f}" for ms in columns.values())] for part in PARTS]
    rows.append(["all", *(f"{sum(ms.values()):.0f}" for ms in columns.values())])
    return table(["ms of a step", *columns], rows)


def kernels_table(result: Result) -> str:
    rows = []
    missing: dict[str, str] = {}
    for case in result["cases"]:
        operation, shape = f"{case['operation']} {case['dtype']}", shape_of(case["sample"])
        for name, why in case["variants"].items():
            if isinstance(why, str):
                missing.setdefault(f"{name}: {why}", f"{case['operation']} {shape}")
        variants = timed_variants(case["variants"])
        ours = variants.pop("tritongpt", None)
        best = min(variants, key=lambda name: whole(variants[name])["median"], default=None)
        best_ms = whole(variants[best])["median"] if best else float("nan")
        row = [operation, shape, "", "", "", "", "", ""]
        if best:
            row[5] = f"{best}, {best_ms:.3f}"
        if ours:
            row[2] = f"{ours['forward']['median']:.3f}"
            row[3] = f"{ours['backward']['median']:.3f}" if "backward" in ours else ""
            row[4] = f"{whole(ours)['limit']:.0%}, {rate(whole(ours), result['limits'])}"
            row[6] = f"{best_ms / whole(ours)['median']:.2f}x" if best else ""
            row[7] = "" if ours["bytes"] is None else f"{ours['bytes'] / 1e6:,.0f}"
        rows.append(row)
    header = ["operation", "shape", "forward ms", "backward ms", "of the limit"]
    header += ["best other, ms", "faster by", "MB beyond inputs"]
    reasons = "\n".join(f"- {reason} (first at {where})" for reason, where in missing.items())
    return f"{table(header, rows)}\n\n{reasons}".strip()


def sweep_table(result: Result) -> str:
    rows = []
    for slot in result["sweeps"]:
        ms, now = slot["ms"], slot["now"]
        best = min(ms, key=lambda tile: ms[tile])
        before = f"{now} {ms[now]:.3f}" if now in ms else now
        shape = shape_of(ast.literal_eval(slot["sample"]))
        rows.append([slot["operation"], shape, slot["slot"], before, f"{best} {ms[best]:.3f}"])
    return table(["operation", "shape", "slot", "before, ms", "best, ms"], rows)


def generate_table(result: Result) -> str:
    rows = []
    for case in result["cases"]:
        for name, v in case["models"].items():
            token = f"{v['ms']:.3f} (at least {case['floor_ms']:.3f})"
            rates = f"{v['prefill']:,.0f}", f"{v['decode']:,.0f}"
            rows.append([str(case["batch_size"]), name, *rates, token])
    return table(["sequences", "model", "prefill tokens/s", "decode tokens/s", "ms a decoded token"], rows)


# A new benchmark with a table is a line here.
TABLES = {
    "throughput": ("Training step", throughput_table),
    "kernels": ("Operations", kernels_table),
    "sweep": ("Tiles", sweep_table),
    "generate": ("Sampling", generate_table),
}


def newest(results: list[Result]) -> dict[str, list[Result]]:
    """{device: its newest result of each benchmark and model}, in the order of TABLES."""
    devices: dict[str, dict[tuple[int, str], Result]] = {}
    for result in (r for r in results if r["benchmark"] in TABLES):  # in order of time
        key = list(TABLES).index(result["benchmark"]), about(result)
        devices.setdefault(device_of(result), {})[key] = result
    return {device: [by_key[key] for key in sorted(by_key)] for device, by_key in devices.items()}


def section(result: Result, results: list[Result]) -> str:
    title, make = TABLES[result["benchmark"]]
    blocks = [f"### {title}{': ' * bool(about(result))}{about(result)}", make(result)]
    if result.get("parts"):
        blocks.append(parts_table(result, results))
    if result["benchmark"] in PICTURES:
        blocks.insert(1, f"![{title}]({picture_of(result)})")
    if "note" in result:
        blocks.append(result["note"])
    return "\n\n".join([*blocks, provenance(result)]) + "\n"


def provenance(result: Result) -> str:
    e = result["environment"]
    versions = ", ".join(f"{name} {e[name]}" for name in ("torch", "triton", "cudnn") if e.get(name))
    commit = re.sub(r"^([0-9a-f]{12})[0-9a-f]+", r"\1", str(e["commit"]))
    return f"{e['device']}, {versions}, commit {commit}, {e['date']} UTC: `{e['command']}`"


# ---- pictures


def picture_of(result: Result) -> str:
    """The name of its file."""
    words = f"{device_of(result)} {about(result)} {result['benchmark']}".lower()
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-") + ".svg"


def draw_step(result: Result, figure: Any) -> None:
    """Tokens/s and memory of nanoGPT, our model on PyTorch's operations, and tritongpt."""
    variants = timed_variants(result["variants"])
    names = [name for name in ("tritongpt", "torch compiled", "nanogpt") if name in variants]
    figure.set_size_inches(9, 2.2)
    panels = {"tokens/s": ("tokens_per_s", 1), "peak memory, GB": ("peak_bytes", 1e9)}
    for axes, (title, (key, unit)) in zip(figure.subplots(1, 2, sharey=True), panels.items()):
        values = [(variants[name][key] or 0) / unit for name in names]
        bars = axes.barh([NAMES.get(n, n) for n in names], values, color=[COLOURS[n] for n in names])
        base = values[-1] if names[-1:] == ["nanogpt"] else None
        labels = [f"{v:,.0f}" + (f"  ({v / base:.2f}x)" if base else "") for v in values]
        axes.bar_label(bars, labels, padding=3)
        axes.set_title(title, loc="left")
        axes.set(xlim=(0, 1.35 * max(values, default=1) or 1), xticks=[])


def draw_operations(result: Result, figure: Any) -> None:
    """The speed of each variant of each operation, as a share of what the GPU allows."""
    cases = [(case, timed_variants(case["variants"])) for case in result["cases"]]
    shown = list(dict.fromkeys(name for _, variants in cases for name in variants))
    figure.set_size_inches(9, 0.9 + 0.13 * sum(1 + len(variants) for _, variants in cases))
    axes = figure.subplots()
    bars: dict[str, list[tuple[float, float]]] = {name: [] for name in shown}
    ticks, y = [], 0.0
    for _case, variants in cases:
        ticks.append(y + (len(variants) - 1) / 2)
        for name in (name for name in shown if name in variants):
            bars[name].append((y, whole(variants[name])["limit"]))
            y += 1
        y += 1  # a gap between groups
    for name, values in bars.items():
        at, limits = zip(*values)
        axes.barh(at, limits, height=0.9, color=COLOURS.get(name), label=name)
    labels = [f"{case['operation']}\n{shape_of(case['sample'])}" for case, _ in cases]
    axes.set_yticks(ticks, labels, fontsize=7)
    axes.set_title("least time that the GPU's limits allow, as a share of the time measured", loc="left")
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.03), ncols=len(shown), frameon=False)


PICTURES = {"throughput": draw_step, "kernels": draw_operations}


def draw(result: Result, path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    # The same results give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "tritongpt", "svg.fonttype": "none"}):
        figure = Figure(layout="constrained")
        PICTURES[result["benchmark"]](result, figure)
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
        figure.supxlabel(provenance(result).split(": `")[0], fontsize=7, color="gray")
        figure.savefig(path, metadata={"Date": None})


def write(results: list[Result], folder: Path, readme: Path) -> None:
    """Writes the folder's README.md and pictures, and the block of `readme`.

    The block has the newest step of each GPU on which nanoGPT was measured beside ours. Raises ValueError
    where `readme` has no block.
    """
    text = readme.read_text()
    if not BLOCK.search(text):
        raise ValueError(f"{readme} has no lines <!-- bench.report --> and <!-- /bench.report -->")
    page, block = [HEAD], []
    for device, of_device in newest(results).items():
        page.append(f"## {device}\n\n" + "\n".join(section(result, results) for result in of_device))
        for result in (result for result in of_device if result["benchmark"] in PICTURES):
            draw(result, folder / picture_of(result))
            if "nanogpt" in timed_variants(result.get("variants", {})):
                title = f"tokens/s and memory of a training step, {device}, {about(result)}"
                block.append(f"![{title}](bench/results/{picture_of(result)})\n")
    (folder / "README.md").write_text("\n".join(page))
    readme.write_text(BLOCK.sub(lambda m: m[1] + "\n".join(block) + m[2], text))


@dataclass
class ReportConfig:
    """Write the tables and pictures of bench/results, or compare with earlier results."""

    results: UserPath = "bench/results"  # folder of JSON files
    readme: UserPath = "README.md"  # the file with the block
    compare: bool = False  # write nothing; exit with 1 on a loss of over 3%


def main() -> None:
    options = cli.parse(ReportConfig, sys.argv[1:], prog="python -m bench.report")
    results = timing.read(options.results)
    if not options.compare:
        write(results, Path(options.results), Path(options.readme))
        return
    compared = changes(results)
    worse = [change for change, is_loss in compared if is_loss]
    print(*worse, sep="\n", end="\n" if worse else "")
    print(f"{len(compared)} figures compared, {len(worse)} of them more than {TOLERANCE:.0%} worse")
    sys.exit(1 if worse else 0)


if __name__ == "__main__":
    cli.run(main)
