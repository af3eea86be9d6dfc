"""`python -m stages …` is `kava …`."""

from .cli import main

if __name__ == "__main__":
    main()
