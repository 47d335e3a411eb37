"""How fast this machine trains and generates; see `__main__`."""
