"""What the documentation's site has beyond MkDocs' settings, called by MkDocs itself.

Pages of the project's root, colours of code, what a block needs in words, and a check that no page
asks anything of the network.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from pygments.formatters import HtmlFormatter

# File of the project's root to its page on the site.
ROOT_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
# Colours by the page's own attribute, which its switch changes.
STYLES = {"light": "default", "dark": "github-dark"}
# Whatever a browser fetches by itself.
_FETCHED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//[^>]*>"
    r"|<link\b(?=[^>]*\brel=[\"']?(?:stylesheet|preload|icon|shortcut icon))"
    r"[^>]*\bhref=[\"']?(?:https?:)?//[^>]*>"
)


def on_files(files: Any, *, config: Any) -> Any:
    """Adds the pages of the project's root, and the style sheet of code."""
    root = Path(config.config_file_path).parent
    for name, page in ROOT_PAGES.items():
        text = (root / name).read_text(encoding="utf-8")
        # As seen from within docs/.
        text = text.replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, "assets/code.css", content=_code_styles()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Leads links to the root's pages there, and says what a block needs."""
    for name, page in ROOT_PAGES.items():
        markdown = markdown.replace(f"](../{name}", f"]({page}")
    return re.sub(r"^<!-- needs: (.+) -->$", r"*Needs \1:*\n", markdown, flags=re.MULTILINE)


def on_post_page(output: str, *, page: Any, config: Any) -> str:
    """Refuses a page that would ask for something outside.

    Raises:
        PluginError: it would.
    """
    found = _FETCHED.search(output)
    if found:
        raise PluginError(f"{page.file.src_path} fetches from elsewhere: {found.group()}")
    return output


def _code_styles() -> str:
    sheets = [
        HtmlFormatter(style=style).get_style_defs(f'[data-bs-theme="{mode}"] .codehilite')
        for mode, style in STYLES.items()
    ]
    return "\n".join(sheets)
