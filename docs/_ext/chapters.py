"""The chapters of the manual are pages: those of doctests/, which remain where they are.

Each gets a page in docs/manual, which includes it. That directory is made anew each time.
``.. chapters:: Section`` is a table of contents of what doctests/README.rst names in that section.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.directives.other import TocTree
from sphinx.transforms import SphinxTransform

DOCTESTS = Path(__file__).resolve().parents[2] / "doctests"
CONTENTS = DOCTESTS / "README.rst"
CHAPTER = re.compile(r"([a-z0-9-]+)\.rst")
EXAMPLE = re.compile(r"examples/([a-z_]+)")


def write_pages(app: Sphinx, config: Config) -> None:
    directory = Path(app.srcdir) / "manual"
    directory.mkdir(exist_ok=True)
    pages = {
        "index" if path == CONTENTS else path.stem: f".. include:: ../../doctests/{path.name}\n"
        for path in DOCTESTS.glob("*.rst")
    }
    for pictures in filter(Path.is_dir, DOCTESTS.iterdir()):
        # A picture is looked for beside the page.
        if not (directory / pictures.name).exists():
            (directory / pictures.name).symlink_to(pictures, target_is_directory=True)
    for page in directory.glob("*.rst"):
        if page.stem not in pages:
            page.unlink()
    for name, text in pages.items():
        page = directory / f"{name}.rst"
        # One that is as it was need not be read again.
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


def named_in(section: str) -> list[str]:
    """The chapters that a section of the contents names, in its order.

    Raises ValueError if there is none.
    """
    text = CONTENTS.read_text(encoding="utf-8")
    _, _, rest = text.partition(f"\n{section}\n{'=' * len(section)}\n")
    found = re.findall(r"<([a-z0-9-]+)\.rst>", re.split(r"\n[^\n]+\n====+\n", rest)[0])
    if not found:
        raise ValueError(f"{CONTENTS} has no section {section!r} that names chapters")
    return found


class Chapters(TocTree):
    """The contents of one section of the manual."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(str(CONTENTS))
        lines = [f"/manual/{name}" for name in named_in(self.arguments[0])]
        self.content = StringList(lines, source=str(CONTENTS))
        return super().run()


class ChapterReferences(SphinxTransform):
    """What refers to the file of a chapter refers to its page, and what names an example to where
    docs/examples.rst shows it. And sessions are no quotations."""

    default_priority = 50

    def apply(self, **options: Any) -> None:
        if not self.env.docname.startswith("manual/"):
            return
        for node in list(self.document.findall(nodes.reference)):
            match = CHAPTER.fullmatch(node.get("refuri", ""))
            if match:
                node.replace_self(self._reference("doc", f"/manual/{match[1]}", node.astext()))
        for node in list(self.document.findall(nodes.literal)):
            text = node.astext()
            if match := CHAPTER.fullmatch(text):
                node.replace_self(self._reference("doc", f"/manual/{match[1]}", ""))
            elif match := EXAMPLE.fullmatch(text):
                node.replace_self(self._reference("ref", f"example-{match[1]}", text))

        for quote in list(self.document.findall(nodes.block_quote)):
            # Sessions are indented in the chapters, for the eye, and are no quotations.
            if all(isinstance(child, nodes.doctest_block) for child in quote.children):
                quote.parent.replace(quote, quote.children)

    def _reference(self, kind: str, target: str, text: str) -> addnodes.pending_xref:
        return addnodes.pending_xref(
            "",
            nodes.inline(text, text or target, classes=["xref", "std", f"std-{kind}"]),
            refdoc=self.env.docname,
            refdomain="std",
            reftype=kind,
            reftarget=target,
            refexplicit=bool(text),
            refwarn=True,
        )


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("config-inited", write_pages)
    app.add_directive("chapters", Chapters)
    app.add_transform(ChapterReferences)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
