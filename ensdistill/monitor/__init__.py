"""Watch the device while a training runs: utilisation, clock, power, memory, temperature."""
