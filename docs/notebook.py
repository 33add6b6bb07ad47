"""A notebook with its outputs as a page in Markdown. `docs/hooks.py` puts it into the site."""

import json
from pathlib import Path
from typing import Any


def page_of(notebook: Path) -> str:
    """Text, code, and what the code has printed and drawn; the pictures are in the page."""
    return "\n\n".join(map(markdown_of, json.loads(notebook.read_text(encoding="utf-8"))["cells"])) + "\n"


def markdown_of(cell: dict[str, Any]) -> str:
    """One cell."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source.replace("](../docs/", "](")
    return "\n\n".join([f"```python\n{source}\n```", *map(output_of, cell["outputs"])])


def output_of(output: dict[str, Any]) -> str:
    """One output of a cell: a picture, or text."""
    data = output.get("data", {})
    if "image/png" in data:
        return f"![What the code above draws](data:image/png;base64,{''.join(data['image/png']).strip()})"
    return f"```text\n{''.join(output.get('text') or data['text/plain']).rstrip()}\n```"
