"""What can be set: the flags, named recipes, what a resumed run takes over. Standard library only."""
