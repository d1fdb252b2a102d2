"""One file per command: open the run, run the loop, report."""
