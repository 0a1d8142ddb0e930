"""`python -m cofitune`: what the launcher starts on every rank."""

from cofitune.cli import main

if __name__ == "__main__":
    main()
