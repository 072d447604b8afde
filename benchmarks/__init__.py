"""Speed, as ratios within one run: each module prints a table and writes JSON."""
