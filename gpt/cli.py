"""The command lines of this project: the fields of a dataclass become flags, which config files can set too.

A config file is Python that assigns to the names of flags, as in nanoGPT. Its values get the same checks and
the same messages as those of `--name=value`.
"""

import difflib
import importlib
import inspect
import os
import re
import shlex
import shutil
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields, is_dataclass
from io import TextIOWrapper
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, get_args

from gpt.reading import read_text

Config = TypeVar("Config")
Value = TypeVar("Value")
UserPath = Annotated[str, Path]  # the type of a flag that names a file or a folder; ~ is the home folder
OWN_PACKAGES = ("kernels", "gpt", "train", "bench")
SWITCH = {"true": True, "1": True, "false": False, "0": False}


class Flag(NamedTuple):
    name: str
    group: str  # its heading in --help
    help: str
    default: Any  # MISSING if the flag is required
    type: Any


def parse(config_class: type[Config], args: Sequence[str], prog: str, path_flag: str = "") -> Config:
    """`parse_given` for programs without presets. Returns the settings alone."""
    return parse_given(config_class, args, prog, path_flag=path_flag)[0]


def parse_with_paths(config_class: type[Config], args: Sequence[str], prog: str) -> tuple[Config, list[str]]:
    """Reads `[PATH ...] [--name=value ...]`. Returns the settings and the paths."""
    paths: list[str] = []
    return parse_given(config_class, args, prog, paths=paths)[0], paths


def parse_given(
    config_class: type[Config],
    args: Sequence[str],
    prog: str,
    presets: Path | None = None,
    path_flag: str = "",
    paths: list[str] | None = None,
) -> tuple[Config, dict[str, list[str]]]:
    """Reads `[config.py ...] [--name=value ...]` in order; later values win. `--help` prints `help_text`.

    Also returns, for each flag that was set, all its values in order. A config file is given by its path, or
    by its name in the folder `presets`. A word that does not end in .py sets `path_flag`, if there is one.
    If `paths` is given, each word that is not a flag is appended to it. Raises ValueError, OSError.
    """
    if {"-h", "--help"}.intersection(args):
        print(help_text(config_class, prog, presets, path_flag))
        sys.exit(0)
    flags = {flag.name: flag for flag in describe(config_class)}
    values = {name: flag.default for name, flag in flags.items() if flag.default is not MISSING}
    # A config file sees all flags, as in nanoGPT, whose train.py executes it among its own names.
    scope = values | {"__name__": "__main__"}
    given: dict[str, list[str]] = {}
    rest = list(args)
    while rest:
        word = rest.pop(0)
        settings: dict[str, Any] = {}
        if word.startswith("-"):
            settings = _setting(word, rest, flags)
        elif paths is not None:
            paths.append(os.path.expanduser(word))
        elif path_flag and not word.endswith(".py"):
            settings = {path_flag: read_value(flags[path_flag], word)}
        else:
            settings = _settings_of_file(_find(word, presets), flags, scope)
        values |= settings
        scope |= settings
        for name in settings:
            given.setdefault(name, []).append(str(settings[name]))
    for name, flag in flags.items():
        if name not in values:
            raise ValueError(f"--{name}=... is missing: {flag.help}")
    return _filled(config_class, values), given


def _setting(word: str, rest: list[str], flags: Mapping[str, Flag]) -> dict[str, Any]:
    """Reads a flag: `--name=value`, `--name value`, or `--name` for a switch. Returns {name: value}.

    Removes the value from `rest`, the words after this one, if it stands there.
    """
    name, equals, value = word.partition("=")
    known = {f"--{flag}": flags[flag] for flag in flags}
    if name.startswith("--"):
        name = "--" + name[2:].replace("-", "_")
    flag = choose(known, name, "flag", "--help lists them")
    if not equals:
        is_switch = bool in _alternatives(flag.type) and "".join(rest[:1]).lower() not in (*SWITCH, "auto")
        if not is_switch and not rest:
            raise ValueError(f"{name} needs a value: {flag.help}")
        value = "True" if is_switch else rest.pop(0)
    # The name of a file keeps the bytes that the shell passed.
    if flag.type is not UserPath:
        value = typed_text(value, sys.getfilesystemencoding())
    return {flag.name: read_value(flag, value)}


