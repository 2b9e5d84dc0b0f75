"""Does a ``.pt2`` archive hold anything that runs by being opened?

Files of ``torch.export`` may hold pickles, libraries and names of Python functions, and opening one
evaluates its expressions and compiles its names. Those that this project writes hold raw tensors,
operators and arithmetic of sizes; :func:`refuse_code` lets nothing else pass.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any, NoReturn

from torch.export.pt2_archive import PT2ArchiveReader

from d2dense.errors import UserError

__all__ = ["refuse_code"]

_MODEL = "models/model.json"
_INPUTS = "data/sample_inputs/model.pt"  # a pickle; left empty
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_MEMBERS = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|"
    r"data/weights/weight_\d+|data/constants/tensor_\d+|"
    + "|".join(re.escape(name) for name in (_MODEL, _INPUTS, *_CONFIGS))
)
# Of names and of words such as a version: they become Python's names, or are looked up as they are.
_WORD = re.compile(r"(?!__)[\w+-]*(\.(?!__)[\w+-]*)*", re.ASCII)
# Loading, saving and printing are operators too.
_OPERATOR = re.compile(
    r"torch\.ops\.aten\.(?!from_file\b|save\b|_?print\b)\w+\.\w+|"
    r"torch\.ops\.torchvision\.(nms|roi_align)\.default|"
    r"torch\.ops\.higher_order\.(while_loop|wrap_with_autocast)|"
    r"torch\.sym_\w+|math\.\w+|_operator\.[a-z]\w*",
    re.ASCII,
)
_SPECS = {None, "builtins.tuple", "builtins.list", "builtins.dict"}
_EXPRESSION = (ast.Expression, ast.Call, ast.Name, ast.Load, ast.keyword, ast.UnaryOp, ast.USub)
_FUNCTION = re.compile(r"[A-Z][A-Za-z]*|true|false|oo|int_oo", re.ASCII)
_SYMBOL = re.compile(r"[a-z]+\d+", re.ASCII)


def refuse_code(path: Path) -> None:
    """Raise a ``UserError`` where an archive is not of the kind that ``save_exported_program``
    writes: plain tensors, a graph of operators and nothing that Python would run.

    What operators do is theirs: a graph may need any time and memory.
    """
    with PT2ArchiveReader(str(path)) as archive:
        for name in archive.get_file_names():
            if not _MEMBERS.fullmatch(name):
                _refuse(path, f"the member {name!r}")
        if archive.read_bytes(_INPUTS):
            _refuse(path, f"pickled example inputs ({_INPUTS})")
        try:
            for name in (_MODEL, *_CONFIGS):
                _check(json.loads(archive.read_string(name)))
        except (_Found, RecursionError) as found:
            _refuse(path, f"{found} ({name})")


class _Found(Exception):
    """What must not be there."""


def _refuse(path: Path, found: str) -> NoReturn:
    raise UserError(
        f"{path} has {found[:200]}, which no file written by export has and which may run code "
        "when it is opened; expected raw tensors and a graph of operators; export again"
    )


def _check(value: Any, key: str = "") -> None:
    """Look through parsed JSON; ``key`` says what a value is."""
    if key in _EMPTY and value:
        raise _Found(f"the entry {key!r}")
    if isinstance(value, dict):
        for name, each in value.items():
            _match(_WORD, name, "the name")
            _check(each, name)
    elif isinstance(value, list):
        for each in value:
            _check(each, key)
    elif isinstance(value, str):
        _CHECKS.get(key, _check_word)(value)


def _match(pattern: re.Pattern[str], text: str, noun: str) -> None:
    if not pattern.fullmatch(text):
        raise _Found(f"{noun} {text!r}")


def _check_word(text: str) -> None:
    _match(_WORD, text, "the name")


def _check_operator(text: str) -> None:
    _match(_OPERATOR, text, "the operator")


def _check_expression(text: str) -> None:
    """Sizes are written as calls of sympy's classes, and opening the file evaluates them."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, MemoryError):
        raise _Found(f"the expression {text!r}") from None
    for node in nodes:
        if isinstance(node, ast.Name):
            fine = _FUNCTION.fullmatch(node.id) is not None
        elif isinstance(node, ast.Constant):
            fine = not isinstance(node.value, str) or _SYMBOL.fullmatch(node.value) is not None
        else:
            fine = isinstance(node, _EXPRESSION)
        if not fine:
            raise _Found(f"the expression {text!r}")


def _check_spec(text: str) -> None:
    """How the inputs and outputs are packed: other types than these may be imported."""
    _, root = json.loads(text)
    specs = [root]
    for spec in specs:  # grows
        if spec["type"] not in _SPECS:
            raise _Found(f"the type {spec['type']!r}")
        specs.extend(spec["children_spec"])


# of any content: they reach operators as the text that they are
def _check_text(text: str) -> None:
    del text


_CHECKS = {
    "as_string": _check_text,
    "expr_str": _check_expression,
    "in_spec": _check_spec,
    "out_spec": _check_spec,
    "target": _check_operator,
}
_EMPTY = (
    "as_custom_obj",
    "as_operator",
    "custom_obj",
    "custom_obj_values",
    "guards_code",
    "metadata",
    "treespec_namedtuple_fields",
    "use_pickle",
)
