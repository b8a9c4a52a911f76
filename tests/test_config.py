"""The command line derived from the stage dataclasses."""

from dataclasses import dataclass
from pathlib import Path

import pytest

import config
from options import REQUIRED, build_parser, option, parse


@dataclass
class Stage(config.Device):
    photos: Path = option(REQUIRED, "where photos are", group="input")
    network: str = option("r101", "depth; 100 % plain text", choices=["r18", "r50", "r101"], group="model")
    mean: tuple[float, float, float] = option((0.1, 0.2, 0.3), "per channel", group="model")
    val: list[Path] = option([], "sets", group="input")
    use_se: bool = option(True, "squeeze and excitation", group="model")
    limit: int | None = option(None, "at most", group="model")


def test_values_are_typed():
    stage = parse(
        Stage,
        argv="--photos a --no-use-se --mean 1 2 3 --val x y --limit 4 --network r18 --device cpu".split(),
    )
    assert stage == Stage(
        photos=Path("a"),
        network="r18",
        mean=(1.0, 2.0, 3.0),
        val=[Path("x"), Path("y")],
        use_se=False,
        limit=4,
        device="cpu",
    )


def test_defaults():
    stage = parse(Stage, argv=["--photos", "a"])
    assert stage == Stage(photos=Path("a"))
    assert stage.val == [] and stage.mean == (0.1, 0.2, 0.3) and stage.limit is None and stage.use_se is True


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--photos", "a", "--netwrok", "r18"], "--network"),
        (["--photos", "a", "--network=r52"], "did you mean r50?"),
        (["--photos", "a", "--limit", "many"], "invalid int value: 'many'"),
        (["--photos", "a", "--use-se", "False"], "unexpected argument False"),
        (["--photos", "a", "--mean", "1", "2"], "expected 3 arguments"),
        ([], "--photos"),
    ],
)
def test_errors_name_the_option_and_the_nearest(argv, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Stage, argv=argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert expected in error


def test_help_shows_groups_and_defaults():
    text = build_parser(Stage, "what it does").format_help()
    for expected in [
        "what it does",
        "input:",
        "model:",
        "machine:",
        "default: r101",
        "100 % plain text",
        "--no-use-se",
    ]:
        assert expected in text
    assert "required" in text and "default: 0.1 0.2 0.3" in text
