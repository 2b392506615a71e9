"""python -m train.plot OUT_DIR: metrics.jsonl as a picture, OUT_DIR/loss.png."""

import sys
from pathlib import Path

from gpt import cli
from train.metrics import read


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise ValueError("give the out_dir of a run: python -m train.plot OUT_DIR")
    folder = Path(sys.argv[1])
    if not (folder / "metrics.jsonl").is_file():
        raise FileNotFoundError(f"{folder} holds no metrics.jsonl: no run was made there")
    print(plot(folder))


def plot(folder: Path) -> Path:
    """Draws the loss of the steps and of the evaluations; returns the picture's path."""
    import matplotlib

    matplotlib.use("Agg")  # no screen needed
    import matplotlib.pyplot as plt

    records = read(folder / "metrics.jsonl")
    steps = [r for r in records if "loss" in r]
    evaluations = [r for r in records if "val/loss" in r]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot([r["iter"] for r in steps], [r["loss"] for r in steps], color="0.75", lw=0.8, label="step")
    for split, color in (("train", "tab:blue"), ("val", "tab:orange")):
        values = [r[f"{split}/loss"] for r in evaluations]
        axes.plot(
            [r["iter"] for r in evaluations], values, "o-", color=color, ms=3, label=f"{split}, evaluated"
        )
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=folder.name)
    axes.grid(alpha=0.3)
    axes.legend()
    picture = folder / "loss.png"
    figure.savefig(picture, dpi=120)
    plt.close(figure)
    return picture


if __name__ == "__main__":
    cli.run(main)
