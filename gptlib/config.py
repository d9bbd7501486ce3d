"""A setting is declared once (type, default, range, help) and serves flags, environment,
checkpoints and documents.

A configuration is a dataclass whose fields are made by `setting`. Everything else is read from
those fields: the command line (`add_flags`), the environment (`read_environment`), the checks
(`check_settings`) and the tables in the documents (`shown_default`).
"""

import argparse
import dataclasses

from gptlib.common import UserError

EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def setting(default, help, low=None, high=None, choices=None, above=None, optional=False,
            section=None):
    """A dataclass field with its help, range and choices.

    low, high: the smallest and the largest value allowed; above: a number that the value has to
    exceed. optional: None is allowed too. section: the title in --help above this field and those
    that follow it.
    """
    metadata = dict(help=help, low=low, high=high, choices=choices, above=above, optional=optional,
                    section=section)
    return dataclasses.field(default=default, metadata=metadata)


def describe_range(field):
    """The range of a number in words: "1 to 10", "at least 1", "above 0 and up to 1"."""
    low, high, above = (field.metadata[key] for key in ("low", "high", "above"))
    if above is not None:
        return f"above {above}" if high is None else f"above {above} and up to {high}"
    if high is None:
        return f"at least {low}"
    return f"{low} to {high}"


def in_range(field, value):
    """Whether a number is in the field's range; NaN is outside of every range with a limit."""
    low, high, above = (field.metadata[key] for key in ("low", "high", "above"))
    if low is not None and not value >= low:  # not 'value < low': NaN has to fail too
        return False
    if high is not None and not value <= high:
        return False
    return above is None or value > above


def check_settings(config, label=lambda name: f"--{name}"):
    """Raise UserError for the first field whose value has the wrong type, is out of range or no
    valid choice.

    label: turns a field's name into what the user typed, such as --port or PORT. A whole number
    becomes a float if the field is one.
    """
    for field in dataclasses.fields(config):
        name, value = label(field.name), getattr(config, field.name)
        if value is None and field.metadata["optional"]:
            continue
        if field.type is float and type(value) is int:
            value = float(value)
            object.__setattr__(config, field.name, value)  # works on a frozen dataclass too
        if type(value) is not field.type:
            raise UserError(f"{name} is {value!r}: expected {field.type.__name__}")
        choices = field.metadata["choices"]
        if choices and value not in choices:
            raise UserError(f"{name} is {value!r}: choose one of {', '.join(choices)}")
        if not in_range(field, value):
            raise UserError(f"{name} is {value}: expected {describe_range(field)}")


def parse_boolean(text):
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() in ("true", "1", "yes")


def add_flags(parser, config_class):
    """Add a flag for each field; a boolean takes --name, --no-name and --name=False. Flags not
    given stay unset.
    """
    group = parser
    for field in dataclasses.fields(config_class):
        if field.metadata["section"]:
            group = parser.add_argument_group(field.metadata["section"])
        default = "" if field.default in (None, "") else f" (default: {field.default})"
        help = (field.metadata["help"] + default).replace("%", "%%")
        options = dict(help=help, default=argparse.SUPPRESS)
        if field.type is bool:
            group.add_argument(f"--{field.name}", nargs="?", const=True, type=parse_boolean,
                               metavar="BOOL", **options)
            group.add_argument(f"--no-{field.name}", dest=field.name, action="store_false",
                               default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        else:
            group.add_argument(f"--{field.name}", type=field.type, **options)


def read_environment(config_class, env):
    """{field name: value} of the environment variables that are set, named as the fields in
    capitals.

    Raises UserError for a text that can't be converted.
    """
    values = {}
    for field in dataclasses.fields(config_class):
        text = env.get(field.name.upper())
        if not text:
            continue
        convert = parse_boolean if field.type is bool else field.type
        try:
            values[field.name] = convert(text)
        except (ValueError, argparse.ArgumentTypeError):
            expected = EXPECTED[field.type]
            raise UserError(f"{field.name.upper()} is {text!r}: expected {expected}") from None
    return values


def shown_default(field):
    """A field's default as the tables in the documents show it."""
    return "" if field.default in (None, "") else f"`{field.default}`"
