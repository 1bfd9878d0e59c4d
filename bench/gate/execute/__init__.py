"""Every compiled kernel executed on the PTX machine and judged; see command.py."""
