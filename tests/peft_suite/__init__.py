"""PEFT's own tests, run against MoKA; see `python -m tests.peft_suite --help`."""
