"""What `make docs` makes besides the pages in this folder, and what it checks that MkDocs does not.

* CHANGELOG.md and CONTRIBUTING.md are pages.
* The notebook is a page (`docs/notebook.py`).
* Each command has a page with its options (`docs/options.py`).
* Files of the repository that a page links to (`../recipes/configs/...`) are in the site, so that the link works there
  as it does in the repository.
* Nothing in a page is loaded from another host.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from docs.notebook import page_of
from docs.options import COMMANDS, options_page, uri_of

ROOT = Path(__file__).parent.parent
NOTEBOOK = "notebooks/large_batch.ipynb"
ROOT_PAGES = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
OUTSIDE = re.compile(r"\]\(((?:\.\./)+)([^)#]+)(#[^)]*)?\)")  # a link to a file outside docs/
LOADED = re.compile(
    r"""<(?:script|img|iframe|source)[^>]+src=["']?(?:https?:)?//|<link[^>]+href=["']?(?:https?:)?//"""
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the pages of options to the navigation."""
    (reference,) = [pages for section in config.nav for title, pages in section.items() if title == "Reference"]
    reference += [{command: uri_of(command)} for command in COMMANDS]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/, and the files that pages link to."""
    for uri, name in ROOT_PAGES.items():
        text = re.sub(r"\]\((?!https?:|#)", "](../", (ROOT / name).read_text()).replace("](../docs/", "](")
        files.append(File.generated(config, uri, content=text))
    files.append(File.generated(config, "large_batch.md", content=page_of(ROOT / NOTEBOOK)))
    for command in COMMANDS:
        files.append(File.generated(config, uri_of(command), content=options_page(command)))
    for page in files.documentation_pages():
        for _, name, _ in OUTSIDE.findall(page.content_string):
            if (ROOT / name).is_file() and files.get_file_from_path(f"files/{name}") is None:
                source = str(ROOT / name)
                file = File.generated(
                    config, f"files/{name}", abs_src_path=source, inclusion=InclusionLevel.NOT_IN_NAV
                )
                files.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links to files of the repository at those in the site."""
    up = "../" * page.file.src_uri.count("/")
    markdown = markdown.replace(f"](../{NOTEBOOK})", f"]({up}large_batch.md)")
    return OUTSIDE.sub(lambda link: f"]({up}files/{link[2]}{link[3] or ''})", markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Raise where a page would make the reader's browser ask another host for something."""
    if found := LOADED.search(output):
        raise PluginError(f"{page.file.src_uri} loads from another host: {output[found.start() :][:200]}")
    return output
