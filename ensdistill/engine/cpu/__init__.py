"""Networks side by side on the cores of a CPU: threads, what they tell each other, what they compute."""
