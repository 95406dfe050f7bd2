"""Networks in use: for other programs, each compared with the network that it was made of, and shown single pictures."""
