"""Does it fit, and how fast could it be? Presets, memory tables, compilation for absent devices."""
