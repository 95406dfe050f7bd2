"""What a run will take: time, memory, and the floor that no program goes below."""
