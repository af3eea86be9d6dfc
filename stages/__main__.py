"""`python -m stages …` is `kava …`."""

from stages.cli import main

if __name__ == "__main__":
    main()
