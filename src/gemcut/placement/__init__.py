"""Does it fit, and where: devices, memory, plans."""