def _filled(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """The dataclass, and those nested in it, with these values."""
    parts = {
        field.name: _filled(field.type, values)
        if isinstance(field.type, type) and is_dataclass(field.type)
        else values[field.name]
        for field in fields(config_class)  # type: ignore[arg-type]
    }
    return config_class(**parts)


# ---- values


def read_value(flag: Flag, value: Any) -> Any:
    """Converts `value`, from the command line or from a config file, to the type of `flag`.

    A whole number may be written as 6e5, and True and False in any case or as 1 and 0. Raises ValueError.
    """
    text = str(value)
    types = list(_alternatives(flag.type))
    # On the command line None is text. In a config file it is not.
    if text in types or (str in types and value is not None):
        return os.path.expanduser(text) if flag.type is UserPath else text
    if text == "None" and type(None) in types:
        return None
    if bool in types and text.lower() in SWITCH:
        return SWITCH[text.lower()]
    try:
        if int in types:
            number = int(text) if text.lstrip("+-").isdecimal() else float(text)
            if number == int(number) and -(2**63) <= number < 2**64:
                return int(number)
        elif float in types:
            return float(text)
    except (ValueError, OverflowError):
        pass
    kinds = {int: "a whole number of at most 64 bits", float: "a number", bool: "True or False"}
    kinds |= {type(None): "None", str: "text"}
    expected = " or ".join(kinds.get(kind, str(kind)) for kind in types if kind is not Path)
    raise ValueError(f"{flag.name}={text} must be {expected}")


def _alternatives(kind: Any) -> Iterator[Any]:
    """The types and the literal values in a union."""
    parts = get_args(kind)
    if not parts:
        yield kind
    for part in parts:
        yield from _alternatives(part)


def typed_text(text: str, encoding: str) -> str:
    """The text that a user typed and Python decoded with the locale's `encoding`.

    It is UTF-8 in any locale if its bytes allow it, and else in the locale's encoding. Raises ValueError.
    """
    try:
        # Python stores bytes that it cannot decode as surrogates.
        content = text.encode(encoding, "surrogateescape")
    except UnicodeEncodeError:
        return text  # it does not come from the locale
    for candidate in ("utf-8", encoding):
        with suppress(UnicodeDecodeError):
            return content.decode(candidate)
    raise ValueError(f"{text!a} is not UTF-8 text")


def ask(prompt: str) -> str:
    """The next line of stdin, by `typed_text`. Raises ValueError, EOFError."""
    return typed_text(input(prompt), sys.stdin.encoding or "utf-8")


def check_bounds(values: Mapping[str, Any], bounds: Mapping[str, tuple[float, float]]) -> None:
    """Raises ValueError for a number that is NaN or outside its (minimum, maximum)."""
    for name, (low, high) in bounds.items():
        value = values[name]
        if isinstance(value, int | float) and not low <= value <= high:
            bound = f"at most {high}" if value > high else f"at least {low}"
            raise ValueError(f"{name}={value} must be {bound}")


def choose(known: Mapping[str, Value], name: str, kind: str, hint: str = "") -> Value:
    """`known[name]`. `kind` is what the names stand for.

    Raises ValueError, which names the closest name, or else `hint`. The default of `hint` lists all names.
    """
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else hint or f"choose from {', '.join(known)}"
    raise ValueError(f"there is no {kind} {name!r}; {hint}")


# ---- config files


def _find(name: str, presets: Path | None) -> Path:
    """A config file by its path, by the folder of a run, or by the name of a preset. Raises ValueError."""
    path = Path(os.path.expanduser(name))
    for file in (path, path / "config.py"):
        if file.is_file():
            return file
    if not presets:
        raise ValueError(
            f"{name!r} is not a config file, and flags are written --name=value; --help lists them"
        )
    known = {preset.stem: preset for preset in sorted(presets.glob("*.py"))}
    return choose(known, name.removesuffix(".py"), "config file or preset")


def _settings_of_file(path: Path, flags: Mapping[str, Flag], scope: dict[str, Any]) -> dict[str, Any]:
    """Executes a config file in `scope`. Returns {name: value} of the flags that it sets, in any way.

    Ignores names that are not flags, and prints a hint if one resembles a flag. Raises ValueError, OSError.
    """
    source = read_text(path)
    names = _Names(scope | {"__file__": str(path)})
    try:
        code = compile(source, str(path), "exec")
        with _importing_from(path.resolve().parent), IfSlow(f"executing {path}; Ctrl-C stops it"):
            exec(code, names)
    except BaseException as error:  # a config file can also exit
        message = f"{_position(error, path)}: {type(error).__name__}: {error}"
        raise ValueError(message.rstrip(": ")) from None
    # _Names does not notice globals().update(...), nor `global` in a function.
    changed = (name for name in names if names[name] is not scope.get(name, MISSING))
    lines = dict.fromkeys(changed) | names.lines
    scope.update(names)
    settings = {}
    for name, line in lines.items():
        if name in flags and name in names:
            try:
                settings[name] = read_value(flags[name], names[name])
            except ValueError as error:
                raise ValueError(f"{path}{f', line {line}' if line else ''}: {error}") from None
        # Modules, functions and private names cannot be misspelled settings.
        elif isinstance(names.get(name), bool | int | float | str) and not name.startswith("_"):
            for close in difflib.get_close_matches(name, flags, n=1, cutoff=0.8):
                hint = f"{name!r} is not a flag and is ignored; did you mean {close!r}?"
                print(f"{path}: {hint}", file=sys.stderr)
    return settings


class _Names(dict[str, Any]):
    """The names in a config file, and the line that assigned each last."""

    def __init__(self, names: dict[str, Any]):
        super().__init__(names)
        self.lines: dict[str, int | None] = {}

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        # Code in exec(...) is not a line of the file. The call of exec is.
        frame = inspect.currentframe()
        while frame and frame.f_code.co_filename != self["__file__"]:
            frame = frame.f_back
        self.lines[name] = frame and frame.f_lineno


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Inside, modules in `folder` can be imported. They are forgotten at the end.

    Two config files can thus import different modules with the same name, even the name of one of our
    packages, such as train.py.
    """
    modules, search_path = dict(sys.modules), sys.path[:]
    for name in modules:
        package = name.partition(".")[0]
        if package in OWN_PACKAGES and (folder / f"{package}.py").is_file():
            del sys.modules[name]
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = search_path
        for name, module in list(sys.modules.items()):
            package, file = name.partition(".")[0], getattr(module, "__file__", None) or ""
            if package not in modules and file.startswith(str(folder / package)):
                del sys.modules[name]
        sys.modules.update(modules)


def _position(error: BaseException, path: Path) -> str:
    """The innermost line in the config's folder that the error came from."""
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        places.append((error.filename or "", error.lineno))
    lines = [f"{path}, line 1"]
    for file, line in places:
        if file == str(path) or Path(file).parent == path.resolve().parent:
            lines.append(f"{file}, line {line or 1}")
    return lines[-1]


def config_text(config_class: type, values: Mapping[str, Any]) -> str:
    """A config file that sets these values, under the headings of --help."""
    lines = []
    for group, flags in groupby(describe(config_class), lambda flag: flag.group):
        lines += ["", f"# {group}"]
        for flag in flags:
            if flag.name in values:
                text = repr(values[flag.name])
                # inf and nan are not names in Python.
                text = f"float({text!r})" if text in ("inf", "-inf", "nan") else text
                lines.append(f"{flag.name} = {text}")
    return "\n".join(lines[1:]) + "\n"


# ---- help


def describe(config_class: type, group: str = "flags") -> list[Flag]:
    """The flags of a dataclass and of the dataclasses nested in it.

    The comment behind a field is its help, and a comment on a line of its own is the heading of the fields
    below it.
    """
    headings: dict[str, str] = {}
    helps: dict[str, str] = {}
    heading = name = ""
    for line in inspect.getsource(config_class).splitlines():
        if match := re.match("    # (.*)", line):
            heading, name = match[1], ""
        elif match := re.match(r"    (\w+): ", line):
            name = match[1]
            headings[name] = heading
        elif line.startswith(("    def ", "    @")):
            break
        # A long field has its comment on the next line.
        if name not in helps and (match := re.search("  # (.*)", line)):
            helps[name] = match[1]
    flags = []
    for field in fields(config_class):
        group = headings[field.name] or group
        if is_dataclass(field.type) and isinstance(field.type, type):
            values = vars(field.default_factory())  # type: ignore[misc, operator]
            flags += [flag._replace(default=values[flag.name]) for flag in describe(field.type, group)]
        else:
            flags.append(Flag(field.name, group, helps.get(field.name, ""), field.default, field.type))
    return flags


def help_text(config_class: type, prog: str, presets: Path | None = None, path_flag: str = "") -> str:
    """The text of --help, as wide as the terminal, from 60 to 120 columns."""
    width = min(max(shutil.get_terminal_size().columns, 60), 120)
    files = " [PRESET or FILE.py ...]" if presets else f" [{path_flag.upper()}]" if path_flag else ""
    lines = [f"usage: {prog}{files} [--flag=value ...]", ""]
    for paragraph in inspect.cleandoc(config_class.__doc__ or "").split("\n\n"):
        lines += [*textwrap.wrap(paragraph, width), ""]
    if presets:
        lines += ["presets"]
        for path in sorted(presets.glob("*.py")):
            first_line = path.read_text("utf-8").partition("\n")[0]
            lines += _row(path.stem, first_line.removeprefix("# ").partition(". ")[0].rstrip(".:"), width)
        lines += [""]
    for group, flags in groupby(describe(config_class), lambda flag: flag.group):
        lines += [f"{group}, with defaults" if group == "flags" else group]
        for flag in flags:
            required = flag.default is MISSING
            default = (
                "..." if required else repr(flag.default) if flag.default in ("", "\n") else flag.default
            )
            lines += _row(f"--{flag.name}={default}", flag.help + required * " (required)", width)
        lines += [""]
    return "\n".join(lines[:-1])


def _row(left: str, text: str, width: int, column: int = 34) -> list[str]:
    """The lines of a table row with two columns. A long `left` gets a line of its own."""
    right = textwrap.wrap(text, width - column, break_on_hyphens=False) or [""]
    fits = len(left) <= column - 4
    first = [f"  {left:<{column - 2}}{right[0]}".rstrip()] if fits else [f"  {left}", " " * column + right[0]]
    return first + [" " * column + line for line in right[1:]]


# ---- programs


def run(main: Callable[[], None]) -> None:
    """Runs a program. An error that the user can fix is printed as one sentence, and the exit code is 1."""
    # The console may lack a character of a sample, which must not end a training. Print it as \u0416.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # for typed_text
    try:
        main()
    except BrokenPipeError:  # the reader of our output has ended, such as `| head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - Python flushes stdout when it exits
        sys.exit(141)
    except (ValueError, OSError) as error:
        if os.environ.get("TRITONGPT_TRACEBACK"):
            raise
        rank = os.environ.get("RANK", "0")
        sys.exit(f"error{'' if rank == '0' else f' (rank {rank})'}: {error}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in OWN_PACKAGES:
            raise
        sys.exit(f"error: the package {error.name} is not installed: run make install")
    except KeyboardInterrupt:
        sys.exit(130)


class IfSlow(threading.Timer):
    """Prints a line to a terminal if the code inside takes longer than five seconds."""

    def __init__(self, text: str, enabled: bool = True):
        super().__init__(5, print, [text], {"file": sys.stderr, "flush": True})
        self.daemon, self.enabled = True, enabled

    def __enter__(self) -> None:
        if self.enabled and sys.stderr.isatty():
            self.start()

    def __exit__(self, *exception: object) -> None:
        self.cancel()


def command(module: str, *words: object) -> str:
    """A command of this project that can be pasted into the shell that started this program."""
    # sys.executable may be the python3 beside python, which torchrun starts.
    is_on_path = Path(shutil.which("python") or "").parent == Path(sys.executable).parent
    python = "python" if is_on_path else min(os.path.relpath(sys.executable), sys.executable, key=len)
    return shlex.join([python, "-m", module, *map(str, words)])


def install(extra: str) -> str:
    """The command that installs the packages of one of setup.py's extras."""
    return command("pip", "install", "-e", f".[{extra}]")
