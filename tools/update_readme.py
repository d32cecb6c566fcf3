"""Write the README's generated parts: the configuration's table and the commands' table.

python tools/update_readme.py
"""

from __future__ import annotations

import re
from pathlib import Path

from vllm_kvmarket.cli import commands
from vllm_kvmarket.config import markdown_table

README = Path(__file__).parents[1] / "README.md"


def command_table() -> str:
    """One row a command, as the code has them."""
    return "\n".join(f"| `kvmarket {name}` | {meaning} |" for name, meaning in commands())


def replaced(text: str, name: str, content: str) -> str:
    """`text` with `content` between the marks of one part."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    return re.sub(pattern, lambda found: f"{found[1]}{content}\n{found[2]}", text, flags=re.DOTALL)


def main() -> None:
    """Rewrite README.md in place."""
    text = README.read_text()
    text = replaced(text, "config table", markdown_table())
    # A comment inside a table would end it, so the command rows carry no marks of their own.
    head = "| command | what it does |\n|---|---|\n"
    start = text.index(head)
    end = text.index("\n\n", start)
    README.write_text(text[:start] + head + command_table() + text[end:])


if __name__ == "__main__":
    main()
