"""Docstrings as the reference shows them, and the interfaces.

``.. interface:: zreconnect.interfaces.INAME`` shows an interface of zope.interface.
``.. others:: MODULE`` shows the public names of a module that no page of the reference names.
A paragraph ``name: what it is`` of a docstring is about an argument.
"""

from __future__ import annotations

import inspect
import pkgutil
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective
from zope.interface.interface import InterfaceClass, Method

ARGUMENT = re.compile(r"(\*{0,2}[A-Za-z_]\w*(?:, [A-Za-z_]\w*)*): (.*)")
# What a page names, by its full name or below a ``currentmodule``.
NAMED = re.compile(r"^\.\. (?:auto\w+|interface|py:\w+):: ([\w.]+)$", re.MULTILINE)
# The directive for what is one of these, the first that fits.
KINDS: dict[type, str] = {InterfaceClass: "interface", type: "autoclass", object: "autofunction"}
# Where a name without a module is looked for.
MODULES = (
    "zreconnect",
    "zreconnect.interfaces",
    "zreconnect.testing",
    "zreconnect.events",
    "zreconnect.drivers.base",
)


def with_fields(lines: list[str], names: set[str]) -> list[str]:
    """A docstring's lines, with what is said about the arguments of these names as fields."""
    result: list[str] = []
    is_argument = False
    for line in split_at_names(lines, names):
        # One that begins within a sentence is a word of that.
        is_beginning = not result or result[-1][-1:] in ("", ".", ";")
        match = ARGUMENT.fullmatch(line) if is_beginning else None
        if match and set(re.findall(r"\w+", match[1])) <= names:
            if not is_argument and result and result[-1]:
                result.append("")
            is_argument = True
            # Sphinx takes the first of several words for a type.
            result.append(f":param {match[1].replace('*', '').replace(', ', ',')}: {match[2]}")
        elif is_argument and line and not line[0].isspace():
            result.append(f"    {line}")
        else:
            is_argument = is_argument and bool(line)
            result.append(line)
    return result


def split_at_names(lines: list[str], names: set[str]) -> list[str]:
    """The lines, each argument that begins within one at a line of its own."""
    if not names:
        return lines
    pattern = re.compile(rf"(?<=[.;]) (?=(?:{'|'.join(map(re.escape, sorted(names)))}): )")
    return [part for line in lines for part in pattern.split(line)]


def arguments_of(thing: Any) -> set[str]:
    if isinstance(thing, Method):
        info = thing.getSignatureInfo()
        return {*info["positional"], *filter(None, (info["varargs"], info["kwargs"]))}
    try:
        return set(inspect.signature(thing).parameters)
    except (TypeError, ValueError):
        return set()


def show_arguments(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    lines[:] = with_fields(lines, arguments_of(thing))


def skip_classes(
    app: Sphinx, what: str, name: str, thing: Any, skip: bool, options: Any
) -> bool | None:
    """What a class uses to make its parts is not for those who use it."""
    return True if what == "class" and isinstance(thing, type) else None


class InterfaceDirective(SphinxDirective):
    """One interface, with what it declares itself."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        module, _, name = self.arguments[0].rpartition(".")
        interface = getattr(import_module(module), name)
        assert isinstance(interface, InterfaceClass), self.arguments[0]
        self.env.note_dependency(str(inspect.getsourcefile(import_module(module))))
        heading = [f".. py:class:: {name}", f"   :module: {module}", ""]
        lines = [*heading, *indented(described(interface))]
        for base in reversed(interface.__bases__):
            if base.__name__ != "Interface":
                lines[3:3] = [f"   Extends `{base.__module__}.{base.__name__}`.", ""]
        for each in sorted(interface.names(), key=place_in(interface)):
            element = interface[each]
            signature = element.getSignatureString() if isinstance(element, Method) else ""
            kind = "method" if isinstance(element, Method) else "attribute"
            inner = [f".. py:{kind}:: {each}{signature}", "", *indented(described(element))]
            lines += indented(inner)
        source = f"{self.arguments[0]}:docstring"
        parent = nodes.Element()
        parent.document = self.state.document
        self.state.nested_parse(StringList(lines, source=source), 0, parent)
        return parent.children


class OthersDirective(SphinxDirective):
    """What is public in a module, and has no place in the reference yet."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        (module,) = self.arguments
        pages = (Path(self.env.srcdir) / "reference").glob("*.rst")
        named = set(NAMED.findall("".join(page.read_text(encoding="utf-8") for page in pages)))
        lines = []
        for name, thing in public_names(module):
            if not {name, name.rpartition(".")[2]} & named:
                kind = KINDS[next(kind for kind in KINDS if isinstance(thing, kind))]
                lines += [f".. {kind}:: {name}", ""]
        parent = nodes.Element()
        parent.document = self.state.document
        self.state.nested_parse(StringList(lines, source=module), 0, parent)
        return parent.children


def public_names(module: str) -> list[tuple[str, Any]]:
    """Those of a module, or the functions that switch an integration on, by their full names."""
    imported = import_module(module)
    if module == "zreconnect.integrations":
        found = []
        for info in pkgutil.iter_modules(imported.__path__, f"{module}."):
            part = import_module(info.name)
            for name in ("register", "unregister", "includeme"):
                if getattr(getattr(part, name, None), "__module__", None) == part.__name__:
                    found.append((f"{part.__name__}.{name}", getattr(part, name)))
        return found
    names = getattr(imported, "__all__", None) or [
        name
        for name, thing in vars(imported).items()
        if isinstance(thing, InterfaceClass) and thing.__module__ == module
    ]
    return [(f"{module}.{name}", getattr(imported, name)) for name in names]


def described(element: Any) -> list[str]:
    lines = inspect.cleandoc(element.__doc__ or "").splitlines()
    names = arguments_of(element) if isinstance(element, Method) else set()
    return [*with_fields(lines, names), ""]


def indented(lines: list[str]) -> list[str]:
    return [f"   {line}" if line else "" for line in lines]


def place_in(interface: Any) -> Any:
    text = inspect.getsource(import_module(interface.__module__))
    begin = text.index(f"\nclass {interface.__name__}(")

    def place(name: str) -> int:
        match = re.compile(rf"^    (?:def )?{name}\b", re.MULTILINE).search(text, begin)
        return match.start() if match else len(text)

    return place


def find_elsewhere(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, content: nodes.Element
) -> nodes.Element | None:
    """A name without its module means one of the public ones."""
    if node.get("refdomain") != "py":
        return None
    domain = env.get_domain("py")
    for module in MODULES:
        name = f"{module}.{node['reftarget']}"
        found = domain.resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, content)
        if found is not None:
            return found
    return None


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", show_arguments)
    app.connect("autodoc-skip-member", skip_classes)
    app.connect("missing-reference", find_elsewhere)
    app.add_directive("interface", InterfaceDirective)
    app.add_directive("others", OthersDirective)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
