"""Settings: flags, named recipes, and which settings a resumed run inherits. Standard library only."""
