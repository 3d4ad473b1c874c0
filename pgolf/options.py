"""The parser of every command: `--out DIR` and `out=DIR` are the same, and errors suggest.

Settings of a run are written key=value, options of a command --name VALUE. Fingers mix them up.
Where a command has the option, both forms are taken; where not, the error says what to write.
"""

import argparse
import difflib
from collections.abc import Sequence
from typing import Any

from pgolf.config import suggestion
from pgolf.errors import ConfigError

SETTINGS = "key=value"  # the metavar of words that are a run's settings


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes `name=VALUE` for its options and says what was meant."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As in argparse, with `out=X` read as `--out X`.

        Raises:
            ConfigError: an option is given in both forms.
        """
        return super().parse_known_args(args and self._with_dashes(args), namespace)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        found, rest = self.parse_known_args(args, namespace)
        self._refuse(args or (), rest)
        return found

    def parse_intermixed_args(
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        found, rest = self.parse_known_intermixed_args(args, namespace)
        self._refuse(args or (), rest)
        return found

    def _with_dashes(self, args: Sequence[str]) -> list[str]:
        """The words, those for an option of this parser as `--name=VALUE`."""
        words, given, value_of = [], set(), ""
        for word in args:
            name, equals, value = word.partition("=")
            action = self._option_string_actions.get(name)
            if action is None and equals and not value_of:
                action = self._option_string_actions.get("--" + name.replace("_", "-"))
                if action is not None and action.nargs is None:
                    if action.dest in given:
                        raise ConfigError(f"{word}: {action.option_strings[-1]} is given already")
                    word = f"{action.option_strings[-1]}={value}"
                else:
                    action = None
            given |= {action.dest} if action else set()
            # What follows `--prompt` is its value, whatever it looks like.
            waits = action is not None and action.nargs is None and "=" not in word
            value_of = name if waits else ""
            words.append(word)
        return words

    def _refuse(self, args: Sequence[str], rest: Sequence[str]) -> None:
        """Raise ConfigError for what no option or argument took; it says what was meant."""
        if not rest:
            return
        for action in self._actions:  # the command of `pgolf data prepare` has the options
            if isinstance(action, argparse._SubParsersAction):
                for name in set(args) & set(action.choices):
                    action.choices[name]._refuse(args, rest)
        word = next((r for r in rest if r.startswith("-")), rest[0])
        name, _, value = word.lstrip("-").partition("=")
        key = name.replace("-", "_")
        if word.startswith("-") and any(a.metavar == SETTINGS for a in self._actions):
            if not value and word in args:
                after = args[args.index(word) + 1 :]
                value = after[0] if after and not after[0].startswith("-") else "VALUE"
            near = suggestion(key)
            hint = f"write {near}={value}" if near else "`pgolf recipes --keys` lists them"
            raise ConfigError(f"{word}: settings are words of the form key=value: {hint}")
        options = [o for o in self._option_string_actions if o.startswith("--")]
        close = difflib.get_close_matches("--" + name.lower(), options, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]}?" if close else f"options are {', '.join(options)}"
        raise ConfigError(f"{word}: {self.prog} does not take this: {hint}")
