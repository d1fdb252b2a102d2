"""`python -m sdclr`, and `accelerate launch -m sdclr`."""

from sdclr.cli import main

if __name__ == "__main__":
    main()
