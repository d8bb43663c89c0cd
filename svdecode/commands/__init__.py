"""One file a command of the command line; `svdecode/cli.py` lists them."""
