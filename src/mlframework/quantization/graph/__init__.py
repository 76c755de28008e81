"""Models as graphs of calls: taking them down, and giving a module the forward that a graph describes."""
