"""Every command line of the project: a dataclass becomes flags, config files become flags before them.

A config file is Python that assigns to the names of the flags, as nanoGPT's are. It is turned into
`--name=value`, so a value from a file meets the same checks and the same messages as one from the shell.
"""

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

Config = TypeVar("Config")


def parse(config_class: type[Config], args: Sequence[str], prog: str, presets: Path | None = None) -> Config:
    """Reads `[config.py ...] [--key=value ...]`, later ones winning. Bad flags: prints why and exits with 2.

    A config file is found by its path or, in the folder `presets`, by its name.
    """
    import tyro

    names = flag_names(config_class)
    flags: list[str] = []
    for i, arg in enumerate(args):
        is_value = i > 0 and args[i - 1].startswith("-") and "=" not in args[i - 1]  # of `--key value`
        if arg.startswith("-") or is_value:
            flags.append(arg)
        else:
            flags += _flags_of_file(_find(arg, presets), names)
    options = (tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes)
    return tyro.cli(config_class, args=flags, prog=prog, config=options, use_underscores=True)


def flag_names(config_class: type) -> list[str]:
    """The flat list of flags of a dataclass, those of the dataclasses nested in it included."""
    names = []
    for field in fields(config_class):
        nested = is_dataclass(field.type) and isinstance(field.type, type)
        names += flag_names(field.type) if nested else [field.name]  # type: ignore[arg-type]
    return names


def run(main: Callable[[], None]) -> None:
    """Runs a command; what the user can mend is one sentence on stderr and exit code 1, not a traceback."""
    try:
        main()
    except (ValueError, OSError) as error:
        if os.environ.get("TRITONGPT_TRACEBACK"):
            raise
        rank = os.environ.get("RANK", "0")
        sys.exit(f"error{'' if rank == '0' else f' (rank {rank})'}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _find(name: str, presets: Path | None) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    known = {p.stem: p for p in sorted(presets.glob("*.py"))} if presets else {}
    if path.stem in known and path.parent == Path():
        return known[path.stem]
    close = difflib.get_close_matches(path.stem, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"presets: {', '.join(known)}" if known else ""
    raise ValueError(f"{name!r} is neither a config file nor a preset; {hint}")


def _flags_of_file(path: Path, names: list[str]) -> list[str]:
    assigned: dict[str, Any] = {}
    exec(compile(path.read_text(), str(path), "exec"), assigned)
    del assigned["__builtins__"]
    for name in assigned.keys() - set(names):
        if close := difflib.get_close_matches(name, names, n=1, cutoff=0.8):
            print(f"{path}: {name!r} is no flag and is ignored; did you mean {close[0]!r}?", file=sys.stderr)
    return [f"--{name}={value}" for name, value in assigned.items() if name in names]
