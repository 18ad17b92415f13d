"""`python -m tcaq` is the command."""

from tcaq.cli import app

if __name__ == "__main__":
    app()
