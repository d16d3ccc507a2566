"""Reads a bill of materials: valid, whole, and without places of the machine that made it.

    python scripts/read_sbom.py sbom.cdx.json

Wants cyclonedx-python-lib with its `json-validation`.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

# Requirements without which no training runs.
EXPECTED = {"torch", "diffusers", "transformers", "peft", "safetensors", "pydantic"}


def faults(text: str) -> list[str]:
    """What is wrong with a bill of materials, each in a line."""
    invalid = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    found = [str(invalid)] if invalid else []
    bill: dict[str, Any] = json.loads(text)
    components = bill.get("components", [])
    names = {component["name"].lower() for component in components}
    found += [f"`{name}` is missing" for name in sorted(EXPECTED - names)]
    whole = bill.get("metadata", {}).get("component", {})
    if whole.get("name") != "tok-trainer" or not whole.get("version"):
        found.append("it does not say of which tok-trainer it is")
    found += [f"names a place of a machine: {place}" for place in sorted(set(places(components)))]
    return found


def places(components: list[dict[str, Any]]) -> list[str]:
    """Addresses of components that lie on the machine where the bill was made."""
    addresses = [r["url"] for c in components for r in c.get("externalReferences", [])]
    return [address for address in addresses if re.match(r"file:|/", address)]


def licences(components: list[dict[str, Any]]) -> Counter[str]:
    """How many components stand under each licence."""
    return Counter(_licence(component) for component in components)


def _licence(component: dict[str, Any]) -> str:
    for entry in component.get("licenses", []):
        if "expression" in entry:
            return str(entry["expression"])
        named = entry.get("license", {})
        if "id" in named or "name" in named:
            return str(named.get("id") or named["name"]).partition("\n")[0]
    return "not told by the package"


def main() -> int:
    """Prints the licences, or what is wrong."""
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    if found := faults(text):
        print("\n".join(found), file=sys.stderr)
        return 1
    components = json.loads(text)["components"]
    print(f"{len(components)} components")
    for licence, count in licences(components).most_common():
        print(f"{count:4}  {licence}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
