#!/bin/sh
# Prints the first Python 3.11 or 3.12 that runs; fails with a sentence when there is none.
for name in python3 python3.12 python3.11 python; do
    if "$name" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then
        command -v "$name"
        exit 0
    fi
done
echo "no Python 3.11 or 3.12 found; name one with: make PYTHON=/path/to/python3.12 ..." >&2
exit 1
