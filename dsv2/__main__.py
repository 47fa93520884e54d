"""`python -m dsv2` is the `dsv2` command."""

from dsv2.cli import main

if __name__ == "__main__":
    main()
