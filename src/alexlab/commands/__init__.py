"""The commands, one file each, and the steps of a training. This folder may import all folders."""
