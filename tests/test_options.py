"""Options and settings in the wrong spelling: taken, or refused with what to write."""

import dataclasses

import pytest

from pgolf import cli
from pgolf.artifact.location import artifact_of
from pgolf.config import Config, find_key, with_overrides
from pgolf.errors import ArtifactError, ConfigError
from pgolf.options import SETTINGS, Parser
from pgolf.recipes import get


def parser() -> Parser:
    parser = Parser(prog="pgolf pack")
    parser.add_argument("run")
    parser.add_argument("--out")
    parser.add_argument("--val-tokens", type=int)
    parser.add_argument("--text", nargs="+")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar=SETTINGS)
    return parser


@pytest.mark.parametrize("arguments", [["--out", "x"], ["--out=x"], ["out=x"]])
def test_an_option_with_and_without_dashes(arguments: list[str]) -> None:
    args = parser().parse_intermixed_args(["r", "layers=2", *arguments, "val_tokens=3"])
    assert (args.out, args.val_tokens, args.overrides) == ("x", 3, ["layers=2"])


def test_values_that_look_like_options_stay_values() -> None:
    assert parser().parse_intermixed_args(["r", "--out", "out=x"]).out == "out=x"
    assert parser().parse_intermixed_args(["out/out=x"]).run == "out/out=x"
    assert parser().parse_intermixed_args(["r", "json=1"]).overrides == ["json=1"]
    with pytest.raises(ConfigError, match="--out is given already"):
        parser().parse_intermixed_args(["r", "--out", "x", "out=y"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "3"], "write seed=3"),
        (["layers=2", "--seed=3"], "write seed=3"),
        (["--max-tokens", "1e5", "layers=2"], "write max_tokens=1e5"),
        (["--out", "x"], "write out=x"),
        (["--quick"], "write quick=VALUE"),
        (["--zzzzqqqq"], "recipes --keys"),
        (["LAYERS=6"], "did you mean layers?"),
        (["DATA_PATH=x"], "did you mean data?"),
        (["LAYER=6"], "did you mean layers?"),
    ],
)
def test_train_says_how_settings_are_written(arguments: list[str], message: str, capsys) -> None:
    assert cli.main(["train", "demo", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "r", "strid=3"], "did you mean --stride?"),
        (["eval", "r", "layers=3"], "options are --"),
        (["sample", "r", "--prompts", "x"], "did you mean --prompt?"),
        (["verify", "r", "--jsn"], "did you mean --json?"),
        (["submit", "r", "--blurp", "x"], "did you mean --blurb?"),
        (["pack", "r", "out=x", "--attn-bits", "5"], "write attn_bits=5"),
        (["data", "prepare", "--text", "a", "--out", "b", "--feld", "x"], "did you mean --field?"),
        (["train", "DEMOO"], "did you mean demo?"),
    ],
)
def test_other_commands_name_their_options(arguments: list[str], message: str, capsys) -> None:
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value"),
    [("100k", 100_000), ("1e5", 100_000), ("2M", 2_000_000), ("1.5m", 1_500_000),
     ("1.001k", 1001), ("1G", 10**9), ("4.35M", 4_350_000)],
)  # fmt: skip
def test_whole_numbers_with_a_unit(text: str, value: int) -> None:
    config = with_overrides(Config(), {"max_tokens": text})
    assert config.schedule.max_tokens == value and type(config.schedule.max_tokens) is int


@pytest.mark.parametrize("text", ["k", "1.0001k", "1kk", "1e999k", "nank", "4 layers", "10x"])
def test_other_units_are_refused_with_examples(text: str) -> None:
    with pytest.raises(ConfigError, match="such as 4, 1e5, 100k or 2M"):
        with_overrides(Config(), {"max_tokens": text})


def test_every_key_in_capitals_is_suggested() -> None:
    keys = [f.name for s in dataclasses.fields(get("demo").config()) for f in _fields(s.name)]
    for key in keys:
        if len(key) > 3:
            with pytest.raises(ConfigError, match=f"did you mean {key}"):
                find_key(key.upper())


def _fields(section: str) -> tuple:
    value = getattr(get("demo").config(), section)
    return dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()


def test_a_run_folder_stands_for_its_artifact(tmp_path) -> None:
    file = tmp_path / "artifact"
    with pytest.raises(ArtifactError, match=r"no artifact and no config\.json"):
        artifact_of(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="resume=true"):
        artifact_of(tmp_path)
    with pytest.raises(ArtifactError, match="no such file"):
        artifact_of(file)
    file.write_bytes(b"x")
    assert artifact_of(tmp_path) == artifact_of(file) == file
