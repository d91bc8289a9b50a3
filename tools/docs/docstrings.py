"""This project's docstrings as Markdown. They are plain prose with three habits of their own:

    name    what it means, in a column; further lines
            stand under the text                            a list of definitions
    code(x)                                                 lines that are Python: a block of code
    [B, T, H]                                               brackets are shapes, never links

And fields are told by comments behind them or strings under them; here all are listed in the class's docstring.
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
import tokenize
from collections.abc import Iterable

ENTRY = re.compile(r"(\S(?:\S| (?! ))*)  +(?=\S)")  # what stands in the left column, up to two spaces or more
NAMES = re.compile(r"[\w.*]+(?:, [\w.*]+)*")
CODE_SPAN = re.compile(r"(`+[^`]*`+)")
LITERAL = re.compile(r"[\\*_<\[\]]")  # what Markdown would take for its own


def markdown(docstring: str) -> str:
    """The docstring for a Markdown renderer; paragraphs stay as they are, but for the habits above."""
    return "\n\n".join(_paragraph(text) for text in re.split(r"\n\s*\n", docstring.strip("\n")) if text.strip())


def _paragraph(text: str) -> str:
    lines = text.splitlines()
    if lines[0].startswith(("    ", "|", "```")):  # a block of code as it is, a table
        return text
    if _is_code(text):
        return f"```python\n{text}\n```"
    return _definitions(lines) or _prose(text)


def _is_code(text: str) -> bool:
    try:
        body = ast.parse(text).body
    except SyntaxError:
        return False
    return any(isinstance(node, ast.Call | ast.Assign) for line in body for node in ast.walk(line))


def _definitions(lines: list[str]) -> str:
    """The paragraph as a definition list; empty where it is none."""
    column = next((entry.end() for entry in map(ENTRY.match, lines) if entry), 0)
    entries: list[tuple[str, list[str]]] = []
    for line in lines:
        name, text = line[:column], line[column:]
        if name.endswith(" ") and not name.startswith(" "):
            entries.append((name.strip(), [text]))
        elif name.isspace() and entries:
            entries[-1][1].append(text)
        else:
            return ""
    return definitions((name, " ".join(text)) for name, text in entries)


def definitions(entries: Iterable[tuple[str, str]]) -> str:
    """A definition list; names are code."""
    return "\n\n".join(f"{_term(name)}\n:   {_prose(' '.join(text.split()))}" for name, text in entries)


def comment(source: str) -> str:
    """What the comments of a field's lines say; its strings may hold what they like."""
    found = []
    with contextlib.suppress(tokenize.TokenError):  # of lines that end within brackets: all comments came before
        found = [t.string for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT]
    return " ".join(text.lstrip("# ") for text in found)


def _term(text: str) -> str:
    return ", ".join(f"`{name}`" for name in text.split(", ")) if NAMES.fullmatch(text) else _prose(text)


def _prose(text: str) -> str:
    """With all that is not in a code span as it is written."""
    parts = CODE_SPAN.split(text)
    return "".join(part if place % 2 else LITERAL.sub(_literal, part) for place, part in enumerate(parts))


def _literal(found: re.Match[str]) -> str:
    return "&lt;" if found[0] == "<" else f"\\{found[0]}"
