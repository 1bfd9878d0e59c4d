"""What mkdocs does to a page before it renders it."""

import posixpath
import re
from typing import Any

LINK = re.compile(r"\[([^\]]+)\]\(([^)#:]+\.\w+)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A link to a file outside docs/ leads nowhere on the site: its path is named instead."""

    def named(link: re.Match[str]) -> str:
        text, target = link.groups()
        folder = posixpath.dirname(page.file.src_uri)
        path = posixpath.normpath(posixpath.join("docs", folder, target))
        if path.startswith("docs/"):
            return link.group(0)
        return f"`{path}`" if text == path else f"{text} (`{path}` in the repository)"

    return LINK.sub(named, markdown)
