"""Every setting of a training run: `[config.py ...] [--key=value ...]` on the command line.

Names and defaults are nanoGPT's, so its config files run unchanged. Where nanoGPT's default assumes a GPU,
ours is "auto". `resolve` replaces each "auto" by what this machine has.
"""

import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import kernels
from gpt import cli
from gpt.cli import UserPath
from gpt.device import DTYPES, resolve_compile, resolve_dtype
from gpt.model import RUN_OPTIONS, GPTConfig
from train.distributed import Ranks

PRESETS = Path(__file__).parent / "configs"
# The fields of GPTConfig that a loaded model brings with it.
MODEL_FIELDS = tuple(option.name for option in fields(GPTConfig) if option.name not in RUN_OPTIONS)
LARGEST_BELOW_1 = math.nextafter(1, 0)
# Bounds of the numeric flags. SIZE is small enough that the bytes of a SIZE x SIZE tensor fit into 64 bits.
SIZE, COUNT, REAL = 2**29, 2**62, sys.float_info.max
BOUNDS: dict[str, tuple[float, float]] = {
    "seed": (-(2**63), 2**64 - 1), "log_interval": (1, COUNT), "timeout": (1, 2**31 - 1),
    "eval_interval": (1, COUNT), "eval_iters": (1, COUNT), "eval_sample": (0, SIZE), "keep_last": (0, COUNT),
    "gradient_accumulation_steps": (1, SIZE), "batch_size": (1, SIZE),
    "n_layer": (1, SIZE), "n_head": (1, SIZE), "n_embd": (1, SIZE), "block_size": (1, SIZE),
    "vocab_size": (1, SIZE),
    "weight_decay": (0, REAL), "grad_clip": (0, math.inf),
    "beta1": (0, LARGEST_BELOW_1), "beta2": (0, LARGEST_BELOW_1),
    "max_iters": (0, COUNT), "warmup_iters": (0, COUNT), "lr_decay_iters": (0, COUNT),
    "wsd_decay_iters": (0, COUNT), "learning_rate": (0, REAL), "min_lr": (0, REAL),
}  # fmt: skip


@dataclass
class TrainConfig:
    """Train a GPT.

    Presets, config files and flags are read in order, and later ones win. A config file assigns to the names
    of flags, such as n_layer = 6. Flags are listed with their defaults. --eval_only alone means True. A step
    is one update of the weights.
    """

    # run and output
    out_dir: UserPath = "out"  # where ckpt.pt, config.py and metrics.jsonl go
    init_from: UserPath = (
        "scratch"  # scratch, resume, auto (resume if possible), gpt2*, a ckpt.pt, a run's or model's folder
    )
    seed: int = 1337  # for weights, dropout and data order
    log_interval: int = 1  # steps between printed lines
    print_config: bool = False  # print every setting as a config file, for this machine, and stop
    profile: str = ""  # START:STOP: trace these steps into out_dir and print the most expensive operations
    wandb_log: bool = False  # log to Weights & Biases as well (extra [wandb])
    wandb_project: str = "owt"  # project in Weights & Biases
    wandb_run_name: str = "gpt2"  # run in Weights & Biases

    # evaluation and checkpoints
    eval_interval: int = 2000  # steps between evaluations; each after step 0 saves a checkpoint
    eval_iters: int = 200  # micro-batches per split in an evaluation, divided among the ranks
    eval_only: bool = False  # evaluate once and stop
    eval_sample: int = 0  # tokens sampled and printed at each evaluation; 0 is off
    always_save_checkpoint: bool = True  # False: sampling and evaluation load best.pt, the lowest val loss
    keep_last: int = 2  # ckpt-STEP.pt files: the newest is ckpt.pt itself, older ones replace it if damaged

    # data
    dataset: UserPath = (
        "openwebtext"  # folder in data/ with train.bin and val.bin, or shards; resume uses the checkpoint's
    )
    gradient_accumulation_steps: int = 40  # micro-batches per step, over all ranks
    batch_size: int | Literal["auto"] = 12  # sequences in a micro-batch; auto: as many as fit

    # model
    model: GPTConfig = field(default_factory=lambda: GPTConfig(bias=False, vocab_size=None))

    # optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"  # adamw, or muon for the matrices of the blocks
    weight_decay: float = 1e-1  # of matrices and embeddings
    beta1: float = 0.9  # AdamW: decay of the mean of the gradient
    beta2: float = 0.95  # AdamW: decay of the mean of the squared gradient
    grad_clip: float = 1.0  # largest norm of the gradient; 0 switches clipping off

    # schedule
    max_iters: int = 600000  # steps in the run
    learning_rate: float = 6e-4  # peak learning rate, after the warm-up
    schedule: Literal["cosine", "wsd"] = "cosine"  # cosine decay, or wsd: constant, then a linear decay
    warmup_iters: int = 2000  # steps of warm-up
    lr_decay_iters: int = 600000  # step at which the decay ends, at min_lr
    min_lr: float = 6e-5  # learning rate after the decay
    decay_lr: bool = True  # False: constant learning_rate, without a warm-up
    wsd_decay_iters: int = 0  # steps of the linear decay of wsd; 0: a fifth of lr_decay_iters

    # machine
    device: str = "auto"  # auto, cpu, mps, cuda, cuda:1, ...
    dtype: str = "auto"  # auto, float32, bfloat16, float16 (with loss scaling)
    compile: bool | Literal["auto"] = "auto"  # torch.compile the model; auto: on CUDA
    strategy: Literal["ddp", "fsdp"] = "ddp"  # fsdp shards weights, gradients and optimizer over the ranks
    backend: Literal["auto", "nccl", "gloo"] = "auto"  # torch.distributed: auto, nccl, gloo
    timeout: int = 600  # seconds that a rank waits for the others before the run fails

    def flat(self) -> dict[str, Any]:
        """{flag: value} of all flags, as a checkpoint records them."""
        values = asdict(self)
        return values | values.pop("model")

    def check(self) -> None:
        """Raises ValueError for values that no run can have."""
        cli.check_bounds(self.flat(), BOUNDS)
        if not 0 <= self.model.dropout < 1:
            raise ValueError(f"dropout={self.model.dropout} must be at least 0 and below 1")
        steps = self.profiled
        if steps and steps[0] >= self.max_iters:
            raise ValueError(f"profile={self.profile}: this run has only the steps 0 to {self.max_iters - 1}")

    @property
    def micro_batch(self) -> int:
        """Sequences per micro-batch: batch_size, which `parse` has made a number."""
        assert self.batch_size != "auto"
        return self.batch_size

    @property
    def profiled(self) -> range:
        """Parses `profile` into a range of steps. Raises ValueError if it is malformed."""
        start, _, stop = self.profile.partition(":")
        if self.profile and not (start.isdigit() and stop.isdigit() and int(start) < int(stop)):
            raise ValueError(
                f"profile={self.profile!r} must be START:STOP, such as 10:13 for the steps 10, 11 and 12"
            )
        return range(int(start), int(stop)) if self.profile else range(0)

    @property
    def sequences_per_step(self) -> int:
        """Sequences per step, over all ranks."""
        return self.micro_batch * self.gradient_accumulation_steps


