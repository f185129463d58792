"""One file, one experiment: a config, and the functions that build, train and evaluate."""
