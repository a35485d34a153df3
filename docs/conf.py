"""The documentation: ``make docs``. Its manual is the chapters in doctests/, as they are."""

import sys
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "_ext"))

project = "zreconnect"
author = copyright = "zreconnect contributors"
release = version = metadata.version("zreconnect")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx_copybutton",
    "chapters",
    "interfaces",
    "links",
    "tables",
]
exclude_patterns = ["_build", "_ext", "_static"]
# A name in single backticks is that of something in the reference, if it is there.
default_role = "py:obj"
# Chapters have sessions, statements, shell commands and settings.
highlight_language = "default"

add_module_names = False
toc_object_entries_show_parents = "hide"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
# A default is shown as the source has it.
autodoc_preserve_defaults = True

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"zreconnect {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5e55", "color-brand-content": "#0b5e55"},
    "dark_css_variables": {"color-brand-primary": "#5fc9b8", "color-brand-content": "#5fc9b8"},
}
