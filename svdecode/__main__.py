"""`python -m svdecode`, also under torchrun."""

from svdecode.cli.app import main

if __name__ == "__main__":
    main()
