"""`python -m automix_dist` is the command `automix`."""

from automix_dist.cli import main

if __name__ == "__main__":
    main()
