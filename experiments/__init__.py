"""What people run: `python -m experiments COMMAND`."""
