"""BatchNorm with batch statistics and global pooling, forward and backward."""
