"""The site: the pages of this folder, and a reference made from docstrings and the commands' help.

``sphinx-build -W -n docs site`` builds it in ``site/``. Nothing is executed; with
``NOTEBOOKS=force`` in the environment the notebooks are, and are shown with their outputs.
"""

import os
import sys
from importlib import metadata
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

project = "transformer_lens_bd3lm"
author = "The transformer_lens_bd3lm authors"
project_copyright = author
release = metadata.version("transformer-lens-bd3lm")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "myst_nb",  # Markdown and notebooks
    "sphinx_copybutton",
    "_site.links",
    "_site.names",
    "_site.commands",
    "_site.llms",
]
exclude_patterns = ["_site", "_build", "**/.ipynb_checkpoints"]
nitpicky = True
# Types that are imported for type checkers alone.
nitpick_ignore = [("py:class", name) for name in ("Figure", "RenderableType", "Dataset")]
suppress_warnings = ["mystnb.unknown_mime_type"]

# Markdown
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "dollarmath", "attrs_inline"]
myst_links_external_new_tab = False
nb_execution_mode = os.environ.get("NOTEBOOKS", "off")
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_execution_show_tb = True

# The reference
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autoclass_content = "class"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
add_module_names = False
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

# The look
html_theme = "furo"
html_title = "transformer_lens_bd3lm"
html_baseurl = os.environ.get("READTHEDOCS_CANONICAL_URL", "")
html_static_path = ["_site/static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_use_index = html_domain_indices = False  # the list of names is an index
html_copy_source = html_show_sourcelink = False  # llms.py copies the Markdown
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}
pygments_style = "friendly"
pygments_dark_style = "github-dark"
