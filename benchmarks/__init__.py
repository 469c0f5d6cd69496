"""What the repository measures; every number printed or plotted comes from a file in some `results/` folder here."""
