"""`python -m streammerge`."""

from streammerge.cli.app import run

if __name__ == "__main__":
    run()
