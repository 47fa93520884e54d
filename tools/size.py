"""`make size`: long files and functions, a question to answer rather than a failure."""

import ast
from pathlib import Path

MAX_FILE, MAX_FUNCTION = 400, 60


def main() -> None:
    files = sorted(p for root in ("dsv2", "tests", "tools") for p in Path(root).rglob("*.py"))
    total = 0
    for path in files:
        text = path.read_text(encoding="utf-8")
        lines = text.count("\n")
        total += lines
        if lines > MAX_FILE:
            print(f"{path}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION:
                    print(f"{path}:{node.lineno} {node.name}: {length} lines")
    print(f"{len(files)} files, {total} lines")


if __name__ == "__main__":
    main()
