"""Data: read in the form in which people have them, written once to a `.beton`, fed in our order.

`sources.open_source` reads, `beton.prepare` writes, `feed.Feed` feeds.
"""
