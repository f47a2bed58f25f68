"""`python -m deployopt`."""

from deployopt.cli import console

if __name__ == "__main__":
    console()
