"""Networks for other programs: graphs, weights and folders, each compared with the network that it was made of."""
