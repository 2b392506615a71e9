"""python -m bench.report: write bench/results/README.md, its pictures, and the block in README.md.

Of each GPU the newest result of a benchmark counts. Every table names the GPU, versions, commit and command.
`git diff bench/results/README.md` then shows old and new figures.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import timing
from bench.kernels import forward_and_backward, rate, shape_of
from bench.roofline import PARTS, device_of
from gpt import cli
from gpt.cli import UserPath

Result = dict[str, Any]
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


def model_of(result: Result) -> str:
    """The model that a result is about. Results of one benchmark and model replace each other."""
    if result["benchmark"] == "throughput":
        model, batch_size = result["model"], result["batch_size"].get("tritongpt")
        shape = f"{model['n_layer']} layers, {model['n_embd']} wide, {model['block_size']} tokens"
        gpus = f"{result['ranks']} GPU{'s' if result['ranks'] > 1 else ''}"
        return f"{shape}, micro-batch {batch_size}, {gpus}"
    if result["benchmark"] == "generate":
        return f"{result['size']}, prompt {result['prompt']}, {result['new']} new"
    return ""


def timed_variants(variants: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The variants that have figures. The others have a reason instead."""
    return {name: figures for name, figures in variants.items() if isinstance(figures, dict)}


# ---- tables


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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


def parts_table(result: Result) -> str:
    """Milliseconds of a step by part, beside the least time that the GPU's limits allow."""
    columns = {NAMES.get(n, n): result["parts"][n] for n in ("tritongpt", "nanogpt") if n in result["parts"]}
    columns["least, by bench.roofline"] = result["least_ms"]
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
        both = {n: forward_and_backward(v) for n, v in timed_variants(case["variants"]).items()}
        others = [name for name in both if name != "tritongpt"]
        best = min(others, key=lambda name: both[name]["median"], default=None)
        best_ms = both[best]["median"] if best else float("nan")
        row = [operation, shape, "", "", "", "", "", ""]
        if best:
            row[5] = f"{best}, {best_ms:.3f}"
        if "tritongpt" in both:
            ours = case["variants"]["tritongpt"]
            row[2] = f"{ours['forward']['median']:.3f}"
            row[3] = f"{ours['backward']['median']:.3f}" if "backward" in ours else ""
            row[4] = f"{both['tritongpt']['limit']:.0%}, {rate(both['tritongpt'], result['limits'])}"
            row[6] = f"{best_ms / both['tritongpt']['median']:.2f}x" if best else ""
            row[7] = "" if ours["bytes"] is None else f"{ours['bytes'] / 1e6:,.0f}"
        rows.append(row)
    header = ["operation", "shape", "forward ms", "backward ms", "of the limit"]
    header += ["best other, ms", "faster by", "MB beyond inputs"]
    reasons = "\n".join(f"- {reason} (first at {where})" for reason, where in missing.items())
    return f"{table(header, rows)}\n\n{reasons}".strip()


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
    "generate": ("Sampling", generate_table),
}


def newest(results: list[Result]) -> dict[str, list[Result]]:
    """{device: its newest result of each benchmark and model}, in the order of TABLES."""
    devices: dict[str, dict[tuple[int, str], Result]] = {}
    for result in (r for r in results if r["benchmark"] in TABLES):  # in order of time
        key = list(TABLES).index(result["benchmark"]), model_of(result)
        by_key = devices.setdefault(device_of(result), {})
        before = by_key.get(key, {})
        # A session can time one step twice: with all variants, and with fewer for longer. All say more.
        same_session = before.get("environment", {}).get("commit") == result["environment"]["commit"]
        if not (same_session and n_variants(before) > n_variants(result)):
            by_key[key] = result
    return {device: [by_key[key] for key in sorted(by_key)] for device, by_key in devices.items()}


def n_variants(result: Result) -> int:
    return len(timed_variants(result.get("variants", {})))


