"""The page of a run: one HTML file with all that it shows, which opens without a network.

``canvas.py`` and ``reading.py`` gather a run as plain arrays, ``write.py`` puts them into the
page, and the page's own text, style and script are the files beside them.
"""
