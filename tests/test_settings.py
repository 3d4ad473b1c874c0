"""Which layers a setting names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgolf.errors import ConfigError
from pgolf.settings import resolve_layers


@pytest.mark.parametrize(
    ("text", "layers", "expected"),
    [
        ("all", 3, (0, 1, 2)),
        ("none", 3, ()),
        ("", 3, ()),
        ("last:4", 11, (7, 8, 9, 10)),
        ("last:3", 3, (0, 1, 2)),
        ("7-10", 11, (7, 8, 9, 10)),
        ("9,10", 11, (9, 10)),
        ("0,3,7-10", 11, (0, 3, 7, 8, 9, 10)),
        ("3,0,3", 4, (0, 3)),
        ("0", 1, (0,)),
    ],
)
def test_layers(text: str, layers: int, expected: tuple[int, ...]) -> None:
    assert resolve_layers("xsa_layers", text, layers) == expected


@pytest.mark.parametrize(
    "text",
    [
        "last:0",
        "last:12",
        "last:-1",
        "last:x",
        "11",
        "-1",
        "3-1",
        "0-11",
        "a",
        "1,,2",
        ",",
        "1-2-3",
        "0,99",
        "3-1,5",
        "0-99999999999",
        "0,99999999999",
        "all,1",
        "1.5",
    ],
)
def test_layers_that_make_no_sense(text: str) -> None:
    with pytest.raises(ConfigError, match="xsa_layers="):
        resolve_layers("xsa_layers", text, 11)


@given(st.text("alnost:,-0123456789", max_size=7), st.integers(1, 12))
def test_layers_are_within_the_model_or_refused(text: str, layers: int) -> None:
    try:
        chosen = resolve_layers("xsa_layers", text, layers)
    except ConfigError:
        return
    assert list(chosen) == sorted(set(chosen)) and set(chosen) <= set(range(layers))
