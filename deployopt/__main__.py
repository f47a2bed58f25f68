"""`python -m deployopt`."""

from deployopt.cli import main

if __name__ == "__main__":
    main()
