"""``python -m onceover``: the command line."""

from onceover.cli import main

if __name__ == "__main__":
    main()
