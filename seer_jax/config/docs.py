"""The docstrings below the fields of a dataclass, which Python itself throws away."""

import ast
import inspect
import textwrap
from itertools import pairwise


def read_field_docs(cls: type) -> dict[str, str]:
    """Read the docstring of every field from the source of a dataclass.

    Args:
        cls: The dataclass.

    Returns:
        Texts by field name, line breaks folded; a field without one is absent.
    """
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    return {
        statement.target.id: " ".join(following.value.value.split())
        for statement, following in pairwise(definition.body)
        if isinstance(statement, ast.AnnAssign)
        and isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
    }
