"""Flags of the command line, made of the fields of dataclasses; imports nothing heavy."""

import argparse
import dataclasses
import re
import shutil
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import yaml

from hf_vicreg.training.errors import InputError, hint
from hf_vicreg.training.objectives.combined import WEIGHT, WEIGHTS
from hf_vicreg.training.objectives.registry import ENTRIES, OBJECTIVE_SECTIONS
from hf_vicreg.training.run.arguments import SECTIONS, TIME, PretrainArguments, ViewsConfig
from hf_vicreg.training.run.section_flags import MODEL, VICREG, VIEWS, SectionFlag
from hf_vicreg.training.run.settings import recipe_names

# argparse's own words, and what is said in their place
PHRASES = {
    r"invalid int value: (.*)": r"expected a whole number, got \1",
    r"invalid float value: (.*)": r"expected a number, got \1",
    r"invalid choice: (.*) \(choose from (.*)\)": r"expected one of \2, got \1",
    r"expected (?:at least )?one argument": r"expected a value, got none",
    r"ignored explicit argument (.*)": r"expected no value, got \1",
}


class LineParser(argparse.ArgumentParser):
    """A parser whose errors are an InputError of one line, without the usage text, where argparse would leave.

    Its verbs are parsers of the same kind. A misspelt verb or flag is told with the one that was meant.
    """

    def error(self, message: str) -> NoReturn:
        missing = message.removeprefix("the following arguments are required: ")
        if missing != message:
            what = f"one of {', '.join(self._verbs())}" if self._verbs() else "a value"
            message = f"`{missing.replace(', ', '`, `')}`: expected {what}, got none"
        elif message.startswith("argument "):
            field, _, found = message.removeprefix("argument ").partition(": ")
            for pattern, said in PHRASES.items():
                found = re.sub(f"^{pattern}$", said, found, flags=re.DOTALL)
            message = f"`{field}`: {found}"
        raise InputError(f"{message}{'' if message.endswith(('.', '?')) else '.'} See `{self.prog} --help`.")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        known, rest = super().parse_known_args(args, namespace)
        if rest and not self._verbs():
            self._refuse(rest[0])
        return known, rest

    def _refuse(self, word: str) -> NoReturn:
        """Raise InputError for a word that no flag or positional argument takes."""
        word = word.partition("=")[0]
        if not word.startswith("-"):
            self.error(f"argument {word}: expected a flag, got a word too many")
        flags = [one for one in self._option_string_actions if one.startswith("--")]
        _, dot, key = word.partition(".")
        if dot:  # any key may be of a section; its name is not
            flags = [f"{one.partition('.')[0]}.{key}" for one in flags if "." in one]
        self.error(f"argument {word}: unknown flag{hint(word, flags)}")

    def _verbs(self) -> dict[str, argparse.ArgumentParser]:
        return next((one.choices for one in self._actions if isinstance(one, argparse._SubParsersAction)), {})

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            known = list(action.choices)
            meant = hint(value, known)
            remedy = f"; one of {', '.join(known)}." if meant == "." else meant
            raise InputError(f"`{action.metavar}`: expected a word that `{self.prog}` knows, got {value!r}{remedy}")
        super()._check_value(action, value)


