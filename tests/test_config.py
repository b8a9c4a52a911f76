"""The command line derived from the stage dataclasses."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

import config
import utils
from options import REQUIRED, build_parser, option, parse
from training import checkpoints
from utils import InputError


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


def test_help_opens_with_the_data_not_with_the_machine():
    groups = [group.title for group in build_parser(config.Train)._action_groups if group._group_actions]
    assert groups[1] == "data" and groups[-1] == "machine"


@dataclass
class Bounded:
    rate: float = option(0.5, "a rate", group="numbers", above=0, below=1)
    counts: list[int] = option([3], "some numbers", group="numbers", at_least=1, at_most=9)
    places: list[Path] = option(REQUIRED, "where", group="numbers", positional=True)
    parts: int | None = option(None, "parts", group="numbers", at_least=0)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--rate 0", "--rate 0.0: must be above 0 and below 1"),
        ("--rate 1", "--rate 1.0: must be above 0 and below 1"),
        ("--rate nan", "--rate nan: must be above 0"),
        ("--counts 1 0", "--counts 0: must be at least 1 and at most 9"),
        ("--counts 9 10", "--counts 10: must be"),
        ("--parts -1", "--parts -1: must be at least 0"),
    ],
)
def test_numbers_out_of_their_range_are_refused(words, expected):
    with pytest.raises(InputError, match=re.escape(expected)):
        parse(Bounded, argv=["here", *words.split()])
    assert parse(Bounded, argv="here --rate 0.1 --counts 1 9 --parts 0".split()).counts == [1, 9]


def test_devices_and_pipes_are_refused_at_once(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe", tmp_path / "zero"):
        for words in (["--photos", path], ["--photos", "a", "--val", "b", path]):
            with pytest.raises(InputError, match=f"{path}: a device or a pipe"):
                parse(Stage, argv=list(map(str, words)))
        with pytest.raises(SystemExit):
            parse(Stage, argv=["--photos", "a", "--config", str(path)])
        assert f"--config {path}: a device or a pipe, not a file" in capsys.readouterr().err


@dataclass
class Writing:
    people: list[Path] = option([], "folders of people", searched=True)
    names: Path | None = option(None, "a list")
    out: Path = option(REQUIRED, "a folder or a file")


def test_nothing_is_written_over_or_among_the_data(tmp_path):
    (tmp_path / "people").mkdir()
    (tmp_path / "names.txt").write_text("a")

    def made(people, out):
        return parse(Writing, argv=["--people", str(people), "--names", str(tmp_path / "names.txt"), "--out", str(out)])

    for out in (tmp_path / "people", tmp_path / "people" / "a" / "b"):
        with pytest.raises(InputError, match=r"lies in --people .*, where it would be taken for data"):
            made(tmp_path / "people", out)
    with pytest.raises(InputError, match="is --names, too, and would be overwritten"):
        made(tmp_path / "people", tmp_path / "names.txt")
    made(tmp_path / "people", tmp_path / "people-2")
    (tmp_path / "people" / "train.rec").touch()  # which is all that is read then
    made(tmp_path / "people", tmp_path / "people" / "a")


def test_a_configuration_gives_what_the_command_line_does_not(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('photos = "a"\nuse-se = false\nmean = [1, 2, 3]\nlimit = 7\nnetwork = "r18"\nval = ["x"]\n')
    expected = Stage(photos=Path("a"), use_se=False, mean=(1.0, 2.0, 3.0), limit=7, network="r18", val=[Path("x")])
    assert parse(Stage, argv=["--config", str(file)]) == expected
    changed = parse(Stage, argv=["--limit", "8", f"--config={file}", "--use-se", "--val", "y", "z"])
    assert (changed.limit, changed.use_se, changed.val, changed.network) == (8, True, [Path("y"), Path("z")], "r18")
    bounded = tmp_path / "bounded.toml"
    bounded.write_text('places = ["one", "two"]\ncounts = [2, 4]\n')
    assert parse(Bounded, argv=["--config", str(bounded)]).places == [Path("one"), Path("two")]
    assert parse(Bounded, argv=["--config", str(bounded), "three"]).places == [Path("three")]


def test_the_record_of_a_run_is_a_configuration(tmp_path):
    chosen = parse(config.Train, argv="--data d --out o --lr 0.3 --milestones 1 2 --margin 0.5 --save-every 2h".split())
    utils.write_json(tmp_path / "run.json", {"options": checkpoints.plain_options(chosen), "data": {}})
    assert parse(config.Train, argv=["--config", str(tmp_path / "run.json")]) == chosen


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("netwrok = 'r18'", "netwrok: no such option; did you mean network?"),
        ("network = 'r19'", "network: 'r19' is not one of r18, r50, r101"),
        ("limit = 'many'", "limit: 'many' is no value"),
        ("limit = [1, 2]", "limit: 2 values instead of 1"),
        ("limit = true", "limit: True is no value"),
        ("mean = [1, 2]", "mean: 2 values instead of 3"),
        ("use-se = 'no'", "use_se: 'no' is neither true nor false"),
        ("a = ", "neither TOML nor"),
        (None, "No such file"),
    ],
)
def test_errors_of_a_configuration_name_the_file(text, expected, tmp_path, capsys):
    file = tmp_path / "c.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SystemExit):
        parse(Stage, argv=["--photos", "a", "--config", str(file)])
    error = capsys.readouterr().err
    assert error.startswith(f"error: --config {file}: ") and expected in error
