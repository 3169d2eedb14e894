"""The toy model: what it was trained on, how, and how good it is."""
