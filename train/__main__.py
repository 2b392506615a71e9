"""python -m train: a GPT from tokens to weights, on one device or, under torchrun, on many.

The flags are those of train/config.py, the run is train/loop.py.
"""

import sys

from gpt import cli
from train import checkpoint, distributed, fit
from train.config import config_file, parse, resolve
from train.loop import train
from train.signals import StopRequest
from train.view import open_view


def main() -> None:
    config, given = parse(sys.argv[1:])
    try:
        ranks = distributed.start(config.backend, config.device, config.timeout)
        if config.print_config:
            text = config_file(resolve(config, ranks), given)
            if ranks.is_main:
                print(text, end="")
        else:
            with open_view() as view, checkpoint.locked_folder(config, ranks):
                stop = StopRequest(view.stopping) if ranks.is_main else StopRequest()
                train(config, ranks, given, stop, view)
    except (RuntimeError, MemoryError) as error:
        if fit.out_of_memory(error):
            raise ValueError(fit.explain(error, config.out_dir)) from error
        if not distributed.lost_rank(error):
            raise
        raise OSError(
            f"another rank died or did not answer within timeout={config.timeout} s ({error}); "
            "--init_from=resume continues from the last checkpoint"
        ) from error
    distributed.stop(ranks)


if __name__ == "__main__":
    cli.run(main)