class HelpText(argparse.HelpFormatter):
    """Help in two columns, the first of them a third of the screen."""

    def __init__(self, prog: str):
        columns = shutil.get_terminal_size().columns
        super().__init__(prog, max_help_position=min(42, max(16, columns // 3)))


Groups = dict[str, "argparse._ArgumentGroup"]
GROUPS = ("data", "model", "loss", "views", "optimisation", "run", "evaluation", "Hub")  # in the order of the help


def add_fields(
    parser: argparse.ArgumentParser,
    kind: type,
    *,
    defaults: bool = True,
    prefix: str = "",
    groups: Groups | None = None,
) -> None:
    """Add a flag for each field of a dataclass; its `group`, if it names one, is a heading of the help.

    Args:
        parser: In place.
        kind: The dataclass; fields are str, int, float, bool, a Literal, lists of them, or None.
        defaults: Whether flags that are not given have the field's default; else they are absent.
        prefix: What stands before a field's name, such as `views.`.
        groups: The headings that are there, by their text; new ones are added.
    """
    hints = typing.get_type_hints(kind)
    groups = {} if groups is None else groups
    for field in dataclasses.fields(kind):
        group = field.metadata.get("group")
        if group is not None and group not in groups:
            groups[group] = parser.add_argument_group(group)
        where = parser if group is None else groups[group]
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        options: dict[str, Any] = {"default": default if defaults else argparse.SUPPRESS}
        options["help"] = field.metadata.get("help")
        accepted = hints[field.name]
        if isinstance(accepted, types.UnionType):
            accepted = next(one for one in typing.get_args(accepted) if one is not type(None))
        if typing.get_origin(accepted) is list:
            options |= {"nargs": "+", "type": typing.get_args(accepted)[0]}
        elif typing.get_origin(accepted) is typing.Literal:
            options |= {"choices": typing.get_args(accepted)}
        elif accepted is bool:
            options |= {"nargs": "?", "const": True, "type": _truth, "metavar": "true|false"}
        else:
            options |= {"type": accepted}
        if "choices" not in options:
            options.setdefault("metavar", getattr(options["type"], "__name__", "value").upper())
        where.add_argument(f"--{prefix}{field.name}", **options)


def _add_section(group: Any, section: str, fields: Mapping[str, SectionFlag]) -> None:
    """Add the dotted flags of a configuration for the help alone: `parse_flags` reads them itself."""
    for name, (default, value, text) in fields.items():
        shown = text if default is None else f"{text} (default: {_as_typed(default)})"
        group.add_argument(f"--{section}.{name}", metavar=value, default=argparse.SUPPRESS, help=shown)


def _as_typed(default: Any) -> str:
    """Return a default as it is typed on a command line."""
    if isinstance(default, bool):
        return str(default).lower()
    return f"[{','.join(map(str, default))}]" if isinstance(default, list) else str(default)


def _truth(text: str) -> bool:
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


def pretrain_parser() -> argparse.ArgumentParser:
    """Return the parser of `hf-vicreg pretrain`, but for the dotted flags of sections."""
    parser = LineParser(
        prog="hf-vicreg pretrain",
        usage="%(prog)s [DATA] [--FLAG VALUE ...]",
        description="Pretrain an encoder by VICReg, or another --objective, on your own images; no labels are needed. "
        "What is not given is planned for these images, this machine and --time_budget; --plan_only shows the plan. "
        "Defaults are those of what neither a recipe nor the plan decides.",
        epilog="With another --model.model_type, --model.KEY are the fields of its configuration. --second_model.KEY "
        "makes a second encoder, for the second view. Values of dotted flags are YAML: "
        '--vicreg.expander_sizes "[512, 512]".',
        formatter_class=HelpText,
        allow_abbrev=False,
    )
    parser.add_argument(
        "data",
        metavar="DATA",
        nargs="?",
        default=argparse.SUPPRESS,
        help="Folder of images, `datasets` folder, Hub id OWNER/NAME, or `digits` (built in).",
    )
    parser.add_argument(
        "--config",
        metavar="RECIPE",
        default=argparse.SUPPRESS,
        help=f"Recipe below the flags: a YAML file or one of {', '.join(recipe_names())}.",
    )
    parser.add_argument(
        "--num_processes",
        metavar="INT",
        type=int,
        default=argparse.SUPPRESS,
        help="Processes on this machine that share each batch, such as one a GPU; default: 1.",
    )
    groups: Groups = {title: parser.add_argument_group(title) for title in GROUPS}
    # only what was typed counts: defaults come after the recipe
    add_fields(parser, PretrainArguments, defaults=False, groups=groups)
    add_fields(parser, ViewsConfig, defaults=False, prefix="views.", groups=groups)
    _add_section(groups["views"], "views", VIEWS)
    _add_section(groups["model"], "model", MODEL)
    _add_section(groups["loss"], "vicreg", VICREG)
    _add_section(groups["loss"], WEIGHTS, {"NAME": WEIGHT})
    for name in OBJECTIVE_SECTIONS:
        _add_section(groups["loss"], name, ENTRIES[name].settings)
    return parser


def parse_flags(arguments: list[str]) -> dict[str, Any]:
    """Return the explicit flags of a command line as a nested dictionary.

    `config`, `data` and `num_processes` are among them if given.

    Raises:
        InputError: An unknown flag, a dotted flag without a value, or a time in two words.
    """
    for flag, number, unit in zip(arguments, arguments[1:], arguments[2:], strict=False):
        if flag == "--time_budget" and number.isdecimal() and TIME.fullmatch(f"{number}{unit.lower()}"):
            raise InputError(f"`time_budget`: expected one word, {number}{unit[0].lower()}, got {number} {unit}.")
    plain: list[str] = []
    sections: dict[str, dict[str, Any]] = {}
    rest = list(arguments)
    while rest:
        flag, separator, value = rest.pop(0).partition("=")
        section, dot, key = flag.removeprefix("--").partition(".")
        if not (flag.startswith("--") and dot and section in SECTIONS):
            plain.append(flag + separator + value)
            continue
        if not separator:
            if not rest:
                raise InputError(f"`{flag}`: expected a value, got none.")
            value = rest.pop(0)
        try:
            sections.setdefault(section, {})[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:
            raise InputError(f"`{flag}`: expected a YAML value, got {value!r}.") from error
    return vars(pretrain_parser().parse_args(plain)) | sections
