"""The method in a loop of the user's own: a step a call, and its pieces."""
