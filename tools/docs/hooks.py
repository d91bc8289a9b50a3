"""What MkDocs is given beside mkdocs.yml: the notebooks in its menu, formulas as MathML, docstrings as Markdown."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

from tools.docs.docstrings import comment, definitions, markdown


def on_config(config: Any) -> None:
    """The notebooks that were executed stand before the design pages."""
    found = sorted(Path(config.docs_dir, "notebooks").glob("*.md"))
    if found:
        names = [next(iter(part)) for part in config.nav]
        config.nav.insert(names.index("Design"), {"Notebooks": [f"notebooks/{page.name}" for page in found]})


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Formulas as MathML, which browsers show without a script."""

    def shown(formula: re.Match[str]) -> str:
        made = convert(unescape(formula[2]), display="block" if formula[1] == "[" else "inline")
        if re.search(r"<mi>(\\|&<)", made):
            raise PluginError(f"{page.file.src_uri}: this formula holds what latex2mathml does not know: {formula[2]}")
        return made

    return re.sub(r'(?s)<(?:span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</(?:span|div)>', shown, html)


class Docstrings(griffe.Extension):
    """Every docstring of a package, rewritten once it is read. Classes that are records get a list of their fields."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        self._rewrite(pkg)

    def _rewrite(self, found: griffe.Object) -> None:
        if found.docstring is not None:
            found.docstring.value = markdown(found.docstring.value)
        if found.is_class and (_is_tuple(found) or any("dataclass" in str(d.value) for d in found.decorators)):
            _tell_fields(found)
        for member in found.members.values():
            if not member.is_alias:
                self._rewrite(member)


def _is_tuple(found: griffe.Class) -> bool:
    return any(str(base) == "NamedTuple" for base in found.bases)


def _tell_fields(record: griffe.Class) -> None:
    fields = [member for member in record.members.values() if member.is_attribute and "property" not in member.labels]
    told = []
    for field in fields:
        lines = "\n".join(record.lines_collection[record.filepath][field.lineno - 1 : field.endlineno])
        text = field.docstring.value if field.docstring is not None else comment(lines)
        told += [(field.name, text)] if text else []
        field.docstring = None
    if told:
        before = "" if record.docstring is None else record.docstring.value
        record.docstring = griffe.Docstring(f"{before}\n\n{definitions(told)}", parent=record)
    if _is_tuple(record):
        given = [("self", None, None), *((field.name, field.annotation, field.value) for field in fields)]
        kind = griffe.ParameterKind.positional_or_keyword
        parameters = [griffe.Parameter(name, annotation=a, default=d, kind=kind) for name, a, d in given]
        init = griffe.Function(
            "__init__", parameters=griffe.Parameters(*parameters), parent=record, lineno=0, endlineno=0
        )
        record.set_member("__init__", init)
