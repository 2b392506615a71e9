"""Every command line of the project: a dataclass becomes flags, config files become flags before them.

A config file is Python that sets the names of the flags, as nanoGPT's are. It is turned into `--name=value`,
so a value from a file meets the same checks and the same messages as one from the shell.
"""

import difflib
import importlib
import inspect
import math
import os
import re
import shlex
import shutil
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from io import TextIOWrapper
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn, TypeVar, get_args

from gpt.reading import read_text, text_encoding

Config = TypeVar("Config")
Value = TypeVar("Value")
UserPath = Annotated[str, Path]  # the type of a flag that names a file or a folder: ~ is the user's home
OWN_PACKAGES = ("kernels", "gpt", "train", "bench")
SWITCH = {"true": True, "1": True, "false": False, "0": False}


class Flag(NamedTuple):
    name: str
    group: str  # the heading that it stands under
    help: str
    default: Any  # MISSING where a value must be given
    type: Any  # of its field

    @property
    def is_switch(self) -> bool:
        """Takes True and False, and alone means True."""
        return bool in (self.type, *get_args(self.type))


def parse(
    config_class: type[Config],
    args: Sequence[str],
    prog: str,
    presets: Path | None = None,
    path_flag: str = "",
) -> Config:
    """Reads `[config.py ...] [--key=value ...]`, later ones winning. Bad flags: prints why and exits with 2.

    A config file is found by its path or, in the folder `presets`, by its name. `--key` alone says True.
    A word that does not end in .py is the value of `path_flag`, if there is one. `--help` prints `help_text`
    and exits with 0.
    """
    return parse_given(config_class, args, prog, presets, path_flag)[0]


def parse_given(
    config_class: type[Config],
    args: Sequence[str],
    prog: str,
    presets: Path | None = None,
    path_flag: str = "",
) -> tuple[Config, dict[str, list[str]]]:
    """`parse`, and of each flag that was set, by a file or on the command line, its values in order."""
    if {"-h", "--help"}.intersection(args):
        print(help_text(config_class, prog, presets, path_flag))
        sys.exit(0)
    described = {flag.name: flag for flag in describe(config_class)}
    values = {name: flag.default for name, flag in described.items() if flag.default is not MISSING}
    scope = values | {"__name__": "__main__"}  # as nanoGPT's, which run in its train.py
    given: dict[str, list[str]] = {}
    for word, value in words(config_class, args):
        if not word and path_flag and not (value or "").endswith(".py"):
            word = f"--{path_flag}"
        if word:
            try:
                settings = _setting(word, value, described)
            except ValueError as error:
                _refuse(error)
        else:
            settings = _settings_of_file(_find(value or "", presets), described, scope)
        values |= settings
        scope |= settings
        for name in settings:
            given.setdefault(name, []).append(str(settings[name]))
    for name, flag in described.items():
        if name not in values:
            _refuse(f"--{name}=... is missing: {flag.help}")
    return _filled(config_class, values), given


def _setting(word: str, value: str | None, described: Mapping[str, Flag]) -> dict[str, Any]:
    """{name: value} of `--name=value`. Raises ValueError."""
    name = word.removeprefix("--")
    if name not in described:
        close = difflib.get_close_matches(name.strip("-"), described, n=1)
        hint = f" (did you mean --{close[0]}?)" if close else ""
        raise ValueError(f"there is no flag {word}{hint}; --help lists them")
    if value is None:
        raise ValueError(f"--{name} needs a value: {described[name].help}")
    try:
        if described[name].type is not UserPath:  # names of files stay as the system gave them
            value = typed_text(value, sys.getfilesystemencoding())
        return {name: read_value(described[name], value)}
    except UnicodeDecodeError:
        raise ValueError(f"--{name}={value!a} is not UTF-8 text") from None
    except ValueError as error:
        raise ValueError(f"--{error}") from None


def _refuse(problem: object) -> NoReturn:
    """Ends the program, as for a wrong flag."""
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)