def parse(args: Sequence[str]) -> tuple[TrainConfig, dict[str, list[str]]]:
    """Returns the checked configuration, and the values of each flag that was set. Raises ValueError.

    With --batch_size=auto, batch_size is the last number given by a preset or flag, or the default. It fixes
    the sequences per step, and `train.fit` then finds the micro-batch that fits.
    """
    config, given = cli.parse_given(TrainConfig, args, prog="python -m train", presets=PRESETS)
    if config.batch_size == "auto":
        numbers = [value for value in given["batch_size"] if value != "auto"]
        config.batch_size = int(numbers[-1]) if numbers else TrainConfig.batch_size
    config.check()
    return config, given


def resolve(config: TrainConfig, ranks: Ranks) -> TrainConfig:
    """Replaces "auto" by what this machine has. Raises ValueError for settings it does not support."""
    if config.gradient_accumulation_steps % ranks.world_size and not config.eval_only:
        raise ValueError(
            f"gradient_accumulation_steps={config.gradient_accumulation_steps} is the total over all ranks "
            f"and must be a multiple of their number, {ranks.world_size}"
        )
    if config.strategy == "fsdp" and not ranks.backend:
        raise ValueError("strategy='fsdp' shards over ranks: start it with torchrun, one process per GPU")
    model, dtype = config.model, resolve_dtype(config.dtype, ranks.device)
    is_new = config.init_from == "scratch"
    shape = (model.n_embd // model.n_head, DTYPES[dtype]) if is_new else ()
    operations = kernels.load(model.kernels, ranks.device, *shape)
    # On a GPU "auto" needs the head size. For a loaded model that is not known yet; GPT resolves it.
    if is_new or ranks.device_type != "cuda":
        model = replace(model, kernels=operations.spec)
    return replace(
        config,
        device=ranks.device,
        dtype=dtype,
        compile=resolve_compile(config.compile, ranks.device),
        model=model,
    )


def config_file(config: TrainConfig, given: Mapping[str, Sequence[str]] | None = None) -> str:
    """Returns the text of a config file that repeats a resolved configuration on the same kind of machine.

    `given` (the flags that were set) is for --print_config, before a model is loaded. Settings that the
    checkpoint will supply are left out then.
    """
    values = config.flat()
    for name in ("print_config", "profile"):
        del values[name]  # they concern one start, not the run
    if given is not None and config.init_from != "scratch":
        for name in set(MODEL_FIELDS).difference(given):
            del values[name]
    if given is not None and config.init_from in ("resume", "auto") and "dataset" not in given:
        del values["dataset"]
    values["device"] = config.device.removesuffix(":0")  # the rank decides which GPU
    heading = "# Every setting of a run; python -m train FILE.py repeats it.\n\n"
    return heading + cli.config_text(TrainConfig, values)


def resume_command(config: TrainConfig, ranks: Ranks, **changes: Any) -> str:
    """The command that resumes this run, with some settings changed."""
    own = Path(config.out_dir, "config.py")
    words = [str(own) if own.exists() else f"--out_dir={config.out_dir}", "--init_from=resume"]
    words += [f"--{name}={value}" for name, value in changes.items()]
    if not ranks.backend:
        return cli.command("train", *words)
    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(ranks.world_size)
    launch = f"--standalone --nproc_per_node={ranks.world_size}" if one_machine else "..."
    return f"torchrun {launch} -m train {shlex.join(words)}"


def twice_as_long(config: TrainConfig) -> dict[str, int]:
    """Flags for twice as many steps. A decay that ends within the run is stretched to the new end."""
    longer = {"max_iters": 2 * config.max_iters}
    if config.decay_lr and config.lr_decay_iters <= config.max_iters:
        longer["lr_decay_iters"] = longer["max_iters"]
    return longer