def section(result: Result) -> str:
    title, make = TABLES[result["benchmark"]]
    blocks = [f"### {title}{': ' * bool(model_of(result))}{model_of(result)}", make(result)]
    if result["benchmark"] == "throughput":
        blocks.insert(1, f"![{title}]({picture_of(result)})")
    if result.get("parts"):
        blocks.append(parts_table(result))
    if "note" in result:
        blocks.append(result["note"])
    return "\n\n".join([*blocks, provenance(result)]) + "\n"


def provenance(result: Result) -> str:
    e = result["environment"]
    versions = ", ".join(f"{name} {e[name]}" for name in ("torch", "triton", "cudnn") if e.get(name))
    commit = re.sub(r"^([0-9a-f]{12})[0-9a-f]+", r"\1", str(e["commit"]))
    return f"{e['device']}, {versions}, commit {commit}, {e['date']} UTC: `{e['command']}`"


# ---- the picture of a step


def picture_of(result: Result) -> str:
    """The name of its file."""
    words = f"{device_of(result)} {model_of(result)} {result['benchmark']}".lower()
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-") + ".svg"


def draw(result: Result, path: Path) -> None:
    """Tokens/s and memory of nanoGPT, our model on PyTorch's operations, and tritongpt."""
    import matplotlib
    from matplotlib.figure import Figure

    variants = timed_variants(result["variants"])
    colours = {"tritongpt": "tab:orange", "torch compiled": "silver", "nanogpt": "tab:blue"}
    names = [name for name in colours if name in variants]
    panels = {"tokens/s": ("tokens_per_s", 1), "peak memory, GB": ("peak_bytes", 1e9)}
    # The same results give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "tritongpt", "svg.fonttype": "none"}):
        figure = Figure(figsize=(9, 2.2), layout="constrained")
        for axes, (title, (key, unit)) in zip(figure.subplots(1, 2, sharey=True), panels.items()):
            values = [(variants[name][key] or 0) / unit for name in names]
            bars = axes.barh([NAMES.get(n, n) for n in names], values, color=[colours[n] for n in names])
            base = values[-1] if names[-1:] == ["nanogpt"] else None
            labels = [f"{v:,.0f}" + (f"  ({v / base:.2f}x)" if base else "") for v in values]
            axes.bar_label(bars, labels, padding=3)
            axes.set_title(title, loc="left")
            axes.set(xlim=(0, 1.35 * max(values, default=1) or 1), xticks=[])
            axes.spines[["top", "right"]].set_visible(False)
        figure.supxlabel(provenance(result).split(": `")[0], fontsize=7, color="gray")
        figure.savefig(path, metadata={"Date": None})


def write(results: list[Result], folder: Path, readme: Path) -> None:
    """Writes the folder's README.md and pictures, and the block of `readme`.

    The block has one step of each GPU on which nanoGPT was measured beside ours: that with the most variants.
    Raises ValueError where `readme` has no block.
    """
    text = readme.read_text()
    if not BLOCK.search(text):
        raise ValueError(f"{readme} has no lines <!-- bench.report --> and <!-- /bench.report -->")
    page, block = [HEAD], []
    for device, of_device in newest(results).items():
        page.append(f"## {device}\n\n" + "\n".join(section(result) for result in of_device))
        steps = [result for result in of_device if result["benchmark"] == "throughput"]
        for result in steps:
            draw(result, folder / picture_of(result))
        beside_nanogpt = [result for result in steps if "nanogpt" in timed_variants(result["variants"])]
        for result in sorted(beside_nanogpt, key=n_variants)[-1:]:
            title = f"tokens/s and memory of a training step, {device}, {model_of(result)}"
            block.append(f"![{title}](bench/results/{picture_of(result)})\n")
    (folder / "README.md").write_text("\n".join(page))
    readme.write_text(BLOCK.sub(lambda m: m[1] + "\n".join(block) + m[2], text))


@dataclass
class ReportConfig:
    """Write the tables and pictures of bench/results."""

    results: UserPath = "bench/results"  # folder of JSON files
    readme: UserPath = "README.md"  # the file with the block


def main() -> None:
    options = cli.parse(ReportConfig, sys.argv[1:], prog="python -m bench.report")
    write(timing.read(options.results), Path(options.results), Path(options.readme))


if __name__ == "__main__":
    cli.run(main)
