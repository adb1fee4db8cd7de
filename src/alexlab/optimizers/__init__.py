"""Your own optimizers, a file each: README.md tells how a config names one."""
