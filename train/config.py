"""Every setting of a training run, flat on the command line: `[config.py ...] [--key=value ...]`.

Names and defaults are nanoGPT's, so its config files run as they are; where its default supposes a GPU, ours
is "auto", resolved once and recorded.
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
from gpt import atomic, cli
from gpt.cli import UserPath
from gpt.device import DTYPES, resolve_compile, resolve_dtype
from gpt.model import RUN_OPTIONS, GPTConfig
from train.distributed import Ranks

PRESETS = Path(__file__).parent / "configs"
# A model's own: what is loaded has them.
SHAPE = tuple(option.name for option in fields(GPTConfig) if option.name not in RUN_OPTIONS)
BELOW_1 = math.nextafter(1, 0)
# The least and the most that makes a run. A product of two sizes, in bytes, still has 64 bits.
SIZE, COUNT, REAL = 2**29, 2**62, sys.float_info.max
BOUNDS: dict[str, tuple[float, float]] = {
    "seed": (-(2**63), 2**64 - 1), "log_interval": (1, COUNT), "timeout": (1, 2**31 - 1),
    "eval_interval": (1, COUNT), "eval_iters": (1, COUNT), "eval_sample": (0, SIZE), "keep_last": (0, COUNT),
    "gradient_accumulation_steps": (1, SIZE), "batch_size": (1, SIZE),
    "n_layer": (1, SIZE), "n_head": (1, SIZE), "n_embd": (1, SIZE), "block_size": (1, SIZE),
    "vocab_size": (1, SIZE),
    "weight_decay": (0, REAL), "beta1": (0, BELOW_1), "beta2": (0, BELOW_1), "grad_clip": (0, math.inf),
    "max_iters": (0, COUNT), "warmup_iters": (0, COUNT), "lr_decay_iters": (0, COUNT),
    "wsd_decay_iters": (0, COUNT), "learning_rate": (0, REAL), "min_lr": (0, REAL),
}  # fmt: skip


@dataclass
class TrainConfig:
    """Train a GPT.

    Presets, config files and flags are read in order, and later ones win. A config file assigns to the names
    of flags, as in n_layer = 6. Flags are shown with their defaults; --eval_only alone means True. A step is
    one update of the weights.
    """

    # run and output
    out_dir: UserPath = "out"  # where ckpt.pt, config.py and metrics.jsonl go
    init_from: UserPath = "scratch"  # scratch, resume, auto (resume if any), gpt2*, a ckpt.pt or its folder
    seed: int = 1337  # of weights, dropout and data order
    log_interval: int = 1  # steps between printed lines
    print_config: bool = False  # print every setting as a config file, with what auto is here, and end
    profile: str = ""  # START:STOP: a trace of those steps in out_dir, and a list of what costs most
    wandb_log: bool = False  # log to Weights & Biases as well (extra [wandb])
    wandb_project: str = "owt"  # its project
    wandb_run_name: str = "gpt2"  # its run

    # evaluation and checkpoints
    eval_interval: int = 2000  # steps between evaluations; a checkpoint follows each
    eval_iters: int = 200  # micro-batches of each split in an evaluation, shared by all ranks
    eval_only: bool = False  # evaluate once and stop
    eval_sample: int = 0  # tokens sampled and printed at each evaluation; 0 is off
    always_save_checkpoint: bool = True  # False: sample from best.pt, the lowest validation loss, not ckpt.pt
    keep_last: int = 2  # checkpoints kept as ckpt-STEP.pt: what resume falls back to if ckpt.pt is damaged

    # data
    dataset: UserPath = "openwebtext"  # folder in data/ with train.bin, val.bin or shards; resume has its own
    gradient_accumulation_steps: int = 40  # micro-batches in a step, over all ranks
    batch_size: int | Literal["auto"] = 12  # sequences of block_size tokens in a micro-batch; auto: what fits

    # model
    model: GPTConfig = field(default_factory=lambda: GPTConfig(bias=False, vocab_size=None))

    # optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"  # adamw, or muon for the matrices of the blocks
    weight_decay: float = 1e-1  # of matrices and embeddings
    beta1: float = 0.9  # AdamW: memory of the gradient's mean, about 1 / (1 - beta1) steps
    beta2: float = 0.95  # AdamW: memory of its square
    grad_clip: float = 1.0  # largest norm of the whole gradient; 0 is off

    # schedule
    max_iters: int = 600000  # steps in the run
    learning_rate: float = 6e-4  # at its highest, after the warm-up
    schedule: Literal["cosine", "wsd"] = (
        "cosine"  # after the warm-up: cosine, or wsd: stay, then go down linearly
    )
    warmup_iters: int = 2000  # steps of warm-up
    lr_decay_iters: int = 600000  # the step at which min_lr is reached
    min_lr: float = 6e-5  # where the decay ends
    decay_lr: bool = True  # False keeps learning_rate as it is, without warm-up
    wsd_decay_iters: int = 0  # steps of the wsd schedule's descent; 0: a fifth of lr_decay_iters

    # machine
    device: str = "auto"  # auto, cpu, mps, cuda, cuda:1, ...
    dtype: str = "auto"  # auto, float32, bfloat16, float16 (with loss scaling)
    compile: bool | Literal["auto"] = "auto"  # torch.compile the model; auto: on CUDA
    strategy: Literal["ddp", "fsdp"] = (
        "ddp"  # over ranks: ddp, or fsdp, which shards weights, gradients and optimizer
    )
    backend: str = "auto"  # of torch.distributed: auto, nccl, gloo
    timeout: int = 600  # seconds that a rank waits for another before the run ends with an error

    def flat(self) -> dict[str, Any]:
        """Plain values by flag: what is recorded with a checkpoint."""
        values = asdict(self)
        return values | values.pop("model")

    def check(self) -> None:
        """Raises ValueError for numbers that make no run."""
        cli.check_bounds(self.flat(), BOUNDS)
        if not 0 <= self.model.dropout < 1:
            raise ValueError(f"dropout={self.model.dropout} must be at least 0 and below 1")
        if self.backend not in ("auto", "nccl", "gloo"):
            raise ValueError(f"backend={self.backend!r} is none of auto, nccl, gloo")
        steps = self.profiled
        if steps and steps[0] >= self.max_iters:
            raise ValueError(f"profile={self.profile}: this run makes the steps 0 to {self.max_iters - 1}")

    @property
    def micro_batch(self) -> int:
        """batch_size, which is a number when the command line has been read."""
        assert self.batch_size != "auto"
        return self.batch_size

    @property
    def profiled(self) -> range:
        """The steps of `profile`. Raises ValueError."""
        start, _, stop = self.profile.partition(":")
        if self.profile and not (start.isdigit() and stop.isdigit() and int(start) < int(stop)):
            raise ValueError(
                f"profile={self.profile!r} must be START:STOP, such as 10:13 for the steps 10, 11 and 12"
            )
        return range(int(start), int(stop)) if self.profile else range(0)

    @property
    def sequences(self) -> int:
        """In a step, over all ranks."""
        return self.micro_batch * self.gradient_accumulation_steps


def parse(args: Sequence[str]) -> tuple[TrainConfig, dict[str, list[str]]]:
    """The configuration, checked, and the values of each flag that was set. Raises ValueError.

    Where batch_size is auto, it gets the number it was set to before: that says how long a step is, and
    `train.fit` looks for what fits.
    """
    config, given = cli.parse_given(TrainConfig, args, prog="python -m train", presets=PRESETS)
    if config.batch_size == "auto":
        numbers = [value for value in given["batch_size"] if value != "auto"]
        config.batch_size = int(numbers[-1]) if numbers else TrainConfig.batch_size
    config.check()
    return config, given


def resolve(config: TrainConfig, ranks: Ranks) -> TrainConfig:
    """Puts what this machine gives in place of every "auto". Raises ValueError for what it cannot do."""
    if config.gradient_accumulation_steps % ranks.world_size:
        raise ValueError(
            f"gradient_accumulation_steps={config.gradient_accumulation_steps} is the total over all ranks "
            f"and does not divide by the {ranks.world_size} there are; try {_multiple(config, ranks)}"
        )
    if config.strategy == "fsdp" and not ranks.backend:
        raise ValueError("strategy='fsdp' shards over ranks: start it with torchrun, one process a GPU")
    model, dtype = config.model, resolve_dtype(config.dtype, ranks.device)
    is_new = config.init_from == "scratch"
    shape = (model.n_embd // model.n_head, DTYPES[dtype]) if is_new else ()
    operations = kernels.load(model.kernels, ranks.device, *shape)
    # On a GPU "auto" depends on the head size. A model that is loaded brings its own, so GPT decides.
    if is_new or ranks.device_type != "cuda":
        model = replace(model, kernels=operations.spec)
    return replace(
        config,
        device=ranks.device,
        backend=ranks.backend or "none",
        dtype=dtype,
        compile=resolve_compile(config.compile, ranks.device),
        model=model,
    )


def config_file(config: TrainConfig, given: Mapping[str, Sequence[str]] | None = None) -> str:
    """A resolved configuration as the config file of the same run, on the same kind of machine.

    `given`, the values of the flags that were set, where no model is loaded yet: the model that init_from
    names keeps its own shape, and a resumed run its data.
    """
    values = config.flat()
    values.pop("print_config")
    if given is not None and config.init_from not in ("scratch", "auto"):
        for name in set(SHAPE).difference(given):
            del values[name]
    if given is not None and config.init_from in ("resume", "auto") and "dataset" not in given:
        del values["dataset"]  # a checkpoint has it
    values["device"] = config.device.removesuffix(":0")  # "cuda": under torchrun, each rank's own
    values["backend"] = "auto" if config.backend == "none" else config.backend
    heading = "# Every setting of a run; python -m train FILE.py makes it again.\n\n"
    return heading + cli.config_text(TrainConfig, values)


def resume_command(config: TrainConfig, ranks: Ranks, **changes: Any) -> str:
    """A command that goes on with this run, with some settings changed."""
    own = Path(config.out_dir, "config.py")
    words = [str(own) if own.exists() else f"--out_dir={config.out_dir}", "--init_from=resume"]
    words += [f"--{name}={value}" for name, value in changes.items()]
    if not ranks.backend:
        return cli.command("train", *words)
    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(ranks.world_size)
    launch = f"--standalone --nproc_per_node={ranks.world_size}" if one_machine else "..."
    return f"torchrun {launch} -m train {shlex.join(words)}"


def twice_as_long(config: TrainConfig) -> dict[str, int]:
    """The settings of twice as many steps, over which a learning rate that has ended is spread."""
    longer = {"max_iters": 2 * config.max_iters}
    if config.decay_lr and config.lr_decay_iters <= config.max_iters:
        longer["lr_decay_iters"] = longer["max_iters"]
    return longer


def save_config(config: TrainConfig, folder: Path) -> None:
    """Writes `config_file` as config.py. Raises OSError."""
    atomic.write(folder / "config.py", config_file(config))


def _multiple(config: TrainConfig, ranks: Ranks) -> int:
    """The nearest number of accumulation steps that divides."""
    return ranks.world_size * max(1, round(config.gradient_accumulation_steps / ranks.world_size))
