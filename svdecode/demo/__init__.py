"""The demo: a script over the library's own steps, to be read from `run.py` on."""
