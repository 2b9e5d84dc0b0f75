"""A user's mistake is one line on stderr and exit code 2; a defect keeps its traceback."""

from __future__ import annotations

import pytest

from d2dense.errors import ToolParser, UserError, nearest, one_or_more, run_tool


def test_user_error_is_one_line_and_code_2(capsys):
    def main():
        raise UserError("first part;\n second part")

    assert run_tool(main) == 2
    assert capsys.readouterr().err == "error: first part; second part\n"


def test_a_refused_file_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for path, reason in (("file/below", "Not a directory"), (".", "Is a directory")):
        assert run_tool(lambda path=path: (tmp_path / path).write_text("")) == 2
        assert capsys.readouterr().err == f"error: {tmp_path / path}: {reason}\n"
    with pytest.raises(BrokenPipeError):
        run_tool(_break)


def _break():
    raise BrokenPipeError("no file's")


def test_result_passes_through_and_a_defect_is_not_hidden():
    assert run_tool(lambda: None) == 0
    assert run_tool(lambda: 1) == 1
    with pytest.raises(ZeroDivisionError):
        run_tool(lambda: 1 // 0)


def test_wrong_flag_is_a_user_error():
    with pytest.raises(UserError, match="--colour"):
        ToolParser().parse_args(["--colour"])


def overrides_parser() -> ToolParser:
    parser = ToolParser()
    parser.add_argument("--config-file")
    parser.add_argument("--many", nargs="+", default=[])
    parser.add_argument("--size", nargs=2, type=int)
    parser.add_argument("--on", action="store_true")
    parser.add_argument("overrides", nargs="*")
    return parser


@pytest.mark.parametrize(
    ("line", "many", "overrides"),
    [
        ("--many x model.a=1 B.C=2", "x", "model.a=1 B.C=2"),
        ("--many x B.C 2 OUTPUT_DIR out", "x", "B.C 2 OUTPUT_DIR out"),
        ("--many x B.C -2", "x", "B.C -2"),
        ("A.B 1 --many x c.d=2", "x", "A.B 1 c.d=2"),
        ("--man x c.d=2", "x", "c.d=2"),  # argparse takes a flag's beginning
        ("--many=x c.d=2", "x", "c.d=2"),
        ("--many a.b=1", "a.b=1", ""),  # the flag keeps the value that it needs
        ("--many CAR DOG", "CAR DOG", ""),  # names, as no dot says otherwise
        ("--many x name=y", "x name=y", ""),
        ("--many x a/b.c=1", "x a/b.c=1", ""),
        ("--many x A.B", "x A.B", ""),  # no value
        ("--many x model.a=1 --on", "x model.a=1", ""),  # not at the end
        ("--many x --on A.B 1", "x", "A.B 1"),
        ("--many x --size 3 4 A.B 1", "x", "A.B 1"),
    ],
)
def test_overrides_at_the_end_are_not_swallowed_by_a_list(line, many, overrides):
    args = overrides_parser().parse_intermixed_args(line.split())
    assert (args.many, args.overrides) == (many.split(), overrides.split())


def test_a_file_that_looks_like_an_override_stays_an_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shot.a=1.jpg").touch()
    args = overrides_parser().parse_intermixed_args(["--many", "x.jpg", "shot.a=1.jpg"])
    assert (args.many, args.overrides) == (["x.jpg", "shot.a=1.jpg"], [])


def test_a_parser_without_overrides_keeps_every_value():
    parser = ToolParser()
    parser.add_argument("--many", nargs="+")
    assert parser.parse_intermixed_args(["--many", "x", "a.b=1"]).many == ["x", "a.b=1"]


def test_nearest_names_close_words_only():
    assert nearest("lamda", ["lambda", "mu"]) == "; did you mean 'lambda'?"
    assert nearest("xyz", ["lambda", "mu"]) == ""


def test_any_message_is_a_short_line_that_can_be_printed():
    message = str(UserError("a" * 9000 + "\x1b[2J \ud800 \u2028 \0 é; set KEY"))
    message.encode()
    assert message.isprintable()
    assert len(message) < 1600
    assert message.endswith("é; set KEY")


@pytest.mark.parametrize("parse", ["parse_args", "parse_intermixed_args"])
def test_a_flag_without_its_value_is_no_empty_list(parse):
    parser = ToolParser()
    parser.add_argument("--file")
    with pytest.raises(UserError, match="--file"):
        getattr(parser, parse)(["--file=--"])


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "", "many", "nan"])
def test_a_count_is_a_whole_number_of_one_or_more(text):
    parser = ToolParser(prog="tool")
    parser.add_argument("--num", type=one_or_more)
    assert parser.parse_args(["--num", "12"]).num == 12
    with pytest.raises(UserError, match=f"argument --num: '{text}' is not a whole number"):
        parser.parse_args([f"--num={text}"])