def _filled(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """The dataclass of these values, those nested in it included."""
    parts = {
        field.name: _filled(field.type, values)
        if isinstance(field.type, type) and is_dataclass(field.type)
        else values[field.name]
        for field in fields(config_class)  # type: ignore[arg-type]
    }
    return config_class(**parts)


def parse_with_paths(config_class: type[Config], args: Sequence[str], prog: str) -> tuple[Config, list[str]]:
    """`parse` for a command that takes paths where others take config files: the flags, and the paths."""
    parts = list(words(config_class, args))
    flags = [name if value is None else f"{name}={value}" for name, value in parts if name]
    return parse(config_class, flags, prog), [read_path(value or "") for name, value in parts if not name]


def words(config_class: type, args: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """(--name, value) of each flag, and ("", word) of each word that does not belong to a flag.

    `--name=value` and `--name value` are the same. A switch alone is True, another flag at the end is None.
    """
    described = {flag.name: flag for flag in describe(config_class)}
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        if not arg.startswith("-"):
            yield "", arg
            continue
        name, equals, value = arg.partition("=")
        flag = described.get(name.removeprefix("--").replace("-", "_"))
        name = f"--{flag.name}" if flag else name
        if equals:
            yield name, value
        elif flag and flag.is_switch and "".join(rest[:1]).lower() not in (*SWITCH, "auto"):
            yield name, "True"
        else:
            yield name, rest.pop(0) if rest else None


def typed_text(text: str, encoding: str) -> str:
    """What was typed, where Python has read it in the locale's `encoding` and kept other bytes as surrogates.

    It is UTF-8 whatever the locale is, or else text in the locale's encoding. Raises UnicodeDecodeError.
    """
    try:
        content = text.encode(encoding, "surrogateescape")
    except UnicodeEncodeError:
        return text  # not from the locale: Python itself has made it
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content.decode(encoding)


def ask(prompt: str) -> str:
    """A line that is typed, see `typed_text`. Raises ValueError, EOFError."""
    line = input(prompt)
    try:
        return typed_text(line, sys.stdin.encoding or "utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{line!a} is not UTF-8 text") from None


def read_value(flag: Flag, value: Any) -> Any:
    """What `value`, of the command line or of a config file, means for `flag`. Raises ValueError.

    A whole number may be written as a float (6e5), True and False in any case or as 1 and 0.
    """
    text = str(value)
    types = list(_alternatives(flag.type))
    # The word None is text, the None of a config file is not.
    is_text = str in types and value is not None
    if is_text and flag.type is UserPath:
        try:
            return read_path(text)
        except ValueError as error:
            raise ValueError(f"{flag.name}={error}") from None
    if is_text or text in types:
        return text
    if text == "None" and type(None) in types:
        return None
    if bool in types and text.lower() in SWITCH:
        return SWITCH[text.lower()]
    try:
        if int in types:
            return _whole_number(text)
        if float in types:
            return float(text)
    except ValueError:
        pass
    kinds = {int: "a whole number of at most 64 bits", float: "a number", bool: "True or False"}
    kinds |= {type(None): "None", str: "text"}
    expected = " or ".join(kinds.get(kind, str(kind)) for kind in types if kind is not Path)
    raise ValueError(f"{flag.name}={text} must be {expected}")


def check_bounds(values: Mapping[str, Any], bounds: Mapping[str, tuple[float, float]]) -> None:
    """Raises ValueError for a number outside its (least, most); NaN is always outside."""
    for name, (least, most) in bounds.items():
        value = values[name]
        if isinstance(value, int | float) and not least <= value <= most:
            bound = f"at most {most}" if value > most else f"at least {least}"
            raise ValueError(f"{name}={value} must be {bound}")


def choose(known: Mapping[str, Value], name: str, kind: str) -> Value:
    """`known[name]`. Raises ValueError with the nearest name; `kind` says what the names stand for."""
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(known)}"
    raise ValueError(f"there is no {kind} {name!r}; {hint}")


def _alternatives(kind: Any) -> Iterator[Any]:
    """The types and the literal values of a union, flat."""
    parts = get_args(kind)
    if not parts:
        yield kind
    for part in parts:
        yield from _alternatives(part)


def _whole_number(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        if not float(text).is_integer():
            raise
        number = int(float(text))
    if not -(2**63) <= number < 2**64:
        raise ValueError("more than 64 bits")
    return number


def read_path(text: str) -> str:
    """`text` with the user's home in place of a ~ at its front. Raises ValueError where no home is known."""
    path = os.path.expanduser(text)
    if path == "~" or path.startswith("~/"):
        raise ValueError(f"{text}: this user has no home folder; set HOME, or write the path without ~")
    try:
        os.fsencode(path)
    except UnicodeEncodeError:  # the locale lacks a character: the name of the file is in UTF-8
        path = os.fsdecode(path.encode())
    return path


def describe(config_class: type, group: str = "flags") -> list[Flag]:
    """The flags of a dataclass, those of the dataclasses nested in it included.

    What they are for is the comment behind each field; a comment on a line of its own is the heading of the
    fields below it.
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
        # In the next line, where the field was long.
        if name not in helps and (match := re.search("  # (.*)", line)):
            helps[name] = match[1]
    found = []
    for field in fields(config_class):
        group = headings[field.name] or group
        if is_dataclass(field.type) and isinstance(field.type, type):
            values = vars(field.default_factory())  # type: ignore[misc, operator]
            found += [flag._replace(default=values[flag.name]) for flag in describe(field.type, group)]
            continue
        found.append(Flag(field.name, group, helps.get(field.name, ""), field.default, field.type))
    return found


def help_text(config_class: type, prog: str, presets: Path | None = None, path_flag: str = "") -> str:
    """What --help prints, as wide as the terminal, from 60 to 120 columns."""
    width = min(max(shutil.get_terminal_size().columns, 60), 120)
    files = " [PRESET or FILE.py ...]" if presets else f" [{path_flag.upper()}]" if path_flag else ""
    lines = [f"usage: {prog}{files} [--flag=value ...]", ""]
    for paragraph in inspect.cleandoc(config_class.__doc__ or "").split("\n\n"):
        lines += [*textwrap.wrap(paragraph, width), ""]
    if presets:
        lines += ["presets"]
        for path in sorted(presets.glob("*.py")):
            first = (
                path.read_text("utf-8").partition("\n")[0].removeprefix("# ").partition(". ")[0].rstrip(".:")
            )
            lines += _row(path.stem, first, width)
        lines += [""]
    for group, flags in groupby(describe(config_class), lambda flag: flag.group):
        lines += [f"{group}, with defaults" if group == "flags" else group]
        for flag in flags:
            required = flag.default is MISSING
            shown = "..." if required else repr(flag.default) if flag.default in ("", "\n") else flag.default
            lines += _row(f"--{flag.name}={shown}", flag.help + required * " (required)", width)
        lines += [""]
    return "\n".join(lines[:-1])


def config_text(config_class: type, values: Mapping[str, Any]) -> str:
    """`values` as a config file, under the headings of --help. `parse` reads the same values from it."""
    lines = []
    for group, flags in groupby(describe(config_class), lambda flag: flag.group):
        kept = [(flag.name, values[flag.name]) for flag in flags if flag.name in values]
        lines += ["", f"# {group}", *(f"{name} = {_literal(value)}" for name, value in kept)]
    return "\n".join(lines[1:]) + "\n"


def _literal(value: Any) -> str:
    return f'float("{value}")' if isinstance(value, float) and not math.isfinite(value) else repr(value)


def _row(left: str, text: str, width: int, column: int = 34) -> list[str]:
    """Two columns; what is too long for the first has a line of its own."""
    right = textwrap.wrap(text, width - column, break_on_hyphens=False) or [""]
    fits = len(left) <= column - 4
    first = [f"  {left:<{column - 2}}{right[0]}".rstrip()] if fits else [f"  {left}", " " * column + right[0]]
    return first + [" " * column + line for line in right[1:]]


def run(main: Callable[[], None]) -> None:
    """Runs a command; what the user can mend is one sentence on stderr and exit code 1, not a traceback.

    A character that the console has no code for is printed as its number, such as \\u0416.
    """
    # A sample may have a character that the console cannot show: that must not end a training.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # for `ask`
    try:
        main()
    except BrokenPipeError:  # nobody reads on, as after `| head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - Python flushes it at its end
        sys.exit(141)
    except (ValueError, OSError) as error:
        if os.environ.get("TRITONGPT_TRACEBACK"):
            raise
        rank = os.environ.get("RANK", "0")
        sys.exit(f"error{'' if rank == '0' else f' (rank {rank})'}: {error}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in OWN_PACKAGES:
            raise
        sys.exit(f"error: the package {error.name} is not installed here; make install brings it")
    except KeyboardInterrupt:
        sys.exit(130)


def install(extra: str) -> str:
    """The command that installs the packages of one of setup.py's extras."""
    return command("pip", "install", "-e", f".[{extra}]")


class IfSlow(threading.Timer):
    """Prints a line on a terminal where the code inside takes longer than five seconds."""

    def __init__(self, text: str, enabled: bool = True):
        super().__init__(5, print, [text], {"file": sys.stderr, "flush": True})
        self.daemon, self.enabled = True, enabled

    def __enter__(self) -> None:
        if self.enabled and sys.stderr.isatty():
            self.start()

    def __exit__(self, *exception: object) -> None:
        self.cancel()


def command(module: str, *words: object) -> str:
    """A command of this project that can be pasted where this one was typed."""
    python = sys.executable
    if Path(shutil.which("python") or "").parent == Path(python).parent:  # torchrun's is python3
        python = "python"
    elif Path(python).is_relative_to(Path.cwd()):
        python = str(Path(python).relative_to(Path.cwd()))
    return shlex.join([python, "-m", module, *map(str, words)])


def _find(name: str, presets: Path | None) -> Path:
    path = Path(read_path(name))
    if path.is_file():
        return path
    if (path / "config.py").is_file():  # of a run
        return path / "config.py"
    known = {p.stem: p for p in sorted(presets.glob("*.py"))} if presets else {}
    if path.stem in known and path.parent == Path():
        return known[path.stem]
    close = difflib.get_close_matches(path.stem, known, n=1)
    if not known:
        raise ValueError(
            f"{name!r} is not a config file, and flags are written --name=value; --help lists them"
        )
    hint = f"did you mean {close[0]!r}?" if close else f"presets: {', '.join(known)}"
    raise ValueError(f"{name!r} is neither a config file nor a preset; {hint}")


def _settings_of_file(path: Path, described: Mapping[str, Flag], scope: dict[str, Any]) -> dict[str, Any]:
    """{name: value} of each flag that the file sets in `scope`, whatever sets it there.

    It can be an assignment, an import, exec or globals(). The file sees what was set before it, as nanoGPT's
    do. Names that are not flags are ignored, with a hint where one looks like a flag.
    """
    names = _Names(scope | {"__file__": str(path)}, str(path))
    try:
        # Python itself finds the encoding of bytes, but for UTF-16 and UTF-32.
        content = path.read_bytes()
        source = content if text_encoding(content) == "utf-8-sig" else read_text(path)
        code = compile(source, str(path), "exec")
        with _importing_from(path.resolve().parent), IfSlow(f"executing {path}; Ctrl-C stops it"):
            exec(code, names)
    except BaseException as error:  # whatever the file does
        where, line = _position(error, path)
        raise ValueError(f"{where}, line {line}: {type(error).__name__}: {error}".rstrip(": ")) from None
    # `global` in a function and globals().update are not seen by _Names.
    changed = (name for name in names if names[name] is not scope.get(name, MISSING))
    lines = dict.fromkeys(changed) | names.lines
    scope.update(names)
    settings = {}
    for name, number in lines.items():
        if name in described and name in names:
            try:
                settings[name] = read_value(described[name], names[name])
            except ValueError as error:
                raise ValueError(f"{path}{f', line {number}' if number else ''}: {error}") from None
        # Modules and functions that the file imports or defines are not settings.
        plain = isinstance(names.get(name), (bool, int, float, str)) and not name.startswith("_")
        close = difflib.get_close_matches(name, described, n=1, cutoff=0.8)
        if plain and close and name not in described:
            print(
                f"{path}: {name!r} is not a flag and is ignored; did you mean {close[0]!r}?", file=sys.stderr
            )
    return settings


class _Names(dict[str, Any]):
    """The names of the config file `path`, and the line of it that wrote each one last."""

    def __init__(self, names: dict[str, Any], path: str):
        super().__init__(names)
        self.path = path
        self.lines: dict[str, int | None] = {}

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        frame = inspect.currentframe()
        while frame and frame.f_code.co_filename != self.path:
            frame = frame.f_back
        self.lines[name] = frame and frame.f_lineno


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Modules in `folder` can be imported inside, and are forgotten after: others may have the same names.

    A file there with the name of one of our packages, such as train.py, is imported instead of the package.
    """
    hidden = {name: sys.modules[name] for top in OWN_PACKAGES for name in _hidden_by(folder, top)}
    for name in hidden:
        del sys.modules[name]
    search_path, modules = sys.path[:], set(sys.modules)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = search_path
        for name in set(sys.modules) - modules:
            top = name.partition(".")[0]
            file = getattr(sys.modules[name], "__file__", None) or ""
            if top not in modules and file.startswith(str(folder / top)):
                del sys.modules[name]
        sys.modules.update(hidden)


def _hidden_by(folder: Path, top: str) -> list[str]:
    """The loaded modules of the package `top`, where `folder` has another of its name."""
    others = [folder / f"{top}.py", folder / top / "__init__.py"]
    loaded = Path(getattr(sys.modules.get(top), "__file__", None) or "").resolve()
    if loaded in others or not any(other.is_file() for other in others):
        return []
    return [name for name in sys.modules if name.partition(".")[0] == top]


def _position(error: BaseException, path: Path) -> tuple[str, int]:
    """The innermost file and line of the config's folder that an error came from."""
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        places.append((error.filename or "", error.lineno))
    folder = path.resolve().parent
    own = [(name, line or 1) for name, line in places if name == str(path) or folder == Path(name).parent]
    return own[-1] if own else (str(path), 1)
