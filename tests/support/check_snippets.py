#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks what the pages of the documentation show and link.

check_snippets.py ROOT --pages PATTERN... --sources SOURCE... [--shorter FILE ID LINES]

  - Every block of C++ stands word for word, indentation aside, in one of the sources: those that tests compile and run.
  - Every block says its language, so that none escapes. Python is run by examples/python/tests/test_pages.py.
  - Every \\snippet is taken from one of the sources.
  - Commands in blocks of shell that begin with a file of the project name one that exists and can be run.
  - Relative links lead to files that exist.
  - With --shorter, the part ID of FILE has fewer lines than LINES.
"""
import argparse
import os
import pathlib
import re
import sys

CPP = {"cpp", "c++", "{.cpp}"}
KNOWN = CPP | {"python", "sh", "text", "json", "meson", "cmake", "make"}
BUILT = ("build", "./build")  # made by the commands before


def blocks(text):
    """(line number, language, lines) of each fenced block."""
    begin = None
    for number, line in enumerate(text.splitlines(), 1):
        fence = re.match(r"^\s*```(.*)$", line)
        if not fence:
            if begin is not None:
                content.append(line)
        elif begin is None:
            begin, language, content = number, fence.group(1).strip(), []
        else:
            yield begin, language, content
            begin = None
    if begin is not None:
        yield begin, "not closed", content


def without_blocks(text):
    return re.sub(r"^\s*```.*?^\s*```", "", text, flags=re.DOTALL | re.MULTILINE)


def stands_in(block, source):
    for indentation in ("", "  ", "    "):
        wanted = "\n".join(indentation + line if line.strip() else "" for line in block)
        if "\n" + wanted + "\n" in source:
            return True
    return False


def check_page(root, page, sources):
    text = (root / page).read_text(encoding="utf-8")
    for number, language, content in blocks(text):
        where = f"{page}:{number}"
        if language not in KNOWN:
            yield f"{where}: a block of the language '{language}'; known: {' '.join(sorted(KNOWN))}"
        elif language in CPP and not any(stands_in(content, source) for source in sources.values()):
            yield f"{where}: no compiled source holds this block"
        elif language == "sh":
            for line in content:
                command = line.split()[0] if line.strip() else ""
                if "/" in command and not command.startswith(("#",) + BUILT):
                    if not os.access(root / command, os.X_OK):
                        yield f"{where}: {command} cannot be run"
    names = {pathlib.PurePath(path).name for path in sources}
    for path in re.findall(r"[\\@]snippet\S*\s+(\S+)", text):
        if path not in names:
            yield f"{page}: the snippet's source {path} is not compiled by a test"
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(text)):
        path = target.split("#")[0]
        if path and "://" not in path and not ((root / page).parent / path).exists():
            yield f"{page}: the link {target} leads nowhere"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=pathlib.Path)
    parser.add_argument("--pages", nargs="+", required=True)
    parser.add_argument("--sources", nargs="+", required=True)
    parser.add_argument("--shorter", nargs=3, metavar=("FILE", "ID", "LINES"))
    arguments = parser.parse_args()
    root = arguments.root
    sources = {path: "\n" + (root / path).read_text(encoding="utf-8") for path in arguments.sources}
    problems = []
    pages = []
    for pattern in arguments.pages:
        found = sorted(path.relative_to(root) for path in root.glob(pattern))
        if not found:
            problems.append(f"there is no page {pattern}")
        pages += found
    problems += [problem for page in pages for problem in check_page(root, page, sources)]
    if arguments.shorter:
        path, name, limit = arguments.shorter
        parts = (root / path).read_text(encoding="utf-8").split(f"//! [{name}]\n")
        length = len(parts[1].splitlines()) if len(parts) == 3 else None
        if length is None or length >= int(limit):
            problems.append(f"{path}: the part {name} has {length} lines, must have fewer than {limit}")
    print("\n".join(problems) if problems else f"{len(pages)} pages hold what they show")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
