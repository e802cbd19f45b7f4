"""`python -m streammerge`."""

from streammerge.cli.app import main

if __name__ == "__main__":
    main()
