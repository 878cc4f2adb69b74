"""Flags of the command line, made of the fields of dataclasses; imports nothing heavy."""

import argparse
import dataclasses
import types
import typing
from typing import Any, NoReturn

import yaml

from hf_vicreg.training.arguments import SECTIONS, PretrainArguments, ViewsConfig
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.settings import hint, recipe_names


class FlagParser(argparse.ArgumentParser):
    """A parser that raises InputError, one line without the usage text, instead of leaving."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help.")


def add_fields(parser: argparse.ArgumentParser, kind: type, *, defaults: bool = True, prefix: str = "") -> None:
    """Add a flag for each field of a dataclass; its `group`, if it names one, is a heading of the help.

    Args:
        parser: In place.
        kind: The dataclass; fields are str, int, float, bool, a Literal, lists of them, or None.
        defaults: Whether flags that are not given have the field's default; else they are absent.
        prefix: What stands before a field's name, such as `views.`.
    """
    hints = typing.get_type_hints(kind)
    groups: dict[str, Any] = {}
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


def _truth(text: str) -> bool:
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


def pretrain_parser() -> argparse.ArgumentParser:
    """Return the parser of `hf-vicreg pretrain`, but for the dotted flags of sections."""
    parser = FlagParser(
        prog="hf-vicreg pretrain",
        usage="%(prog)s [DATA] [--config RECIPE] [--FLAG VALUE ...] [--SECTION.KEY VALUE ...]",
        description="Pretrain an encoder by VICReg on your own images; no labels are needed.",
        epilog="Encoders are set by --model.KEY and --second_model.KEY (fields of BigBirdViTConfig, or of the "
        "configuration of --model.model_type), expander and loss by --vicreg.KEY (fields of VicRegConfig).",
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
    add_fields(parser, PretrainArguments, defaults=False)  # only what was typed counts: defaults come after the recipe
    add_fields(parser, ViewsConfig, defaults=False, prefix="views.")  # for the help: `parse_flags` reads them itself
    return parser


def parse_flags(arguments: list[str]) -> dict[str, Any]:
    """Return the explicit flags of a command line as a nested dictionary, `config` and `data` among them if given.

    Raises:
        InputError: An unknown flag, or a dotted flag without a value.
    """
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
    known, unknown = pretrain_parser().parse_known_args(plain)
    for one in unknown:
        flag = one.partition("=")[0]
        if not flag.startswith("-"):
            raise InputError(f"`{flag}`: expected a flag, got a second word beside DATA; see --help.")
        names = [f"--{one.name}" for one in dataclasses.fields(PretrainArguments)]
        raise InputError(f"`{flag}`: unknown flag{hint(flag, names)}; see --help.")
    return vars(known) | sections
