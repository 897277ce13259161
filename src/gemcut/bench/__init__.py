"""Measuring servers under load: traffic -> client -> outcomes -> figures. Needs Python alone; a plot matplotlib.

traffic (what is sent when) -> load (sends it, open loop) -> client, http (one request) -> figures, plot
"""
