"""The parser of every command: `--out DIR` and `out=DIR` are the same, and errors suggest.

Settings of a run are written key=value, options of a command --name VALUE. Users mix them up. If a
command has the option, it takes both forms; if not, the error says what to write.
"""

import argparse
import difflib
from collections.abc import Sequence
from typing import Any

from pgolf.config import suggestion
from pgolf.errors import ConfigError

SETTINGS = "key=value"  # the metavar of arguments that are a run's settings


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes `name=VALUE` for its options and suggests what was meant."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As in argparse, with `out=X` read as `--out X`.

        Raises:
            ConfigError: an option is given in both forms.
        """
        return super().parse_known_args(args and self._with_dashes(args), namespace)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        parsed, rest = self.parse_known_args(args, namespace)
        self._refuse(args or (), rest)
        return parsed

    def parse_intermixed_args(
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        parsed, rest = self.parse_known_intermixed_args(args, namespace)
        self._refuse(args or (), rest)
        return parsed

    def _with_dashes(self, args: Sequence[str]) -> list[str]:
        """The arguments, those for an option of this parser as `--name=VALUE`."""
        arguments, given, value_of = [], set(), ""
        for argument in args:
            name, equals, value = argument.partition("=")
            action = self._option_string_actions.get(name)
            if action is None and equals and not value_of:
                action = self._option_string_actions.get("--" + name.replace("_", "-"))
                if action is not None and action.nargs is None:
                    if action.dest in given:
                        option = action.option_strings[-1]
                        raise ConfigError(f"{argument}: {option} is given already")
                    argument = f"{action.option_strings[-1]}={value}"
                else:
                    action = None
            given |= {action.dest} if action else set()
            # What follows `--prompt` is its value, whatever it looks like.
            waits = action is not None and action.nargs is None and "=" not in argument
            value_of = name if waits else ""
            arguments.append(argument)
        return arguments

    def _refuse(self, args: Sequence[str], rest: Sequence[str]) -> None:
        """Raise ConfigError for what no option or argument took; it suggests what was meant."""
        if not rest:
            return
        for action in self._actions:  # the command of `pgolf data prepare` has the options
            if isinstance(action, argparse._SubParsersAction):
                for name in set(args) & set(action.choices):
                    action.choices[name]._refuse(args, rest)
        argument = next((r for r in rest if r.startswith("-")), rest[0])
        name, _, value = argument.lstrip("-").partition("=")
        key = name.replace("-", "_")
        if argument.startswith("-") and any(a.metavar == SETTINGS for a in self._actions):
            if not value and argument in args:
                after = args[args.index(argument) + 1 :]
                value = after[0] if after and not after[0].startswith("-") else "VALUE"
            near = suggestion(key)
            hint = f"write {near}={value}" if near else "`pgolf recipes --keys` lists them"
            raise ConfigError(f"{argument}: settings have the form key=value: {hint}")
        options = [o for o in self._option_string_actions if o.startswith("--")]
        close = difflib.get_close_matches("--" + name.lower(), options, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]}?" if close else f"options are {', '.join(options)}"
        raise ConfigError(f"{argument}: {self.prog} does not take this: {hint}")
