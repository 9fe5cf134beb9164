#!/usr/bin/env python3
"""Imports between the rooms of src/ point downwards only: no room uses one above it, so there are no circles.

A room is a folder or a file of src/. FLOORS lists them from the bottom; rooms on one floor do not know each other, unless
they are named in one string, in order. Paths in comments (links of the documentation) do not count, nor do tests.
"""

import re
import sys
from pathlib import Path

FLOORS = [
    "error",
    "check",
    "expectation parallel",
    "kernel",
    "linalg schedule storage gradient family metrics conformal",
    "link params likelihood",
    "statistic nn",
    "curvature posterior",
    "prior outputs iterates",
    "driver",
    "rows rule",
    "fisher",
    "continual federated laplace pruning merge",
    "selection",
    "sensitivity",
]
SRC = Path(__file__).resolve().parent.parent / "src"


def room(path):
    return path.relative_to(SRC).parts[0].removesuffix(".rs")


def code(path):
    """The file without comments, strings' contents aside, and without its unit tests."""
    text = path.read_text()
    text = re.sub(r"#\[cfg\(test\)\]\s*mod \w+ \{.*\Z", "", text, flags=re.S)
    return "\n".join(re.sub(r"//.*", "", line) for line in text.splitlines())


def exports():
    """Name at the crate's root -> the room that it comes from."""
    found = {}
    for first, names in re.findall(r"pub(?:\(crate\))? use (\w+)::(\{[^}]*\}|\w+);", code(SRC / "lib.rs")):
        for name in re.findall(r"\w+", names):
            found[name] = first
    return found


def main():
    order = {}
    for floor, rooms in enumerate(FLOORS):
        for place, name in enumerate(rooms.split()):
            order[name] = (floor, place)
    root = exports()
    wrong = set()
    for path in sorted(SRC.rglob("*.rs")):
        here = room(path)
        if here == "lib" or "tests" in path.parts or path.name == "tests.rs":
            continue
        if here not in order:
            wrong.add(f"{path.relative_to(SRC)}: the room {here} is not in FLOORS of scripts/arrows.py")
            continue
        text = code(path)
        names = re.findall(r"crate::(\w+)", text)
        for group in re.findall(r"crate::\{([^;]*?)\};", text, flags=re.S):
            names += re.findall(r"(?:^|,)\s*(\w+)", group)
        for name in names:
            there = root.get(name, name)
            if there in order and there != here and order[there] >= order[here]:
                wrong.add(f"{path.relative_to(SRC)}: {here} uses {there} (crate::{name}), which is not below it")
    for line in sorted(wrong):
        print(line)
    print(f"{len(order)} rooms, {len(wrong)} imports that do not point downwards")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
