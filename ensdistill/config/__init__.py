"""What a user chooses: the configuration, the methods, the recipes."""
