"""Writes docs/server.md's table of all settings from their declarations: make_settings_table.py"""

from __future__ import annotations

from pathlib import Path

from trainer.leaves import in_words, shown
from trainer.server.settings import ServerSettings

PAGE = Path(__file__).parent.parent / "docs" / "server.md"
BEGIN = "<!-- settings: made by scripts/make_settings_table.py -->"
END = "<!-- end of settings -->"


def table() -> str:
    """A row for every setting that an owner gives."""
    schema = ServerSettings.model_json_schema()["properties"]
    rows = ["| setting | default | allowed | meaning |", "|---|---|---|---|"]
    for name, info in ServerSettings.model_fields.items():
        if info.json_schema_extra:
            continue
        several = "tuple" in str(info.annotation)
        allowed = "a list" if several else in_words(schema[name]).replace("|", "\\|")
        plain = shown(info.default).strip('"')
        default = "`null`" if info.default in (None, ()) else f"`{plain}`" if plain else ""
        rows.append(f"| `{name}` | {default} | {allowed} | {info.description} |")
    return "\n".join(rows)


def page_with_settings(page: str) -> str:
    """The page with the table as it should be now."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"`{BEGIN}` and `{END}` must stand on the page"
    return f"{before}{BEGIN}\n\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page_with_settings(PAGE.read_text()))
