"""The page of a feature, and the index of several: one HTML file each.

The pages need no network, and say what they show without their script, which switches between
light and dark and sorts and searches the index.
"""
