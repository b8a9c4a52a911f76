"""MegaFace Challenge 1: feature files, the devkit's protocol, noise lists, curves."""
