"""Networks in use: written for other programs, and compared with what they were made of; shown single pictures."""
