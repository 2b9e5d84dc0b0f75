"""A user's mistake is one line on stderr and exit code 2; a defect keeps its traceback."""

from __future__ import annotations

import pytest

from d2dense.errors import ToolParser, UserError, nearest, run_tool


def test_user_error_is_one_line_and_code_2(capsys):
    def main():
        raise UserError("first part;\n second part")

    assert run_tool(main) == 2
    assert capsys.readouterr().err == "error: first part; second part\n"


def test_result_passes_through_and_a_defect_is_not_hidden():
    assert run_tool(lambda: None) == 0
    assert run_tool(lambda: 1) == 1
    with pytest.raises(ZeroDivisionError):
        run_tool(lambda: 1 // 0)


def test_wrong_flag_is_a_user_error():
    with pytest.raises(UserError, match="--colour"):
        ToolParser().parse_args(["--colour"])


def test_nearest_names_close_words_only():
    assert nearest("lamda", ["lambda", "mu"]) == "; did you mean 'lambda'?"
    assert nearest("xyz", ["lambda", "mu"]) == ""
