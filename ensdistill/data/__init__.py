"""Data: read in the form in which people have them, written once to a `.beton`, fed in our order.

`sources.registry.open_source` reads, `prepare.prepare` writes, `feed.Feed` feeds.
"""
