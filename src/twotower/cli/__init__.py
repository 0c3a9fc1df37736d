"""The command line: it hands the stages plain arguments out of one configuration."""
